"""What the warp-specialised kernels must know of a mask given as row intervals, looked up beforehand."""

import triton
import triton.language as tl

from flashlib.kernels.common import key_ranges, load_tile, store_tile


@triton.jit(
    do_not_specialize=[
        "stride_interval",
        "stride_tiles",
        "stride_blanked",
        "batch",
        "entries",
        "kv_heads",
        "q_len",
        "kv_len",
    ]
)
def hopper_prepare(
    p_start, p_stop, p_v, p_tiles, p_blanked, p_flags, stride_interval, stride_tiles, stride_flags, stride_vb,
    stride_vh, stride_vs, stride_bb, stride_bh, stride_bs, batch, entries, kv_heads, q_len, kv_len, v_head_dim,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, CHECK_DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each block of rows, which tiles of keys it needs; for each tile of keys, whether some of them are seen by no row.

    Of a tile with unseen keys a copy of V is made in which they are 0: the forward multiplies whole tiles by weights, and a weight of
    0 does not hide a NaN. For dQ it is K, which is multiplied by dS. Tiles without unseen keys, nearly all as a rule, are not copied.

    Writes int32 ``[B or 1, row blocks, 5 + 4 * BLOCK_M / GROUP]``, the blocks that have most to do first: which block it is, its first
    tile, how many, how many of the last are partial (all, if none is full), how many then are full; and the latter four again for
    each ``GROUP`` of its rows alone. And int32 ``[B or 1, key tiles]``: 1 if the copy must be used.
    """
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    programs = row_blocks + tl.cdiv(kv_len, BLOCK_N)
    i_e, i_block = tl.program_id(0) // programs, tl.program_id(0) % programs
    p_start += i_e.to(tl.int64) * stride_interval
    p_stop += i_e.to(tl.int64) * stride_interval
    if i_block < row_blocks:
        i_m = i_block
        rank = rank_of(p_start, p_stop, i_m, row_blocks, q_len, BLOCK_M, CHUNK)
        p_tiles += (i_e * stride_tiles + rank) * (5 + 4 * (BLOCK_M // GROUP))
        tl.store(p_tiles, i_m)
        o_m = i_m * BLOCK_M + tl.arange(0, WIDTH)  # a power of two, which BLOCK_M need not be
        m_rows = (o_m < q_len) & (o_m < (i_m + 1) * BLOCK_M)
        start = tl.load(p_start + o_m, mask=m_rows, other=0)
        stop = tl.load(p_stop + o_m, mask=m_rows, other=0)
        first, last = count_tiles(p_tiles + 1, start, stop, m_rows, 0, tl.cdiv(kv_len, BLOCK_N), kv_len, BLOCK_N)
        for group in tl.static_range(0, BLOCK_M // GROUP):
            m_group = m_rows & ((o_m - i_m * BLOCK_M) // GROUP == group)
            count_tiles(p_tiles + 5 + group * 4, start, stop, m_group, first, last, kv_len, BLOCK_N)
    else:
        i_n = i_block - row_blocks
        unseen = unseen_keys(p_start, p_stop, i_n * BLOCK_N, q_len, kv_len, BLOCK_N, CHUNK)
        flag = tl.max(unseen.to(tl.int32))
        tl.store(p_flags + i_e * stride_flags + i_n, flag)
        if flag > 0:
            o_n, o_dv = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DV)
            m_keys = (o_n < kv_len) & (unseen == 0)
            p_v += i_e.to(tl.int64) * stride_vb
            p_blanked += i_e.to(tl.int64) * stride_bb
            for _ in range(i_e, batch, entries):
                p_tile, p_copy = p_v, p_blanked
                for _ in range(0, kv_heads):
                    b_v = load_tile(p_tile, o_n, o_dv, stride_vs, m_keys, v_head_dim, True, CHECK_DV)
                    store_tile(p_copy, b_v, o_n, o_dv, stride_bs, kv_len, v_head_dim, CHECK_DV)
                    p_tile += stride_vh
                    p_copy += stride_bh
                p_v += tl.cast(stride_vb, tl.int64) * entries
                p_blanked += tl.cast(stride_bb, tl.int64) * entries


@triton.jit(do_not_specialize=["stride_interval", "stride_flags", "batch", "entries", "q_heads", "q_len"])
def hopper_blank_rows(
    p_start, p_stop, p_q, p_do, p_blank_q, p_blank_do, p_flags, stride_interval, stride_flags, stride_qb, stride_qh,
    stride_qs, stride_gb, stride_gh, stride_gs, stride_bqb, stride_bqh, stride_bqs, stride_bgb, stride_bgh, stride_bgs,
    batch, entries, q_heads, q_len, head_dim, v_head_dim, BLOCK_M: tl.constexpr, CHECK_D: tl.constexpr,
    CHECK_DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """For each tile of rows, whether some of them see nothing. Of such a tile copies of Q and dO are made in which those are 0.

    dK and dV multiply whole tiles of Q and dO by weights, and a weight of 0 does not hide a NaN. Writes int32 ``[B or 1, row tiles]``: 1
    if the copies must be used.
    """
    i_e, i_m = tl.program_id(0) // tl.cdiv(q_len, BLOCK_M), tl.program_id(0) % tl.cdiv(q_len, BLOCK_M)
    p_start += i_e.to(tl.int64) * stride_interval
    p_stop += i_e.to(tl.int64) * stride_interval
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    start = tl.load(p_start + o_m, mask=o_m < q_len, other=0)
    stop = tl.load(p_stop + o_m, mask=o_m < q_len, other=1)
    sees = start < stop
    flag = tl.max((~sees).to(tl.int32))
    tl.store(p_flags + i_e * stride_flags + i_m, flag)
    if flag > 0:
        for i in range(0, tl.cdiv(batch - i_e, entries) * q_heads):
            i_b, i_h = (i_e + i // q_heads * entries).to(tl.int64), (i % q_heads).to(tl.int64)
            p_q_head, p_blank_q_head = (
                p_q + i_b * stride_qb + i_h * stride_qh,
                p_blank_q + i_b * stride_bqb + i_h * stride_bqh,
            )
            p_do_head, p_blank_do_head = (
                p_do + i_b * stride_gb + i_h * stride_gh,
                p_blank_do + i_b * stride_bgb + i_h * stride_bgh,
            )
            b_q = load_tile(p_q_head, o_m, o_d, stride_qs, sees & (o_m < q_len), head_dim, True, CHECK_D)
            store_tile(p_blank_q_head, b_q, o_m, o_d, stride_bqs, q_len, head_dim, CHECK_D)
            b_do = load_tile(p_do_head, o_m, o_dv, stride_gs, sees & (o_m < q_len), v_head_dim, True, CHECK_DV)
            store_tile(p_blank_do_head, b_do, o_m, o_dv, stride_bgs, q_len, v_head_dim, CHECK_DV)


@triton.jit
def span(p_start, p_stop, i_m, m_blocks, q_len, BLOCK_M: tl.constexpr):
    """About how many keys blocks of rows need: from the intervals of their first and their last rows."""
    first, last = i_m * BLOCK_M, tl.minimum((i_m + 1) * BLOCK_M, q_len) - 1
    start = tl.minimum(
        tl.load(p_start + first, mask=m_blocks, other=0), tl.load(p_start + last, mask=m_blocks, other=0)
    )
    stop = tl.maximum(tl.load(p_stop + first, mask=m_blocks, other=0), tl.load(p_stop + last, mask=m_blocks, other=0))
    return stop - start


@triton.jit
def rank_of(p_start, p_stop, i_m, row_blocks, q_len, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """How many blocks of rows have more to do than this one; of equals, the later comes first."""
    mine = span(p_start, p_stop, i_m, True, q_len, BLOCK_M)
    rank = 0
    for m in range(0, row_blocks, CHUNK):
        o_m = m + tl.arange(0, CHUNK)
        theirs = span(p_start, p_stop, o_m, o_m < row_blocks, q_len, BLOCK_M)
        ahead = (o_m < row_blocks) & ((theirs > mine) | ((theirs == mine) & (o_m > i_m)))
        rank += tl.sum(ahead.to(tl.int32))
    return rank


@triton.jit
def count_tiles(p_tiles, start, stop, m_rows, least, most, kv_len, BLOCK_N: tl.constexpr):
    """Four numbers for some rows, whose tiles lie in ``least .. most - 1``; returns the first tile and one past the last.

    At least one tile is visited, so that rows that see nothing need no code of their own.
    """
    ranges = key_ranges(start, stop, m_rows, kv_len, BLOCK_N)
    first, full_first = ranges.first // BLOCK_N, ranges.full_first // BLOCK_N
    full_last, last = ranges.full_last // BLOCK_N, ranges.last // BLOCK_N
    first = tl.maximum(tl.minimum(first, tl.minimum(last, most) - 1), least)
    last = tl.maximum(tl.minimum(last, most), first + 1)
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    full_last = tl.minimum(tl.maximum(full_last, full_first), last)
    full = full_last - full_first
    tl.store(p_tiles, first)
    tl.store(p_tiles + 1, last - first)
    tl.store(p_tiles + 2, tl.where(full > 0, last - full_last, last - first))
    tl.store(p_tiles + 3, full)
    return first, last


@triton.jit
def unseen_keys(p_start, p_stop, n, q_len, kv_len, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """Which keys of a tile no row sees, int32 ``[BLOCK_N]``. As a rule one row near the diagonal sees them all, and the search ends
    there; where sequences meet within the tile, a few rows do."""
    end = tl.minimum(n + BLOCK_N, kv_len)
    o_n = n + tl.arange(0, BLOCK_N)
    unseen = (o_n < kv_len).to(tl.int32)
    chunks = tl.cdiv(q_len, CHUNK)
    first = (n.to(tl.int64) * q_len // kv_len).to(tl.int32) // CHUNK
    left = chunks
    while left > 0:
        o_m = (first + left) % chunks * CHUNK + tl.arange(0, CHUNK)
        start = tl.load(p_start + o_m, mask=o_m < q_len, other=0)
        stop = tl.load(p_stop + o_m, mask=o_m < q_len, other=0)
        left -= 1
        if tl.max(((start <= n) & (stop >= end)).to(tl.int32)) > 0:
            unseen = tl.zeros_like(unseen)
            left = 0
        elif tl.max(((start < end) & (stop > n)).to(tl.int32)) > 0:
            unseen = unseen & unseen_by(start, stop, n, BLOCK_N)
            left = tl.where(tl.max(unseen) > 0, left, 0)
    return unseen


@triton.jit
def unseen_by(start, stop, n, BLOCK_N: tl.constexpr):
    """Which keys of a tile no row of one chunk sees. At each key, the rows that begin to see are counted, less those that cease; summed
    from the left, that is how many see it. A row costs the same however many keys there are."""
    begins = tl.minimum(tl.maximum(start - n, 0), BLOCK_N)
    ceases = tl.minimum(tl.maximum(stop - n, begins), BLOCK_N)  # a row that sees nothing ceases where it begins
    seeing = tl.histogram(begins, BLOCK_N, mask=begins < BLOCK_N) - tl.histogram(ceases, BLOCK_N, mask=ceases < BLOCK_N)
    return (tl.cumsum(seeing, 0) == 0).to(tl.int32)
