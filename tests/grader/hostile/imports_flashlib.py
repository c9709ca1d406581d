# diagnosis: exception
from flashlib.reference import naive_attention


def softmax(x):
    return naive_attention(x, x, x)
