# Exercise 08: Causal masks and windows in Triton
# difficulty 4/5 · importance 4/5 · about 75 minutes
# Chapter: notebooks/08_masks_in_a_kernel.ipynb
#
# Check your work with `flashlib grade ex08`, or in a notebook with `check("ex08")`.

"""Causal masks and sliding windows in a Triton kernel, which loads no tile that nobody looks at.

The kernel of exercise 7, on simpler inputs (contiguous, as many KV heads as query heads, D a power of two), so that all the work goes
into the mask. Of the tiles that a block of queries meets, those that no query sees are skipped, those that all of them see whole pay
nothing for the mask, and only the others compare positions. Chapter 4 calls them empty, full and partial.

It runs without a GPU, in Triton's interpreter. Set `TRITON_INTERPRET=1` in the environment before Python starts; the grader does.
The grader also compiles it for GPUs (sm_80 and sm_90), which need not be there: the interpreter lets pass what no GPU can run.
"""

import torch  # noqa: F401
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x * LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def masked_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_counts,
    q_len,
    kv_len,
    left,
    right,
    scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, against the keys that they see.

    A suggestion: the arguments are yours to change, since only the two functions below call this. HAS_LEFT and HAS_RIGHT say whether there
    is a limit on that side, and COUNT_TILES whether to write counts. To run one loop body with a mask and without, put it into a
    @triton.jit function of its own, with a constexpr.
    """
    raise NotImplementedError("write masked_kernel here")


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None = None,
    right: int | None = None,
    block_m: int = 32,
    block_n: int = 32,
) -> tuple[Tensor, Tensor]:
    """Attention in which query i sees the keys i + Sk - Sq - left to i + Sk - Sq + right, as far as they exist.

    Args:
        q: ``[B, H, Sq, D]``.
        k, v: ``[B, H, Sk, D]``. All three float32 and contiguous. D is 16, 32, 64 or 128; all other sizes are at least 1.
        left, right: at least 0, or None for no limit on that side. ``right=0`` is a causal mask. The last query stands at the last key:
            with Sq > Sk the first queries stand before the first key, and may see nothing.
        block_m, block_n: queries and keys of a tile, powers of two from 16 on.

    Returns:
        out ``[B, H, Sq, D]`` and lse ``[B, H, Sq]``, float32, with scale ``1 / sqrt(D)``. A query that sees nothing has out 0 and
        lse -inf.

    Precision: tiles are multiplied in float32 (`input_precision="ieee"`), and so is all other arithmetic.

    Tiles begin at keys 0, block_n, 2 * block_n and so on. A tile of which no query of the block sees a key is never loaded. (What
    lies there may be NaN.)
    """
    raise NotImplementedError("write masked_attention here")


def count_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None = None,
    right: int | None = None,
    block_m: int = 32,
    block_n: int = 32,
) -> Tensor:
    """What the kernel did in `masked_attention(q, k, v, left, right, block_m, block_n)`: counts that it writes itself.

    Returns:
        int32 ``[B, H, ceil(Sq / block_m), 2]``: for each block of queries the number of tiles that were loaded and masked, and the
        number of those that were loaded and taken whole. A tile is taken whole if it has all block_n keys, and every query of
        the block (of those that exist) sees all of them.
    """
    raise NotImplementedError("write count_tiles here")
