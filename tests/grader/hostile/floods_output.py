# diagnosis: output-flood
def softmax(x):
    while True:
        print("flood " * 1000)
