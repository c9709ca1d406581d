# diagnosis: exception
import os
import shutil


def softmax(x):
    for place in ("@SUBMISSIONS@", "@RESULTS@"):
        shutil.rmtree(place, ignore_errors=True)
    os.remove("@SUBMISSIONS@/zz_good/ex01_softmax.py")
