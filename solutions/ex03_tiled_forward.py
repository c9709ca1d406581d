"""FlashAttention, forward: exact attention tile by tile, without the Sq x Sk matrix.

Chapter 2 put the softmax of a row into three running numbers. Here that becomes an algorithm whose memory grows with the
sequence, not with its square.
"""

import math

import torch
from torch import Tensor


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V and its log-sum-exp, in tiles of `block_q` queries by `block_k` keys.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, H, Sk, D]``.
        v: ``[B, H, Sk, Dv]``. All three float16, bfloat16 or float32, any strides; all sizes at least 1. Do not change
            them.
        block_q, block_k: queries and keys of a tile, at least 1. They need not divide Sq and Sk, and may be larger. They
            change the rounding, never the result.
        scale: factor on the scores, greater than 0; ``1 / sqrt(D)`` if None.

    Returns:
        out ``[B, H, Sq, Dv]`` in the inputs' dtype, and lse ``[B, H, Sq]`` in float32: the natural logarithm of the sum of
        exp(scaled score) over each query's row.

    Precision: the arithmetic of the softmax and all sums are float32, whatever the inputs are.

    Memory: the scores of one tile exist at a time. No tensor made on the way has more than twice as many elements as the
    largest of q, k, v, out and one tile of scores, ``[B, H, block_q, block_k]``.

    Traffic: K and V are each read at most once per block of queries, so ceil(Sq / block_q) times, from where they lie: no copy
    of all of them is made. A block of queries is done before the next one is begun: out is written once.
    """
    # BEGIN SOLUTION
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, q_len, _ = q.shape
    out = torch.empty(batch, heads, q_len, v.shape[-1], dtype=q.dtype)
    lse = torch.empty(batch, heads, q_len)
    for rows in _blocks(q_len, block_q):
        q_tile = q[:, :, rows].float() * scale
        m = torch.full(q_tile.shape[:-1], -torch.inf)
        l = torch.zeros(q_tile.shape[:-1])
        acc = torch.zeros(*q_tile.shape[:-1], v.shape[-1])
        for keys in _blocks(k.shape[2], block_k):
            scores = q_tile @ k[:, :, keys].float().mT  # [B, H, rows, keys]
            m_new = torch.maximum(m, scores.amax(-1))
            rescale = torch.exp(m - m_new)  # 0 for the first tile, where m is -inf
            weights = torch.exp(scores - m_new[..., None])
            l = l * rescale + weights.sum(-1)
            acc = acc * rescale[..., None] + weights @ v[:, :, keys].float()
            m = m_new
        out[:, :, rows] = (acc / l[..., None]).to(q.dtype)
        lse[:, :, rows] = m + l.log()
    return out, lse


def _blocks(length: int, block: int) -> list[slice]:
    """``0:block``, ``block:2*block``, ...; the last ends at `length`."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]
    # END SOLUTION
