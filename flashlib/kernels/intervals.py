"""Masks laid out on the GPU: the interval of keys that each row sees, from lengths, cumulative lengths and bands."""

import triton
import triton.language as tl

# Where the rows of a band sit: at the last key of all, or of their sequence, or as an offset says.
FROM_THE_END, NUMBER, TENSOR, IN_SEQUENCE = (tl.constexpr(kind) for kind in range(4))
FAR = tl.constexpr(1 << 40)  # beyond any row, key and width together


@triton.jit(
    do_not_specialize=["n_ends", "q_len", "kv_len", "offset_a", "left_a", "right_a", "offset_b", "left_b", "right_b"]
)
def row_intervals(
    p_start, p_stop, p_lengths, p_ends_q, p_ends_k, p_offset_a, p_offset_b, stride_length, n_ends, q_len, kv_len, stride_ab, stride_as,
    offset_a, left_a, right_a, stride_bb, stride_bs, offset_b, left_b, right_b, LENGTHS: tl.constexpr, ENDS: tl.constexpr,
    BANDS: tl.constexpr, OFFSET_A: tl.constexpr, HAS_LEFT_A: tl.constexpr, HAS_RIGHT_A: tl.constexpr, OFFSET_B: tl.constexpr,
    HAS_LEFT_B: tl.constexpr, HAS_RIGHT_B: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write ``[start, stop)`` of each row, int32 ``[entries, Sq]``: 0 and 0 for a row that sees nothing.

    All that :meth:`flashlib.masks.Mask.intervals` does for an intersection of one :class:`flashlib.masks.KeyLengths`, one
    :class:`flashlib.masks.Varlen` and two bands. Whatever the tensors hold, intervals lie within the keys.
    """
    row_blocks = tl.cdiv(q_len, ROWS)
    i_e, i_m = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    o_m = i_m * ROWS + tl.arange(0, ROWS)
    start = tl.zeros([ROWS], tl.int64)
    stop = tl.zeros([ROWS], tl.int64) + kv_len
    if LENGTHS:
        stop = tl.minimum(stop, tl.load(p_lengths + i_e * stride_length).to(tl.int64))
    if ENDS:
        # The sequence of a row: how many sequences begin at it or before it, less one.
        last = n_ends - 1
        begun = tl.zeros([ROWS], tl.int32)
        for first in range(0, n_ends, AT_ONCE):
            o_n = first + tl.arange(0, AT_ONCE)
            ends = tl.load(p_ends_q + o_n, mask=o_n < n_ends, other=0x7FFFFFFF)
            begun += tl.sum((ends[None, :] <= o_m[:, None]).to(tl.int32), 1)
        sequence = tl.maximum(begun - 1, 0)
        after = tl.minimum(sequence + 1, last)
        end = tl.load(p_ends_k + after).to(tl.int64)
        start = tl.maximum(start, tl.load(p_ends_k + sequence).to(tl.int64))
        stop = tl.minimum(stop, end)
        in_sequence = o_m + end - tl.load(p_ends_q + after).to(tl.int64)
    else:
        in_sequence = o_m.to(tl.int64)
    if BANDS > 0:
        at = row_positions(p_offset_a, offset_a, i_e, stride_ab, stride_as, o_m, q_len, kv_len, in_sequence, OFFSET_A)
        start, stop = within_band(start, stop, at, left_a, right_a, HAS_LEFT_A, HAS_RIGHT_A)
    if BANDS > 1:
        at = row_positions(p_offset_b, offset_b, i_e, stride_bb, stride_bs, o_m, q_len, kv_len, in_sequence, OFFSET_B)
        start, stop = within_band(start, stop, at, left_b, right_b, HAS_LEFT_B, HAS_RIGHT_B)
    start = tl.minimum(tl.maximum(start, 0), kv_len)
    stop = tl.minimum(tl.maximum(stop, 0), kv_len)
    sees = start < stop
    at = i_e.to(tl.int64) * q_len + o_m
    tl.store(p_start + at, tl.where(sees, start, 0).to(tl.int32), mask=o_m < q_len)
    tl.store(p_stop + at, tl.where(sees, stop, 0).to(tl.int32), mask=o_m < q_len)


@triton.jit
def row_positions(p_offset, offset, i_e, stride_b, stride_s, o_m, q_len, kv_len, in_sequence, OFFSET: tl.constexpr):
    """The key at which each row sits, int64."""
    if OFFSET == IN_SEQUENCE:
        return in_sequence
    elif OFFSET == TENSOR:
        given = tl.load(p_offset + i_e * stride_b + o_m.to(tl.int64) * stride_s, mask=o_m < q_len, other=0).to(tl.int64)
        return o_m + tl.minimum(tl.maximum(given, -FAR), FAR)
    elif OFFSET == NUMBER:
        return o_m.to(tl.int64) + offset
    else:
        return o_m.to(tl.int64) + (kv_len - q_len)


@triton.jit
def within_band(start, stop, at, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    if HAS_LEFT:
        start = tl.maximum(start, at - left)
    if HAS_RIGHT:
        stop = tl.minimum(stop, at + right + 1)
    return start, stop
