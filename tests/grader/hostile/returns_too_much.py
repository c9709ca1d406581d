# diagnosis: memory-limit
import torch


def softmax(x):
    return torch.zeros(1).expand(1 << 40)
