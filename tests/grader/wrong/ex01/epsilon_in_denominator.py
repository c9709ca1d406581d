# diagnosis: epsilon-in-denominator
import math

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    scores = x.to(torch.promote_types(x.dtype, torch.float32))
    row_max = scores.amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    weights = torch.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdim=True)
    return (weights / (row_sum + 1e-5)).to(x.dtype)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.mT) * scale
    if causal:
        sq, sk = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq), -torch.inf)
    return softmax(scores) @ v
