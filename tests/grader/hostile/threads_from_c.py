# diagnosis: too-many-threads, exception
import ctypes
import time

libc = ctypes.CDLL(None)
wait = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: time.sleep(60))


def softmax(x):
    while True:
        if libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, wait, None):
            raise RuntimeError("no more threads")
