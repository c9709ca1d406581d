"""Merging partial attention results (:class:`flashlib.Partial`) on the GPU: the second half of split-KV decoding."""

import triton
import triton.language as tl

from flashlib.kernels.bundles import Results, Splits
from flashlib.kernels.common import LN_2, LOG2_E


@triton.jit
def merge_weight(lse, pivot):
    """``exp(lse - pivot)``, with the differences of equal infinities replaced by their limits: 0 at -inf, 1 at +inf."""
    weight = tl.exp2((lse - pivot) * LOG2_E)
    return tl.where(lse == float("-inf"), 0.0, tl.where(lse == pivot, 1.0, weight))


@triton.jit
def store_rows(results, b_out, b_lse, o_rows, m_rows):
    """Write some rows."""
    o_dv = tl.arange(0, results.BLOCK_DV)
    m_out = m_rows[:, None] & (o_dv < results.v_head_dim)[None, :]
    p_rows = results.p_out + o_rows[:, None] * results.v_head_dim + o_dv[None, :]
    tl.store(p_rows, b_out.to(results.p_out.dtype.element_ty), mask=m_out)
    tl.store(results.p_lse + o_rows, b_lse, mask=m_rows)


@triton.jit
def nothing_yet(ROWS: tl.constexpr, BLOCK_DV: tl.constexpr):
    """What :func:`fold_splits` begins with: largest LSE, sum of weights, number of infinite LSEs, weighted sum of outputs."""
    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    return b_m, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32), tl.zeros([ROWS, BLOCK_DV], tl.float32)


@triton.jit
def fold_splits(b_m, b_l, b_infinite, b_acc, splits, o_rows, m_rows):
    """Fold the partials of some rows, ``SPLITS`` at a time.

    The order is fixed, and how many are folded at a time does not depend on how many there are. A split with LSE -inf changes no
    bit of the result.
    """
    o_dv = tl.arange(0, splits.BLOCK_DV)
    for split in range(0, splits.n_splits, splits.SPLITS):
        o_splits = split + tl.arange(0, splits.SPLITS)
        o_at = o_splits.to(tl.int64)[:, None] * splits.n_rows + o_rows[None, :]
        m_at = (o_splits < splits.n_splits)[:, None] & m_rows[None, :]
        # lse [SPLITS, ROWS], out [SPLITS, ROWS, BLOCK_DV]
        b_lse = tl.load(splits.p_lse + o_at, mask=m_at, other=float("-inf"))
        m_out = m_at[:, :, None] & (o_dv < splits.v_head_dim)[None, None, :]
        p_out = splits.p_out + o_at[:, :, None] * splits.v_head_dim + o_dv[None, None, :]
        b_out = tl.load(p_out, mask=m_out, other=0.0)
        m_new = tl.maximum(b_m, tl.max(b_lse, 0))
        b_w = merge_weight(b_lse, m_new[None, :])
        rescale = merge_weight(b_m, m_new)
        b_l = b_l * rescale + tl.sum(b_w, 0)
        # A weight of 0 hides whatever the output holds.
        b_out = tl.where((b_w == 0.0)[:, :, None], 0.0, b_out.to(tl.float32))
        b_acc = b_acc * rescale[:, None] + tl.sum(b_out * b_w[:, :, None], 0)
        b_infinite += tl.sum((b_lse == float("inf")).to(tl.int32), 0)
        b_m = m_new
    return b_m, b_l, b_infinite, b_acc


@triton.jit
def store_merged(results, b_m, b_l, b_infinite, b_acc, o_rows, m_rows):
    """Write what :func:`fold_splits` has come to: 0 and -inf where no split saw a key."""
    b_acc = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    # Of two pieces whose scores overflowed, nobody can say which outweighs which.
    b_acc = tl.where((b_infinite > 1)[:, None], float("nan"), b_acc)
    b_lse = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(b_l) * LN_2)
    store_rows(results, b_acc, b_lse, o_rows, m_rows)


@triton.jit
def merge_splits(splits, results, o_rows, m_rows, ROWS: tl.constexpr):
    """Merge all splits of some rows, and write the result."""
    b_m, b_l, b_infinite, b_acc = nothing_yet(ROWS, splits.BLOCK_DV)
    b_m, b_l, b_infinite, b_acc = fold_splits(b_m, b_l, b_infinite, b_acc, splits, o_rows, m_rows)
    store_merged(results, b_m, b_l, b_infinite, b_acc, o_rows, m_rows)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def combine(
    p_partial_out, p_partial_lse, p_out, p_lse, n_rows, n_splits, v_head_dim, ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program merges all splits of ``ROWS`` rows: ``[splits, n_rows, v_head_dim]`` becomes ``[n_rows, v_head_dim]``."""
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    splits = Splits(
        p_out=p_partial_out, p_lse=p_partial_lse, n_rows=n_rows, n_splits=n_splits, v_head_dim=v_head_dim,
        BLOCK_DV=BLOCK_DV, SPLITS=SPLITS,
    )  # fmt: skip
    results = Results(p_out=p_out, p_lse=p_lse, v_head_dim=v_head_dim, BLOCK_DV=BLOCK_DV)
    merge_splits(splits, results, o_rows, o_rows < n_rows, ROWS)


@triton.jit(do_not_specialize=["earlier_splits", "later_splits"])
def combine_packed(
    p_earlier_out, p_earlier_lse, p_later_out, p_later_lse, p_out, p_lse, earlier_rows, later_rows, earlier_splits,
    later_splits, earlier_request, earlier_head, later_request, later_head, kv_heads, head_rows, v_head_dim,
    BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program merges one row of two sets of splits, each of which has its rows in an order of its own.

    ``request`` and ``head`` are steps in rows: row r of KV head h of request b is row ``b * request + h * head + r`` of a set, and row
    ``(b * kv_heads + h) * head_rows + r`` of the result.
    """
    o_rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    o_b, o_head, o_row = o_rows // (kv_heads * head_rows), o_rows // head_rows % kv_heads, o_rows % head_rows
    m_rows = o_rows >= 0  # there are as many programs as rows
    earlier = Splits(
        p_out=p_earlier_out, p_lse=p_earlier_lse, n_rows=earlier_rows, n_splits=earlier_splits, v_head_dim=v_head_dim,
        BLOCK_DV=BLOCK_DV, SPLITS=SPLITS,
    )  # fmt: skip
    later = Splits(
        p_out=p_later_out, p_lse=p_later_lse, n_rows=later_rows, n_splits=later_splits, v_head_dim=v_head_dim,
        BLOCK_DV=BLOCK_DV, SPLITS=SPLITS,
    )  # fmt: skip
    results = Results(p_out=p_out, p_lse=p_lse, v_head_dim=v_head_dim, BLOCK_DV=BLOCK_DV)
    b_m, b_l, b_infinite, b_acc = nothing_yet(1, BLOCK_DV)
    o_at = o_b * earlier_request + o_head * earlier_head + o_row
    b_m, b_l, b_infinite, b_acc = fold_splits(b_m, b_l, b_infinite, b_acc, earlier, o_at, m_rows)
    o_at = o_b * later_request + o_head * later_head + o_row
    b_m, b_l, b_infinite, b_acc = fold_splits(b_m, b_l, b_infinite, b_acc, later, o_at, m_rows)
    store_merged(results, b_m, b_l, b_infinite, b_acc, o_rows, m_rows)
