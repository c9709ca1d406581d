# diagnosis: memory-limit
import torch


def softmax(x):
    return torch.ones(50 * 2**28)
