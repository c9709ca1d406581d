# Exercise 03: Tiled forward with log-sum-exp
# difficulty 4/5 · importance 5/5 · about 75 minutes
# Chapter: notebooks/03_tiling.ipynb
#
# Check your work with `flashlib grade ex03`, or in a notebook with `check("ex03")`.

"""FlashAttention, forward: exact attention tile by tile, without the Sq x Sk matrix.

Chapter 2 put the softmax of a row into three running numbers. Here that becomes an algorithm whose memory grows with the
sequence, not with its square.
"""

import torch  # noqa: F401
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
    raise NotImplementedError("write tiled_attention here")
