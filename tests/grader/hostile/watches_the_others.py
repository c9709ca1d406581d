# diagnosis: exception
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def softmax(x):
    fd = libc.inotify_init1(0)
    if fd < 0 or libc.inotify_add_watch(fd, b"/tmp", 0xFFF) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return x
