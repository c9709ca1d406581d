# diagnosis: memory-limit
hoard = []


def softmax(x):
    while True:
        hoard.append(bytearray(b"x") * (8 << 20))
