# diagnosis: timeout
import signal

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGXCPU):
    signal.signal(number, signal.SIG_IGN)


def softmax(x):
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
