# diagnosis: exception
from pathlib import Path


def softmax(x):
    for file in Path("@SUBMISSIONS@").rglob("*.py"):
        print(file.read_text())
    return open("@SUBMISSIONS@/zz_good/ex01_softmax.py").read()
