# diagnosis: summed-in-half
"""Causal masks and sliding windows in a Triton kernel, which loads no tile that nobody looks at.

The kernel of exercise 7, on simpler inputs (contiguous, as many KV heads as query heads, D a power of two), so that all the work goes
into the mask. Of the tiles that a block of queries meets, those that no query sees are skipped, those that all of them see whole pay
nothing for the mask, and only the others compare positions. Chapter 4 calls them empty, full and partial.

It runs without a GPU, in Triton's interpreter. Set `TRITON_INTERPRET=1` in the environment before Python starts; the grader does.
The grader also compiles it for GPUs (sm_80 and sm_90), which need not be there: the interpreter lets pass what no GPU can run.
"""

import math

import torch
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
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    p_k += i_h * kv_len * BLOCK_D
    p_v += i_h * kv_len * BLOCK_D
    o_q = (i_h * q_len + o_m)[:, None] * BLOCK_D + o_d[None, :]
    b_q = tl.load(p_q + o_q, mask=(o_m < q_len)[:, None], other=0.0)

    # Every row sees the keys [start, stop), and neither end ever moves back from one row to the next: the first and the last
    # row of the block decide for all.
    offset = kv_len - q_len
    first_row = i_m * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    start, stop = tl.zeros_like(o_m), tl.zeros_like(o_m) + kv_len
    first, full_first, full_last, last = 0, 0, kv_len, kv_len
    if HAS_LEFT:
        start = tl.maximum(o_m + offset - left, 0)
        first = tl.maximum(first_row + offset - left, 0)
        full_first = tl.maximum(last_row + offset - left, 0)
    if HAS_RIGHT:
        stop = tl.minimum(o_m + offset + right + 1, kv_len)
        last = tl.minimum(tl.maximum(last_row + offset + right + 1, 0), kv_len)
        full_last = tl.minimum(tl.maximum(first_row + offset + right + 1, 0), kv_len)
    first = tl.minimum(first // BLOCK_N * BLOCK_N, last)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK_N) * BLOCK_N, first), last)
    full_last = tl.maximum(full_last // BLOCK_N * BLOCK_N, full_first)

    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    unit = scale * LOG2_E
    b_m, b_l, b_acc, n_left = attend(
        b_q, b_m, b_l, b_acc, p_k, p_v, o_d, start, stop, first, full_first, kv_len, unit, True, BLOCK_N, BLOCK_D
    )
    b_m, b_l, b_acc, n_full = attend(
        b_q, b_m, b_l, b_acc, p_k, p_v, o_d, start, stop, full_first, full_last, kv_len, unit, False, BLOCK_N, BLOCK_D
    )
    b_m, b_l, b_acc, n_right = attend(
        b_q, b_m, b_l, b_acc, p_k, p_v, o_d, start, stop, full_last, last, kv_len, unit, True, BLOCK_N, BLOCK_D
    )

    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    tl.store(p_out + o_q, b_out, mask=(o_m < q_len)[:, None])
    tl.store(p_lse + i_h * q_len + o_m, (b_m + tl.log2(b_l)) * LN_2, mask=o_m < q_len)
    if COUNT_TILES:
        p_counts += (i_h * tl.num_programs(0) + i_m) * 2
        tl.store(p_counts, n_left + n_right)
        tl.store(p_counts + 1, n_full)


@triton.jit
def attend(
    b_q, b_m, b_l, b_acc, p_k, p_v, o_d, start, stop, first, last, kv_len, unit,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Let the tiles of keys in [first, last) pass by. Answers the new state, and how many they were."""
    n_tiles = 0
    for n in range(first, last, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        o_kv = o_n[:, None] * BLOCK_D + o_d[None, :]
        if MASKED:
            m_keys = (o_n < kv_len)[:, None]
            b_k, b_v = tl.load(p_k + o_kv, mask=m_keys, other=0.0), tl.load(p_v + o_kv, mask=m_keys, other=0.0)
        else:
            b_k, b_v = tl.load(p_k + o_kv), tl.load(p_v + o_kv)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * unit
        if MASKED:
            b_s = tl.where((o_n[None, :] >= start[:, None]) & (o_n[None, :] < stop[:, None]), b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN: subtract 0 there.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        rescale = tl.exp2(b_m - pivot)
        b_p = tl.exp2(b_s - pivot[:, None])
        b_l = (b_l * rescale + tl.sum(b_p, 1)).to(tl.float16).to(tl.float32)
        b_acc = b_acc * rescale[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        b_m = m_new
        n_tiles += 1
    return b_m, b_l, b_acc, n_tiles


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
    return _launch(q, k, v, left, right, block_m, block_n)[:2]


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
    return _launch(q, k, v, left, right, block_m, block_n, count=True)[2]


def _launch(q, k, v, left, right, block_m, block_n, count=False):
    batch, heads, q_len, head_dim = q.shape
    row_blocks = triton.cdiv(q_len, block_m)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    counts = torch.empty(batch, heads, row_blocks, 2, dtype=torch.int32, device=q.device) if count else None
    masked_kernel[(row_blocks, batch * heads)](
        q, k, v, out, lse, counts, q_len, k.shape[2], left or 0, right or 0, 1 / math.sqrt(head_dim),
        HAS_LEFT=left is not None, HAS_RIGHT=right is not None, COUNT_TILES=count,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=head_dim,
    )  # fmt: skip
    return out, lse, counts
