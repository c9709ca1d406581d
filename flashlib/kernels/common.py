"""Pieces that the attention kernels share: which keys a row sees, which tiles that leaves, scores, and loading a tile.

Names: ``i_`` an index of a program, ``o_`` offsets within a tile, ``m_`` boolean masks, ``p_`` pointers, ``b_`` tiles in
registers. Sizes in capitals are compile-time constants. What travels together is in :mod:`flashlib.kernels.bundles`.
"""

import triton
import triton.language as tl

from flashlib.kernels.bundles import Ranges

# How a kernel learns which keys a row sees. Every mask of flashlib.masks is one of these.
UNMASKED = tl.constexpr(0)  # all of them
BAND = tl.constexpr(1)  # i + offset - left .. i + offset + right, from three numbers
INTERVALS = tl.constexpr(2)  # start[i] .. stop[i] - 1, from two integers per row

# How it learns the slopes of ALiBi; 0 without.
BY_HEAD = tl.constexpr(1)  # one for each head, and one offset for all rows
BY_ROW = tl.constexpr(2)  # both for each row

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_intervals(o_rows, problem):
    """First visible key, and one past the last, of each row: int32 ``[rows]``. A row past the end sees nothing."""
    m_rows = o_rows < problem.q_len
    start = tl.zeros_like(o_rows)
    stop = tl.zeros_like(o_rows) + problem.kv_len
    if problem.MASK == INTERVALS:
        start = tl.load(problem.p_start + o_rows, mask=m_rows, other=0)
        stop = tl.load(problem.p_stop + o_rows, mask=m_rows, other=0)
    if problem.MASK == BAND:
        if problem.HAS_LEFT:
            start = tl.maximum(start, o_rows + problem.offset - problem.left)
        if problem.HAS_RIGHT:
            stop = tl.minimum(stop, o_rows + problem.offset + problem.right + 1)
    return start, tl.where(m_rows, stop, start)


@triton.jit
def key_ranges(start, stop, m_rows, kv_len, BLOCK_N: tl.constexpr):
    """Where a tile of rows meets the keys, in whole tiles of ``BLOCK_N``.

    Tiles in [first, last) may hold a visible pair, those in [full_first, full_last) hold nothing else. Everything outside
    [first, last) is skipped. Rows that see nothing bound neither range, but with one of them no tile is full.
    """
    sees = m_rows & (start < stop)
    first = tl.min(tl.where(sees, start, kv_len))
    last = tl.max(tl.where(sees, stop, 0))
    full_first = tl.max(tl.where(m_rows, start, 0))
    full_last = tl.min(tl.where(m_rows, tl.maximum(stop, start), kv_len))
    full_last = tl.where(tl.max((m_rows & (start >= stop)).to(tl.int32)) > 0, 0, full_last)
    first = first // BLOCK_N * BLOCK_N
    last = tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, tl.cdiv(kv_len, BLOCK_N) * BLOCK_N)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK_N) * BLOCK_N, first), last)
    full_last = tl.minimum(tl.maximum(full_last // BLOCK_N * BLOCK_N, full_first), last)
    return Ranges(first=first, full_first=full_first, full_last=full_last, last=tl.maximum(last, first))


@triton.jit
def seen_range(start, stop, kv_len):
    """The first key that a tile of rows sees, and one past the last.

    Under a band they see each key between. Row intervals may leave gaps.
    """
    m_rows = start < stop
    return tl.min(tl.where(m_rows, start, kv_len)), tl.max(tl.where(m_rows, stop, 0))


@triton.jit
def visits(ranges, PARTIAL: tl.constexpr):
    """The range of a loop over the partial tiles of [first, last), or over the full ones. :func:`place` says where each lies."""
    if PARTIAL:
        return ranges.first, ranges.last - (ranges.full_last - ranges.full_first)
    else:
        return ranges.full_first, ranges.full_last


@triton.jit
def place(at, ranges, PARTIAL: tl.constexpr):
    """Where the tile visited at ``at`` begins. The partial tiles lie on both sides of the full ones, which are jumped over."""
    if PARTIAL:
        return at + tl.where(at < ranges.full_first, 0, ranges.full_last - ranges.full_first)
    else:
        return at


@triton.jit
def load_tile(p_base, o_rows, o_cols, stride_row, m_rows, n_cols, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """A tile ``[rows, cols]`` of a matrix, 0 where ``m_rows`` is False and beyond the last column, neither of which is read.

    Checks cost instructions: CHECK_ROWS and CHECK_COLS only where they can matter (:func:`tile_at` says what CHECK_COLS counts).
    """
    p_tile, m_cols = tile_at(p_base, o_rows, o_cols, stride_row, n_cols, CHECK_COLS)
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(p_tile, mask=m_rows[:, None] & m_cols, other=0.0)
    elif CHECK_ROWS:
        return tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    elif CHECK_COLS:
        return tl.load(p_tile, mask=m_cols, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store_tile(p_base, b_tile, o_rows, o_cols, stride_row, n_rows, n_cols, CHECK_COLS: tl.constexpr):
    """Write a tile whose columns are contiguous, inside the matrix's edges."""
    p_tile, m_cols = tile_at(p_base, o_rows, o_cols, stride_row, n_cols, CHECK_COLS)
    m_tile = o_rows[:, None] < n_rows
    if CHECK_COLS:
        m_tile = m_tile & m_cols
    tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def tile_at(p_base, o_rows, o_cols, stride_row, n_cols, CHECK_COLS: tl.constexpr):
    """Pointers to a tile, and which of its columns lie inside the matrix.

    CHECK_COLS is 0 where all do. Otherwise rows begin, and the matrix ends, at multiples of so many columns. Triton finds that out for
    itself only for multiples of 16; told so, it moves that many columns at once.
    """
    p_tile = p_base + o_rows.to(tl.int64)[:, None] * stride_row + o_cols[None, :]
    m_cols = o_cols[None, :] < n_cols
    if CHECK_COLS:
        p_tile = tl.multiple_of(p_tile, (1, CHECK_COLS * (p_base.dtype.element_ty.primitive_bitwidth // 8)))
        m_cols = tl.max_constancy(m_cols, (1, CHECK_COLS))
    return p_tile, m_cols


@triton.jit
def add_product(b_acc, b_left, b_right, PRECISION: tl.constexpr):
    """``b_acc + b_left @ b_right``, the product first.

    In fp32 without tensor cores a product is a chain of multiply-adds. Begun at ``b_acc``, it would round once for each key or row of
    the whole problem, at the size of the whole sum; begun at 0, once for each tile at that size. The compiler folds an addition into
    the chain, and it does not fold a multiply-add.
    """
    if b_left.dtype == tl.float32 and PRECISION == "ieee":
        b_product = tl.dot(b_left, b_right, input_precision=PRECISION)
        return tl.fma(b_product, tl.full(b_product.shape, 1.0, tl.float32), b_acc)
    else:
        return tl.dot(b_left, b_right, b_acc, input_precision=PRECISION)


@triton.jit
def score_unit(problem):
    """What one unit of a score tile is worth. Tiles hold raw products, so that the factor joins the exp2's multiply-add."""
    if problem.SOFTCAP:
        return problem.softcap
    else:
        return problem.scale


@triton.jit
def cap(b_s, problem):
    """Raw products QK^T in the units of :func:`score_unit`: as they are, or squashed by the softcap."""
    if problem.SOFTCAP:
        return tanh(b_s * (problem.scale / problem.softcap))
    else:
        return b_s


@triton.jit
def alibi_slope(p_slopes, at, problem):
    """The slope of one head, in score units; where each row has its own, :func:`alibi_rows` loads them."""
    if problem.ALIBI == BY_HEAD:
        return tl.load(p_slopes + at) / score_unit(problem)
    else:
        return 0.0


@triton.jit
def alibi_rows(slopes, o_rows, problem):
    """Slope and offset of each row, shaped as ``o_rows``; or those of the head, which serve for all rows."""
    if problem.ALIBI == BY_ROW:
        m_rows = o_rows < problem.q_len
        slope = tl.load(slopes.p_slopes + slopes.at + o_rows, mask=m_rows, other=0.0) / score_unit(problem)
        return slope, tl.load(slopes.p_offsets + o_rows, mask=m_rows, other=0)
    else:
        return slopes.slope, slopes.offset


@triton.jit
def add_alibi(b_s, slope, o_rows, o_keys, offset, problem):
    """Take ``slope * |row + offset - key|`` from each score. All of them broadcast to the tile."""
    if problem.ALIBI:
        return b_s - slope * tl.abs(o_rows + offset - o_keys).to(tl.float32)
    else:
        return b_s


@triton.jit
def kept_pairs(dropout, o_rows, first_key, BLOCK_N: tl.constexpr):
    """Which pairs of a tile dropout keeps, bool ``[rows, BLOCK_N]``: the numbers of :mod:`flashlib.dropout`.

    One Philox call gives four numbers, for four neighbouring keys; so ``first_key`` must be a multiple of 4.
    ``drop_below`` is :func:`flashlib.dropout.threshold`, its 32 bits read as a signed integer.
    """
    o_quads = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    c0 = o_quads[None, :] + tl.zeros_like(o_rows)[:, None]
    c1, c2 = o_rows[:, None] + tl.zeros_like(c0), dropout.i_head + tl.zeros_like(c0)
    r0, r1, r2, r3 = tl.philox(tl.load(dropout.p_seed), c0, c1, c2, tl.zeros_like(c0))
    least = dropout.drop_below.to(tl.uint32, bitcast=True)
    # Each join adds a dimension behind all others, of 2; the last dimension runs fastest: 0 1 2 3.
    even, odd = tl.join(r0 >= least, r2 >= least), tl.join(r1 >= least, r3 >= least)
    return tl.reshape(tl.join(even, odd), (o_rows.shape[0], BLOCK_N))


@triton.jit
def tanh(x):
    """Hyperbolic tangent to fp32 precision: Lambert's continued fraction, cut after seven terms, near 0, and exp2 beyond.

    1 - 2 / (e^2x + 1) is exact at both ends, but near 0 it subtracts two numbers close to 1, and a softcap of 30 makes 30 of that
    error.
    """
    square = x * x
    near = x * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    near = near / (135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0)))
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(square < 1.0, near, far)
