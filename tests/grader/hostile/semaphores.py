# diagnosis: exception
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def softmax(x):
    if libc.semget(0x5EC2E7, 1000, 0o1666) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return x
