# diagnosis: timeout
while True:
    pass
