"""FlashAttention backward in Triton (Dao 2023, arXiv 2307.08691, algorithm 2), without atomics: the same bits every time.

The probabilities are recomputed from the saved LSE. Three kernels:

* ``backward_delta``: delta = rowsum(dO * O) - dLSE and the LSE in base 2, once per row.
* ``backward_dkdv``: one program owns ``BLOCK_N`` keys of one KV head and lets all rows of its query heads pass by.
* ``backward_dq``: one program owns ``BLOCK_M`` rows and lets the keys pass by, as the forward does.

Each gradient is summed by a single program in a fixed order. The price is that S and dP are computed twice, seven matrix
products where one kernel adding into dQ by atomics would need five. A mask given as row intervals needs a fourth kernel,
``backward_row_ranges``: which rows see a block of keys is not written anywhere and must be looked up.
"""

import triton
import triton.language as tl

from flashlib.kernels.bundles import Dropout, Keys, PassingRows, Problem, Ranges, Rows, Shape, Slopes
from flashlib.kernels.common import (
    BAND,
    BY_ROW,
    INTERVALS,
    LOG2_E,
    add_alibi,
    add_product,
    alibi_rows,
    alibi_slope,
    cap,
    kept_pairs,
    key_ranges,
    load_tile,
    place,
    row_intervals,
    score_unit,
    seen_range,
    store_tile,
    visits,
)


@triton.jit(do_not_specialize=["q_heads", "q_len"])
def backward_delta(
    p_out, p_do, p_lse, p_dlse, p_lse2, p_delta, stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs,
    stride_row, q_heads, q_len, v_head_dim, CHECK_DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Two numbers per row, fp32 ``[B, Hq, stride_row]``: delta = rowsum(dO * O) - dLSE, and the LSE in base 2.

    Both are 0 from row ``q_len`` to ``stride_row``, a multiple of every tile, so that the other kernels load them unchecked.
    """
    row_blocks = stride_row // BLOCK_M
    i_head, i_m = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    i_b, i_h = i_head // q_heads, i_head % q_heads
    p_out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    p_do += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    row, padded_row = i_head.to(tl.int64) * q_len, i_head.to(tl.int64) * stride_row
    o_m, o_dv = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    b_out = load_tile(p_out, o_m, o_dv, stride_os, o_m < q_len, v_head_dim, True, CHECK_DV).to(tl.float32)
    b_do = load_tile(p_do, o_m, o_dv, stride_gs, o_m < q_len, v_head_dim, True, CHECK_DV).to(tl.float32)
    b_delta = tl.sum(b_out * b_do, 1)
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + row + o_m, mask=o_m < q_len, other=0.0)
    tl.store(p_delta + padded_row + o_m, b_delta)
    tl.store(p_lse2 + padded_row + o_m, tl.load(p_lse + row + o_m, mask=o_m < q_len, other=0.0) * LOG2_E)


@triton.jit(do_not_specialize=["stride_interval", "q_len", "kv_len"])
def backward_row_ranges(
    p_start, p_stop, p_ranges, stride_interval, q_len, kv_len, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):
    """Which rows see each block of keys, ``(first, full_first, full_last, last)``: int32 ``[B or 1, blocks, 4]``.

    Rows outside [first, last) see none of its keys; rows in [full_first, full_last) see all of them. The latter is one run
    of rows. If there are more runs, as arbitrary intervals may have, those behind the first are treated as partial.
    """
    key_blocks = tl.cdiv(kv_len, BLOCK_N)
    i_n, i_b = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    p_start += i_b.to(tl.int64) * stride_interval
    p_stop += i_b.to(tl.int64) * stride_interval
    n, end = i_n * BLOCK_N, tl.minimum((i_n + 1) * BLOCK_N, kv_len)
    first = q_len
    last = 0
    full_first = q_len
    for m in range(0, q_len, CHUNK):
        o_m = m + tl.arange(0, CHUNK)
        start = tl.load(p_start + o_m, mask=o_m < q_len, other=0)
        stop = tl.load(p_stop + o_m, mask=o_m < q_len, other=0)
        sees = (start < stop) & (start < end) & (stop > n)
        first = tl.minimum(first, tl.min(tl.where(sees, o_m, q_len)))
        last = tl.maximum(last, tl.max(tl.where(sees, o_m + 1, 0)))
        full_first = tl.minimum(full_first, tl.min(tl.where((start <= n) & (stop >= end), o_m, q_len)))
    full_last = q_len
    for m in range(full_first // CHUNK * CHUNK, q_len, CHUNK):
        o_m = m + tl.arange(0, CHUNK)
        start = tl.load(p_start + o_m, mask=o_m < q_len, other=0)
        stop = tl.load(p_stop + o_m, mask=o_m < q_len, other=0)
        ends = (o_m > full_first) & ((start > n) | (stop < end))
        full_last = tl.minimum(full_last, tl.min(tl.where(ends, o_m, q_len)))
    p_range = p_ranges + tl.program_id(0) * 4
    tl.store(p_range, first)
    tl.store(p_range + 1, full_first)
    tl.store(p_range + 2, full_last)
    tl.store(p_range + 3, last)


@triton.jit(
    do_not_specialize=[
        "stride_interval", "stride_slope", "stride_offset", "stride_range", "kv_heads", "q_len", "kv_len", "offset",
        "left", "right", "drop_below",
    ]
)  # fmt: skip
def backward_dkdv(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_start, p_stop, p_ranges, p_slopes, p_offsets, p_seed, stride_qb,
    stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh,
    stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_row, stride_interval,
    stride_slope, stride_offset, stride_range, kv_heads, group_size, q_len, kv_len, offset, left, right, scale, softcap,
    drop_below, keep_factor, head_dim, v_head_dim, CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys: every row of every query head of the group passes by, in a fixed order."""
    key_blocks = tl.cdiv(kv_len, BLOCK_N)
    i_head, i_n = tl.program_id(0) // key_blocks, tl.program_id(0) % key_blocks
    i_b, i_kv = i_head // kv_heads, i_head % kv_heads
    p_k += i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh
    p_v += i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh
    if MASK == INTERVALS:
        p_start += i_b.to(tl.int64) * stride_interval
        p_stop += i_b.to(tl.int64) * stride_interval
        p_ranges += i_b * stride_range + i_n * 4
    if ALIBI == BY_ROW:
        p_offsets += i_b.to(tl.int64) * stride_offset
    problem = Problem(
        q_len=q_len, kv_len=kv_len, offset=offset, left=left, right=right, p_start=p_start, p_stop=p_stop, scale=scale,
        softcap=softcap, MASK=MASK, HAS_LEFT=HAS_LEFT, HAS_RIGHT=HAS_RIGHT, SOFTCAP=SOFTCAP, ALIBI=ALIBI,
    )  # fmt: skip
    shape = Shape(
        head_dim=head_dim, v_head_dim=v_head_dim, CHECK_D=CHECK_D, CHECK_DV=CHECK_DV, BLOCK_D=BLOCK_D,
        BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip

    n = i_n * BLOCK_N
    o_n, o_d, o_dv = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_k = load_tile(p_k, o_n, o_d, stride_ks, o_n < kv_len, head_dim, True, CHECK_D)
    b_v = load_tile(p_v, o_n, o_dv, stride_vs, o_n < kv_len, v_head_dim, True, CHECK_DV)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    ranges = row_ranges(n, problem, p_ranges, BLOCK_M, BLOCK_N)
    for g in range(group_size):
        i_h = i_kv * group_size + g
        i_q_head = i_b * kv_heads * group_size + i_h
        row = i_q_head.to(tl.int64) * stride_row
        p_qh = p_q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
        p_doh = p_do + i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
        slope = alibi_slope(p_slopes, i_b * stride_slope + i_h, problem)
        slopes_at = i_b.to(tl.int64) * stride_slope + i_h.to(tl.int64) * q_len
        rows = PassingRows(
            p_q=p_qh, p_do=p_doh, p_lse=p_lse + row, p_delta=p_delta + row, stride_qs=stride_qs, stride_gs=stride_gs
        )
        slopes = Slopes(slope=slope, offset=offset, p_slopes=p_slopes, p_offsets=p_offsets, at=slopes_at)
        dropout = Dropout(
            p_seed=p_seed, drop_below=drop_below, keep_factor=keep_factor, i_head=i_q_head, DROPOUT=DROPOUT
        )
        b_dk, b_dv = gather_rows(b_dk, b_dv, b_k, b_v, n, rows, slopes, ranges, problem, dropout, shape, False)
        b_dk, b_dv = gather_rows(b_dk, b_dv, b_k, b_v, n, rows, slopes, ranges, problem, dropout, shape, True)

    p_dk += i_b.to(tl.int64) * stride_dkb + i_kv.to(tl.int64) * stride_dkh
    p_dv += i_b.to(tl.int64) * stride_dvb + i_kv.to(tl.int64) * stride_dvh
    store_tile(p_dk, b_dk * scale, o_n, o_d, stride_dks, kv_len, head_dim, CHECK_D)
    if DROPOUT:
        b_dv = b_dv * keep_factor
    store_tile(p_dv, b_dv, o_n, o_dv, stride_dvs, kv_len, v_head_dim, CHECK_DV)


@triton.jit
def row_ranges(n, problem, p_ranges, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which rows see the keys ``n .. n + BLOCK_N - 1``, in whole tiles."""
    first, last = 0, problem.q_len
    full_first, full_last = 0, problem.q_len
    end = tl.minimum(n + BLOCK_N, problem.kv_len)
    if problem.MASK == INTERVALS:
        first, full_first = tl.load(p_ranges), tl.load(p_ranges + 1)
        full_last, last = tl.load(p_ranges + 2), tl.load(p_ranges + 3)
    if problem.MASK == BAND:
        if problem.HAS_RIGHT:
            first = tl.maximum(first, n - problem.offset - problem.right)
            full_first = tl.maximum(full_first, end - 1 - problem.offset - problem.right)
        if problem.HAS_LEFT:
            last = tl.minimum(last, end - problem.offset + problem.left)
            full_last = tl.minimum(full_last, n - problem.offset + problem.left + 1)
    first = first // BLOCK_M * BLOCK_M
    last = tl.maximum(tl.cdiv(tl.maximum(last, 0), BLOCK_M) * BLOCK_M, first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK_M) * BLOCK_M, first), last)
    # floor, also below 0: a tile is full only if all of its rows are
    full_last = tl.minimum(tl.maximum(tl.maximum(full_last, 0) // BLOCK_M * BLOCK_M, full_first), last)
    return Ranges(first=first, full_first=full_first, full_last=full_last, last=last)


@triton.jit
def gather_rows(b_dk, b_dv, b_k, b_v, n, rows, slopes, ranges, problem, dropout, shape, MASKED: tl.constexpr):
    """Add what the partial tiles of rows (MASKED), or the full ones, of one head give to dK and dV of these keys.

    Score tiles are transposed: keys first.
    """
    o_n, o_d, o_dv = n + tl.arange(0, shape.BLOCK_N), tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    unit = score_unit(problem) * LOG2_E
    from_row, to_row = visits(ranges, MASKED)
    # What is computed ahead of a loop occupies registers throughout it, and there are none to spare.
    for at in tl.range(from_row, to_row, shape.BLOCK_M, disable_licm=True):
        o_m = place(at, ranges, MASKED) + tl.arange(0, shape.BLOCK_M)
        start, stop, m_rows = 0, 0, True
        if MASKED:
            # Rows that see nothing at all are not read: a weight of 0 would not hide a NaN.
            start, stop = row_intervals(o_m, problem)
            m_rows = start < stop
        # q [BLOCK_M, BLOCK_D], dO [BLOCK_M, BLOCK_DV], s and everything after it [BLOCK_N, BLOCK_M]
        b_q = load_tile(rows.p_q, o_m, o_d, rows.stride_qs, m_rows, shape.head_dim, MASKED, shape.CHECK_D)
        b_do = load_tile(rows.p_do, o_m, o_dv, rows.stride_gs, m_rows, shape.v_head_dim, MASKED, shape.CHECK_DV)
        b_t = cap(tl.dot(b_k, tl.trans(b_q), input_precision=shape.PRECISION), problem)
        b_lse = tl.load(rows.p_lse + o_m)
        slope, offset = alibi_rows(slopes, o_m[None, :], problem)
        b_s = add_alibi(b_t, slope, o_m[None, :], o_n[:, None], offset, problem)
        if MASKED:
            m_pairs = (o_n[:, None] >= start[None, :]) & (o_n[:, None] < stop[None, :])
            b_p = tl.where(m_pairs, tl.exp2(b_s * unit - b_lse[None, :]), 0.0)
        else:
            b_p = tl.exp2(b_s * unit - b_lse[None, :])
        if dropout.DROPOUT:
            m_kept = tl.trans(kept_pairs(dropout, o_m, n, shape.BLOCK_N))
            b_dv = add_product(b_dv, tl.where(m_kept, b_p, 0.0).to(b_do.dtype), b_do, shape.PRECISION)
        else:
            b_dv = add_product(b_dv, b_p.to(b_do.dtype), b_do, shape.PRECISION)
        b_slope = softcap_slope(b_p, b_t, problem)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=shape.PRECISION)
        if dropout.DROPOUT:
            b_dp = tl.where(m_kept, b_dp * dropout.keep_factor, 0.0)
        b_delta = tl.load(rows.p_delta + o_m)
        b_ds = b_slope * (b_dp - b_delta[None, :])
        if MASKED:
            b_ds = tl.where(b_slope > 0.0, b_ds, 0.0)  # dP may be NaN where a pair is hidden
        b_dk = add_product(b_dk, b_ds.to(b_q.dtype), b_q, shape.PRECISION)
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=[
        "stride_interval", "stride_slope", "stride_offset", "q_heads", "group_size", "q_len", "kv_len", "offset",
        "left", "right", "drop_below",
    ]
)  # fmt: skip
def backward_dq(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, p_start, p_stop, p_slopes, p_offsets, p_seed, stride_qb, stride_qh,
    stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs,
    stride_dqb, stride_dqh, stride_dqs, stride_row, stride_interval, stride_slope, stride_offset, q_heads, group_size,
    q_len, kv_len, offset, left, right, scale, softcap, drop_below, keep_factor, head_dim, v_head_dim,
    CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one block of rows: the keys pass by as in the forward."""
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    i_head = tl.program_id(0) // row_blocks
    i_m = row_blocks - 1 - tl.program_id(0) % row_blocks
    i_b, i_h = i_head // q_heads, i_head % q_heads
    i_kv = i_h // group_size
    p_q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_k += i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh
    p_v += i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh
    p_do += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    if MASK == INTERVALS:
        p_start += i_b.to(tl.int64) * stride_interval
        p_stop += i_b.to(tl.int64) * stride_interval
    if ALIBI == BY_ROW:
        p_offsets += i_b.to(tl.int64) * stride_offset
    row = i_head.to(tl.int64) * stride_row
    problem = Problem(
        q_len=q_len, kv_len=kv_len, offset=offset, left=left, right=right, p_start=p_start, p_stop=p_stop, scale=scale,
        softcap=softcap, MASK=MASK, HAS_LEFT=HAS_LEFT, HAS_RIGHT=HAS_RIGHT, SOFTCAP=SOFTCAP, ALIBI=ALIBI,
    )  # fmt: skip
    shape = Shape(
        head_dim=head_dim, v_head_dim=v_head_dim, CHECK_D=CHECK_D, CHECK_DV=CHECK_DV, BLOCK_D=BLOCK_D,
        BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip
    dropout = Dropout(p_seed=p_seed, drop_below=drop_below, keep_factor=keep_factor, i_head=i_head, DROPOUT=DROPOUT)
    keys = Keys(p_k=p_k, p_v=p_v, stride_ks=stride_ks, stride_vs=stride_vs)

    o_m, o_d, o_dv = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    start, stop = row_intervals(o_m, problem)
    ranges = key_ranges(start, stop, o_m < q_len, kv_len, BLOCK_N)
    seen_first, seen_last = seen_range(start, stop, kv_len)
    b_q = load_tile(p_q, o_m, o_d, stride_qs, o_m < q_len, head_dim, True, CHECK_D)
    b_do = load_tile(p_do, o_m, o_dv, stride_gs, o_m < q_len, v_head_dim, True, CHECK_DV)
    b_lse = tl.load(p_lse + row + o_m)
    b_delta = tl.load(p_delta + row + o_m)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slope = alibi_slope(p_slopes, i_b * stride_slope + i_h, problem)
    slopes_at = i_b.to(tl.int64) * stride_slope + i_h.to(tl.int64) * q_len
    slopes = Slopes(slope=slope, offset=offset, p_slopes=p_slopes, p_offsets=p_offsets, at=slopes_at)
    slope, row_offset = alibi_rows(slopes, o_m[:, None], problem)
    rows = Rows(
        o_m=o_m, start=start, stop=stop, seen_first=seen_first, seen_last=seen_last, slope=slope, offset=row_offset
    )
    b_dq = gather_keys(b_dq, b_q, b_do, b_lse, b_delta, rows, keys, ranges, problem, dropout, shape, False)
    b_dq = gather_keys(b_dq, b_q, b_do, b_lse, b_delta, rows, keys, ranges, problem, dropout, shape, True)
    p_dq += i_b.to(tl.int64) * stride_dqb + i_h.to(tl.int64) * stride_dqh
    store_tile(p_dq, b_dq * scale, o_m, o_d, stride_dqs, q_len, head_dim, CHECK_D)


@triton.jit
def gather_keys(b_dq, b_q, b_do, b_lse, b_delta, rows, keys, ranges, problem, dropout, shape, MASKED: tl.constexpr):
    """Add what the partial tiles of keys (MASKED), or the full ones, give to dQ of these rows."""
    o_d, o_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    unit = score_unit(problem) * LOG2_E
    from_key, to_key = visits(ranges, MASKED)
    for at in tl.range(from_key, to_key, shape.BLOCK_N, disable_licm=True):
        n = place(at, ranges, MASKED)
        o_n = n + tl.arange(0, shape.BLOCK_N)
        m_keys = (o_n >= rows.seen_first) & (o_n < rows.seen_last)
        b_k = load_tile(keys.p_k, o_n, o_d, keys.stride_ks, m_keys, shape.head_dim, MASKED, shape.CHECK_D)
        b_v = load_tile(keys.p_v, o_n, o_dv, keys.stride_vs, m_keys, shape.v_head_dim, MASKED, shape.CHECK_DV)
        b_t = cap(tl.dot(b_q, tl.trans(b_k), input_precision=shape.PRECISION), problem)
        b_s = add_alibi(b_t, rows.slope, rows.o_m[:, None], o_n[None, :], rows.offset, problem)
        b_p = tl.exp2(b_s * unit - b_lse[:, None])
        if MASKED:
            m_pairs = (o_n[None, :] >= rows.start[:, None]) & (o_n[None, :] < rows.stop[:, None])
            b_p = tl.where(m_pairs, b_p, 0.0)
        b_slope = softcap_slope(b_p, b_t, problem)
        if dropout.DROPOUT:
            m_kept = kept_pairs(dropout, rows.o_m, n, shape.BLOCK_N)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=shape.PRECISION)
        if dropout.DROPOUT:
            b_dp = tl.where(m_kept, b_dp * dropout.keep_factor, 0.0)
        b_ds = b_slope * (b_dp - b_delta[:, None])
        if MASKED:
            b_ds = tl.where(b_slope > 0.0, b_ds, 0.0)
        if MASKED and problem.MASK == INTERVALS:
            m_seen = tl.max(b_slope, 0) > 0.0
            b_k = tl.where(m_seen[:, None], b_k, 0.0)
        b_dq = add_product(b_dq, b_ds.to(b_k.dtype), b_k, shape.PRECISION)
    return b_dq


@triton.jit
def softcap_slope(b_p, b_t, problem):
    """``P (1 - tanh^2)``, what dP is multiplied by; P itself without a softcap. Taken before dP is there, so that tanh can go."""
    if problem.SOFTCAP:
        return b_p * (1.0 - b_t * b_t)
    else:
        return b_p
