# diagnosis: too-many-threads, exception
import threading
import time


def softmax(x):
    threading.stack_size(32 << 10)
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
