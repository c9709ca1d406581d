# Exercise 02: Online softmax and merge
# difficulty 3/5 · importance 5/5 · about 60 minutes
# Chapter: notebooks/02_online_softmax.ipynb
#
# Check your work with `flashlib grade ex02`, or in a notebook with `check("ex02")`.

"""Online softmax and merge: one pass over the scores, and two results that become one.

Softmax seems to need all scores of a row at once: first for the maximum, then for the sum. Here they arrive a block at a
time and are then gone. What you write is the whole trick of FlashAttention; chapter 3 only puts loops around it.

All tensors are float32. Scores may be -inf, which means "hidden"; they are never NaN or +inf.

PyTorch's own softmax, log_softmax, logsumexp and their kin are not there while you are graded: they are what you write.
"""

import torch  # noqa: F401
from torch import Tensor


def update(m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more block of scores: the state of the rows after it.

    With s over all scores of a row that were seen so far, each with its value v, the state is

        m = max s        l = sum of exp(s - m)        acc = sum of exp(s - m) * v

    A row that has seen no score yet, or only hidden ones, has m = -inf, l = 0 and acc = 0.

    Args:
        m, l: ``[rows]``, the state before the block.
        acc: ``[rows, Dv]``, likewise.
        scores: ``[rows, n]``, the block's scores, n >= 1.
        v: ``[n, Dv]``, the block's values. All five must be left as they are.

    Returns:
        m ``[rows]``, l ``[rows]`` and acc ``[rows, Dv]``, the state after the block. The earlier scores are not needed,
        and there is no way to get at them.
    """
    raise NotImplementedError("write update here")


def online_attention(scores: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """softmax(scores) @ v, looking at `block` keys at a time, each once.

    Args:
        scores: ``[rows, n]``, n >= 1.
        v: ``[n, Dv]``. Do not change either of them.
        block: keys in a block, at least 1. It need not divide n, and may be larger.

    Returns:
        out ``[rows, Dv]`` and lse ``[rows]``, the natural logarithm of the sum of exp(score) over the row. A row of
        nothing but hidden scores has out 0 and lse -inf. Nothing as large as `scores` is made on the way.
    """
    raise NotImplementedError("write online_attention here")


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each.

    Args:
        out_a, out_b: ``[..., Dv]``, what `online_attention` gives for the keys of a and for those of b.
        lse_a, lse_b: ``[...]``, likewise. -inf: there was no visible key; the out of that row may then hold anything,
            even NaN. All four must be left as they are.

    Returns:
        out ``[..., Dv]`` and lse ``[...]`` for the keys of a and b together; 0 and -inf where neither had a visible key.
    """
    raise NotImplementedError("write merge here")


def fold(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over P sets of keys, from the attention over each.

    Args:
        outs: ``[P, ..., Dv]``, and lses: ``[P, ...]``: as in `merge`. P may be 0: there is no key at all then.

    Returns:
        out ``[..., Dv]`` and lse ``[...]`` for all keys together.
    """
    raise NotImplementedError("write fold here")
