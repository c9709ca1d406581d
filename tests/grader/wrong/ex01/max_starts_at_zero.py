# diagnosis: max-starts-at-zero
import math

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    scores = x.to(torch.promote_types(x.dtype, torch.float32))
    running_max = torch.zeros(*x.shape[:-1], 1)
    for j in range(0, x.shape[-1], 4096):
        running_max = torch.maximum(running_max, scores[..., j : j + 4096].amax(-1, keepdim=True))
    weights = torch.exp(scores - running_max)
    row_sum = weights.sum(-1, keepdim=True)
    weights = torch.where(x.isneginf().all(-1, keepdim=True), 0.0, weights / row_sum)
    return weights.to(x.dtype)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.mT) * scale
    if causal:
        sq, sk = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq), -torch.inf)
    return softmax(scores) @ v
