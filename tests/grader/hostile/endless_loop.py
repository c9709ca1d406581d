# diagnosis: timeout
def softmax(x):
    while True:
        pass
