# diagnosis: no-max-subtraction, masked-row-nan
import math

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    weights = torch.exp(x.float() if x.dtype == torch.float16 else x)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.mT) * scale
    if causal:
        sq, sk = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq), -torch.inf)
    return softmax(scores) @ v
