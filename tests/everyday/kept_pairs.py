"""Which pairs a backend drops, read off its output."""

import torch
from torch import Tensor

from flashlib import attention

BATCH, HEADS, ROWS, KEYS = 2, 4, 37, 50


def kept_pairs(backend: str, seed: Tensor, dropout_p: float) -> Tensor:
    """bool ``[BATCH, HEADS, ROWS, KEYS]``: with the identity as values, the output is the weights themselves."""
    q, k = torch.randn(BATCH, HEADS, ROWS, 16), torch.randn(BATCH, 2, KEYS, 16)
    v = torch.eye(KEYS).expand(BATCH, 2, KEYS, KEYS)
    return attention(q, k, v, dropout_p=dropout_p, dropout_seed=seed, backend=backend) != 0.0
