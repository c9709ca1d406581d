# diagnosis: exception
import os


def softmax(x):
    os.chmod("@SUBMISSIONS@", 0)
