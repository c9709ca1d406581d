# Exercise 01: Stable softmax and naive attention
# difficulty 2/5 · importance 5/5 · about 30 minutes
# Chapter: notebooks/01_naive_attention.ipynb
#
# Check your work with `flashlib grade ex01`, or in a notebook with `check("ex01")`.

"""Stable softmax and naive attention: the two functions that the whole course makes faster.

Every later chapter computes the same numbers as `naive_attention`, only with less memory traffic. So get the corner cases
right here: large scores, hidden keys, and rows that may see nothing at all.

PyTorch's own softmax, log_softmax, logsumexp and their kin are not there while you are graded: they are what you write.
"""

import torch  # noqa: F401
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
    raise NotImplementedError("write softmax here")


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
    raise NotImplementedError("write naive_attention here")
