# diagnosis: softmax-called
import math

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1).nan_to_num(0.0)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.mT) * scale
    if causal:
        sq, sk = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq), -torch.inf)
    return softmax(scores) @ v
