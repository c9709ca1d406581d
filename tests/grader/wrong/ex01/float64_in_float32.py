# diagnosis: computed-in-float32
"""Stable softmax and naive attention: the two functions that the whole course makes faster.

Every later chapter computes the same numbers as `naive_attention`, only with less memory traffic. So get the corner cases
right here: large scores, hidden keys, and rows that may see nothing at all.

PyTorch's own softmax, log_softmax, logsumexp and their kin are not there while you are graded: they are what you write.
"""

import math

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis, for scores of any size.

    Args:
        x: ``[..., n]``, n >= 1, float16, float32 or float64. Entries may be -inf, which means "hidden"; they are never
            NaN or +inf. Do not change it.

    Returns:
        ``[..., n]`` in x's dtype. Each row sums to 1, a hidden entry has weight 0, and a row of nothing but hidden
        entries is all zeros. Rounding: as good as float32 arithmetic followed by one rounding to x's dtype, for rows of
        any length.
    """
    scores = x.float()
    row_max = scores.amax(-1, keepdim=True)
    # In a row of -inf, -inf - -inf would be NaN. Subtracting 0 leaves every exponential at 0.
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    weights = torch.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdim=True)
    return (weights / row_sum.masked_fill(row_sum == 0, 1.0)).to(x.dtype)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """Attention as the formula reads: softmax(scale * Q K^T) V.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, H, Sk, D]``.
        v: ``[B, H, Sk, Dv]``. All three in one dtype, any strides. Do not change them.
        scale: factor on the scores, greater than 0; ``1 / sqrt(D)`` if None.
        causal: a query sees only keys up to its own position. The queries are the last Sq of Sk positions, so query i
            stands at position ``i + Sk - Sq``.

    Returns:
        ``[B, H, Sq, Dv]`` in the inputs' dtype. A query that sees no key gets zeros.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.mT) * scale  # [B, H, Sq, Sk]
    if causal:
        sq, sk = scores.shape[-2:]
        position = torch.arange(sq)[:, None] + sk - sq
        scores = scores.masked_fill(torch.arange(sk) > position, -torch.inf)
    return softmax(scores) @ v
