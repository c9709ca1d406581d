"""Merging partial attention results (:class:`flashlib.Partial`) on the GPU: the second half of split-KV decoding."""

import triton
import triton.language as tl

from flashlib.kernels.common import LN_2, LOG2_E


@triton.jit
def merge_weight(lse, pivot):
    """``exp(lse - pivot)``, with the differences of equal infinities replaced by their limits: 0 at -inf, 1 at +inf."""
    weight = tl.exp2((lse - pivot) * LOG2_E)
    return tl.where(lse == float("-inf"), 0.0, tl.where(lse == pivot, 1.0, weight))


@triton.jit
def store_rows(p_out, p_lse, b_out, b_lse, o_rows, m_rows, v_head_dim, BLOCK_DV: tl.constexpr):
    """Write some rows of ``out [rows, v_head_dim]`` and of ``lse [rows]``."""
    o_dv = tl.arange(0, BLOCK_DV)
    m_out = m_rows[:, None] & (o_dv < v_head_dim)[None, :]
    tl.store(p_out + o_rows[:, None] * v_head_dim + o_dv[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_rows, b_lse, mask=m_rows)


@triton.jit
def merge_splits(
    p_partial_out, p_partial_lse, p_out, p_lse, o_rows, m_rows, n_rows, n_splits, v_head_dim, ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Fold partials fp32 ``[splits, n_rows, v_head_dim]`` and ``[splits, n_rows]`` of some rows, ``SPLITS`` at a time, and write the result.

    The order is fixed, and how many are folded at a time does not depend on how many there are. A split with LSE -inf changes no
    bit of the result.
    """
    o_dv = tl.arange(0, BLOCK_DV)
    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_infinite = tl.zeros([ROWS], tl.int32)
    b_acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for split in range(0, n_splits, SPLITS):
        o_splits = split + tl.arange(0, SPLITS)
        o_at = o_splits.to(tl.int64)[:, None] * n_rows + o_rows[None, :]
        m_at = (o_splits < n_splits)[:, None] & m_rows[None, :]
        # lse [SPLITS, ROWS], out [SPLITS, ROWS, BLOCK_DV]
        b_lse = tl.load(p_partial_lse + o_at, mask=m_at, other=float("-inf"))
        m_out = m_at[:, :, None] & (o_dv < v_head_dim)[None, None, :]
        b_out = tl.load(p_partial_out + o_at[:, :, None] * v_head_dim + o_dv[None, None, :], mask=m_out, other=0.0)
        m_new = tl.maximum(b_m, tl.max(b_lse, 0))
        b_w = merge_weight(b_lse, m_new[None, :])
        rescale = merge_weight(b_m, m_new)
        b_l = b_l * rescale + tl.sum(b_w, 0)
        # A weight of 0 hides whatever the output holds.
        b_out = tl.where((b_w == 0.0)[:, :, None], 0.0, b_out)
        b_acc = b_acc * rescale[:, None] + tl.sum(b_out * b_w[:, :, None], 0)
        b_infinite += tl.sum((b_lse == float("inf")).to(tl.int32), 0)
        b_m = m_new
    b_acc = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    # Of two pieces whose scores overflowed, nobody can say which outweighs which.
    b_acc = tl.where((b_infinite > 1)[:, None], float("nan"), b_acc)
    b_lse = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(b_l) * LN_2)
    store_rows(p_out, p_lse, b_acc, b_lse, o_rows, m_rows, v_head_dim, BLOCK_DV)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def combine(
    p_partial_out, p_partial_lse, p_out, p_lse, n_rows, n_splits, v_head_dim, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program merges all splits of ``ROWS`` rows: ``[splits, n_rows, v_head_dim]`` becomes ``[n_rows, v_head_dim]``."""
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    merge_splits(
        p_partial_out, p_partial_lse, p_out, p_lse, o_rows, o_rows < n_rows, n_rows, n_splits, v_head_dim, ROWS, BLOCK_DV, SPLITS
    )  # fmt: skip
