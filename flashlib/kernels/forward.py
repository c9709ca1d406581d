"""FlashAttention forward in Triton (Dao 2023, arXiv 2307.08691, algorithm 1).

One program computes ``BLOCK_M`` rows of one query head. The keys that its rows see fall into three stretches of whole tiles:
partial at the left edge of a window, full in the middle, partial at the right edge. The full ones come first; only the partial
ones pay for mask arithmetic; tiles outside are never loaded. Softmax runs in base 2, since the hardware's exponential does.
"""

import triton
import triton.language as tl

from flashlib.kernels.bundles import Dropout, Keys, Problem, Rows, Shape, Slopes
from flashlib.kernels.common import (
    BY_ROW,
    INTERVALS,
    LN_2,
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


# A kernel is compiled anew for each type of argument, and Triton also tells integers apart by being 1 or a multiple of 16. For
# strides that pays, since it decides how wide a load may be. For the rest it would only compile the same code again.
@triton.jit(
    do_not_specialize=[
        "stride_interval", "stride_slope", "stride_offset", "q_heads", "group_size", "q_len", "kv_len", "offset",
        "left", "right", "drop_below",
    ]
)  # fmt: skip
def attention_forward(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_start,
    p_stop,
    p_slopes,
    p_offsets,
    p_seed,
    p_counts,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_interval,  # from one batch entry's intervals to the next; 0 if they are shared
    stride_slope,  # the same for the slopes
    stride_offset,  # and for the rows' offsets
    q_heads,
    group_size,
    q_len,
    kv_len,
    offset,
    left,
    right,
    scale,
    softcap,
    drop_below,  # pairs whose number is below it, as kept_pairs reads it
    keep_factor,  # what the others are multiplied by
    head_dim,
    v_head_dim,
    CHECK_D: tl.constexpr,
    CHECK_DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    COUNT_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Under a causal mask the last rows have the most keys. They start first, so that no long program is left for the end.
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    i_head = tl.program_id(0) // row_blocks  # of all heads of the batch
    i_m = row_blocks - 1 - tl.program_id(0) % row_blocks
    i_b, i_h = i_head // q_heads, i_head % q_heads
    i_kv = i_h // group_size
    p_q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_k += i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh
    p_v += i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh
    p_out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    p_lse += i_head.to(tl.int64) * q_len
    if MASK == INTERVALS:
        p_start += i_b.to(tl.int64) * stride_interval
        p_stop += i_b.to(tl.int64) * stride_interval
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
    dropout = Dropout(p_seed=p_seed, drop_below=drop_below, keep_factor=keep_factor, i_head=i_head, DROPOUT=DROPOUT)
    keys = Keys(p_k=p_k, p_v=p_v, stride_ks=stride_ks, stride_vs=stride_vs)

    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    start, stop = row_intervals(o_m, problem)
    ranges = key_ranges(start, stop, o_m < q_len, kv_len, BLOCK_N)
    seen_first, seen_last = seen_range(start, stop, kv_len)
    # q [BLOCK_M, BLOCK_D]
    b_q = load_tile(p_q, o_m, o_d, stride_qs, o_m < q_len, head_dim, True, CHECK_D)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    unit = score_unit(problem)
    slope = alibi_slope(p_slopes, i_b * stride_slope + i_h, problem)
    slopes_at = i_b.to(tl.int64) * stride_slope + i_h.to(tl.int64) * q_len
    slopes = Slopes(slope=slope, offset=offset, p_slopes=p_slopes, p_offsets=p_offsets, at=slopes_at)
    slope, row_offset = alibi_rows(slopes, o_m[:, None], problem)
    rows = Rows(
        o_m=o_m, start=start, stop=stop, seen_first=seen_first, seen_last=seen_last, slope=slope, offset=row_offset
    )
    n_full, n_partial = 0, 0
    b_m, b_l, b_acc, n_full, n_partial = attend(
        b_m, b_l, b_acc, n_full, n_partial, b_q, rows, keys, ranges, problem, dropout, shape, False, COUNT_TILES
    )
    b_m, b_l, b_acc, n_full, n_partial = attend(
        b_m, b_l, b_acc, n_full, n_partial, b_q, rows, keys, ranges, problem, dropout, shape, True, COUNT_TILES
    )

    # A row that saw nothing has l = 0: it gives 0, and an LSE of -inf.
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    if DROPOUT:
        b_out = b_out * keep_factor
    store_tile(p_out, b_out, o_m, tl.arange(0, BLOCK_DV), stride_os, q_len, v_head_dim, CHECK_DV)
    tl.store(p_lse + o_m, b_m * unit + tl.log2(b_l) * LN_2, mask=o_m < q_len)
    if COUNT_TILES:
        p_count = p_counts + (i_head * row_blocks + i_m) * 3
        tl.store(p_count, tl.cdiv(kv_len, BLOCK_N) - n_full - n_partial)
        tl.store(p_count + 1, n_partial)
        tl.store(p_count + 2, n_full)


@triton.jit
def attend(
    b_m,
    b_l,
    b_acc,
    n_full,
    n_partial,
    b_q,
    rows,
    keys,
    ranges,
    problem,
    dropout,
    shape,
    MASKED: tl.constexpr,
    COUNT_TILES: tl.constexpr,
):
    """Let the partial tiles of keys (MASKED), or the full ones, pass by these rows."""
    o_d, o_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    unit = score_unit(problem) * LOG2_E
    from_key, to_key = visits(ranges, MASKED)
    # What is computed ahead of a loop occupies registers throughout it. A wide head has none to spare.
    for at in tl.range(from_key, to_key, shape.BLOCK_N, disable_licm=shape.BLOCK_D > 128):
        n = place(at, ranges, MASKED)
        o_n = n + tl.arange(0, shape.BLOCK_N)
        m_keys = (o_n >= rows.seen_first) & (o_n < rows.seen_last)
        # k [BLOCK_N, BLOCK_D], s [BLOCK_M, BLOCK_N]
        b_k = load_tile(keys.p_k, o_n, o_d, keys.stride_ks, m_keys, shape.head_dim, MASKED, shape.CHECK_D)
        b_s = cap(tl.dot(b_q, tl.trans(b_k), input_precision=shape.PRECISION), problem)
        b_s = add_alibi(b_s, rows.slope, rows.o_m[:, None], o_n[None, :], rows.offset, problem)
        if MASKED:
            m_pairs = (o_n[None, :] >= rows.start[:, None]) & (o_n[None, :] < rows.stop[:, None])
            b_s = tl.where(m_pairs, b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        # A row that has seen nothing keeps m = -inf, and -inf - -inf is NaN: subtract 0 there.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        b_p = tl.exp2(b_s * unit - (pivot * unit)[:, None])
        rescale = tl.exp2((b_m - pivot) * unit)
        b_l = b_l * rescale + tl.sum(b_p, 1)
        b_acc = b_acc * rescale[:, None]
        b_v = load_tile(keys.p_v, o_n, o_dv, keys.stride_vs, m_keys, shape.v_head_dim, MASKED, shape.CHECK_DV)
        if MASKED and problem.MASK == INTERVALS:
            # A weight of 0 does not hide a NaN: keys in the gaps, which none of these rows see, are blanked.
            m_seen = tl.max(b_p, 0) > 0.0
            b_v = tl.where(m_seen[:, None], b_v, 0.0)
        if dropout.DROPOUT:
            # After the row sums, which are those of the softmax: dropout takes weights away and leaves the others as they are.
            b_p = tl.where(kept_pairs(dropout, rows.o_m, n, shape.BLOCK_N), b_p, 0.0)
        b_acc = add_product(b_acc, b_p.to(b_v.dtype), b_v, shape.PRECISION)
        b_m = m_new
        if COUNT_TILES:
            m_rows = rows.o_m < problem.q_len
            whole = tl.minimum(shape.BLOCK_N, problem.kv_len - n)
            seen = tl.maximum(tl.minimum(rows.stop, n + whole) - tl.maximum(rows.start, n), 0)
            fewest, most = tl.min(tl.where(m_rows, seen, whole)), tl.max(seen)
            n_full += (fewest == whole).to(tl.int32)
            n_partial += ((fewest != whole) & (most > 0)).to(tl.int32)
    return b_m, b_l, b_acc, n_full, n_partial
