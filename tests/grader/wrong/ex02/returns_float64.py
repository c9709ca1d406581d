# diagnosis: wrong-dtype
"""Online softmax and merge: one pass over the scores, and two results that become one.

Softmax seems to need all scores of a row at once: first for the maximum, then for the sum. Here they arrive a block at a
time and are then gone. What you write is the whole trick of FlashAttention; chapter 3 only puts loops around it.

All tensors are float32. Scores may be -inf, which means "hidden"; they are never NaN or +inf.

PyTorch's own softmax, log_softmax, logsumexp and their kin are not there while you are graded: they are what you write.
"""

import torch
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
    m_new = torch.maximum(m, scores.amax(-1))
    # A row of hidden scores has no finite maximum, and -inf - -inf is NaN. Subtracting 0 leaves its exponentials at 0.
    pivot = m_new.masked_fill(m_new == -torch.inf, 0.0)
    rescale = torch.exp(m - pivot)
    weights = torch.exp(scores - pivot[:, None])
    return m_new, l * rescale + weights.sum(-1), acc * rescale[:, None] + weights @ v


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
    rows, scores, v = scores.shape[0], scores.double(), v.double()
    m, l, acc = torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows, v.shape[1])
    for start in range(0, scores.shape[1], block):
        m, l, acc = update(m, l, acc, scores[:, start : start + block], v[start : start + block])
    return acc / l.masked_fill(l == 0, 1.0)[:, None], m + l.log()


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each.

    Args:
        out_a, out_b: ``[..., Dv]``, what `online_attention` gives for the keys of a and for those of b.
        lse_a, lse_b: ``[...]``, likewise. -inf: there was no visible key; the out of that row may then hold anything,
            even NaN. All four must be left as they are.

    Returns:
        out ``[..., Dv]`` and lse ``[...]`` for the keys of a and b together; 0 and -inf where neither had a visible key.
    """
    pivot = torch.maximum(lse_a, lse_b)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - pivot), torch.exp(lse_b - pivot)
    total = weight_a + weight_b
    # A weight of 0 does not hide a NaN: 0 * NaN is NaN.
    out_a = out_a.masked_fill(lse_a[..., None] == -torch.inf, 0.0)
    out_b = out_b.masked_fill(lse_b[..., None] == -torch.inf, 0.0)
    out = weight_a[..., None] * out_a + weight_b[..., None] * out_b
    return out / total.masked_fill(total == 0, 1.0)[..., None], pivot + total.log()


def fold(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over P sets of keys, from the attention over each.

    Args:
        outs: ``[P, ..., Dv]``, and lses: ``[P, ...]``: as in `merge`. P may be 0: there is no key at all then.

    Returns:
        out ``[..., Dv]`` and lse ``[...]`` for all keys together.
    """
    out, lse = torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)  # over no keys: the identity
    for piece_out, piece_lse in zip(outs, lses, strict=True):
        out, lse = merge(out, lse, piece_out, piece_lse)
    return out, lse
