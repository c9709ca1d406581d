"""Pieces that the warp-specialised kernels share. Of :mod:`flashlib.kernels.common` they take only the constants: its functions are
Triton's and cannot be called from Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashlib.kernels.bundles import Problem
from flashlib.kernels.common import BAND, INTERVALS

ROWS = gl.constexpr(64)  # of one consumer, or keys: what one warpgroup's instruction takes


@gluon.jit
def of_entry(problem, i_b, stride_interval):
    """The same problem, with the row intervals of one batch entry."""
    p_start, p_stop = problem.p_start, problem.p_stop
    if problem.MASK == INTERVALS:
        p_start += i_b.to(gl.int64) * stride_interval
        p_stop += i_b.to(gl.int64) * stride_interval
    return Problem(
        q_len=problem.q_len, kv_len=problem.kv_len, offset=problem.offset, left=problem.left, right=problem.right,
        p_start=p_start, p_stop=p_stop, scale=problem.scale, softcap=problem.softcap, MASK=problem.MASK,
        HAS_LEFT=problem.HAS_LEFT, HAS_RIGHT=problem.HAS_RIGHT, SOFTCAP=problem.SOFTCAP, ALIBI=problem.ALIBI,
    )  # fmt: skip


@gluon.jit
def place(block, blocks, heads, heads_together):
    """Which block of rows, or of keys, comes when: ``(head, rank among the blocks of that head)``, most work first.

    ``heads_together`` heads, as many as have room for what passes by in the cache between memory and multiprocessors, are worked on
    together, and of all their blocks the longest come first.
    """
    before = block // (heads_together * blocks) * heads_together
    rest = block % (heads_together * blocks)
    together = gl.minimum(heads_together, heads - before)
    return before + rest % together, rest // together


@gluon.jit
def key_tiles(i_b, rank, row_blocks, problem, p_tiles, stride_tiles, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Which block of rows this is, and which tiles of keys it needs: the first, how many, how many of the last are partial (all of
    them, if none is full), how many then are full.

    At least one tile is visited, so that rows that see nothing need no code of their own. For row intervals ``hopper_prepare`` has
    looked all this up. Otherwise the last rows have most to do.
    """
    if problem.MASK == INTERVALS:
        p_tiles += (i_b * stride_tiles + rank) * (5 + 4 * (BLOCK_M // ROWS))
        i_m, first, n_tiles = gl.load(p_tiles), gl.load(p_tiles + 1), gl.load(p_tiles + 2)
        right_partial, full = gl.load(p_tiles + 3), gl.load(p_tiles + 4)
    else:
        i_m = row_blocks - 1 - rank
        row = i_m * BLOCK_M
        last_row = gl.minimum(row + BLOCK_M, problem.q_len) - 1
        start, latest_start = 0, 0
        stop, earliest_stop = problem.kv_len, problem.kv_len
        if problem.MASK == BAND:
            if problem.HAS_LEFT:
                start = gl.maximum(row + problem.offset - problem.left, 0)
                latest_start = gl.maximum(last_row + problem.offset - problem.left, 0)
            if problem.HAS_RIGHT:
                stop = gl.maximum(gl.minimum(last_row + problem.offset + problem.right + 1, problem.kv_len), 0)
                earliest_stop = gl.maximum(gl.minimum(row + problem.offset + problem.right + 1, problem.kv_len), 0)
        last = (stop + BLOCK_N - 1) // BLOCK_N
        first = gl.minimum(start // BLOCK_N, gl.maximum(last - 1, 0))
        n_tiles = gl.maximum(last - first, 1)
        full_first = gl.minimum(gl.maximum((latest_start + BLOCK_N - 1) // BLOCK_N, first), first + n_tiles)
        full_last = gl.minimum(gl.maximum(earliest_stop // BLOCK_N, full_first), first + n_tiles)
        full = full_last - full_first
        right_partial = first + n_tiles - full_last if full > 0 else n_tiles
    return i_m, first, n_tiles, right_partial, full


@gluon.jit
def note(smem_plan, slot, number):
    """Write a number where the other warps read it."""
    smem_plan.index(slot).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + number)


@gluon.jit
def noted(smem_plan, slot):
    """What :func:`note` wrote."""
    return gl.max(smem_plan.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    """Weights rounded to 16 bits, two columns to an int32. Carried from one turn to the next as single 16-bit numbers, they would be
    taken apart and put together again, 64 instructions of 500."""
    even, odd = b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]).split()
    convert: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(convert, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(packed, dtype: gl.constexpr, layout: gl.constexpr):
    """What ``pack`` made, as the first operand of the next product."""
    even = packed.to(gl.int16).to(dtype, bitcast=True)
    odd = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    b_p = gl.join(even, odd).reshape([packed.shape[0], 2 * packed.shape[1]])
    return gl.convert_layout(b_p, gl.DotOperandLayout(0, layout, 2), assert_trivial=True)
