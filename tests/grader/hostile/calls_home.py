# diagnosis: exception
import socket


def softmax(x):
    socket.create_connection(("127.0.0.1", 80))
