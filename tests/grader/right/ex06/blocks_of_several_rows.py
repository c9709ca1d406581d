import torch
import triton
import triton.language as tl


@triton.jit
def padded_rows(p_x, p_lengths, p_out, stride_row, stride_col, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes ROWS rows at once, as a two-dimensional block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    length = tl.load(p_lengths + row, mask=row < rows, other=0)
    inside = col[None, :] < length[:, None]
    x = tl.load(p_x + row[:, None] * stride_row + col[None, :] * stride_col, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x, float("-inf"))
    top = tl.max(x, 1)
    weights = tl.where(x == float("-inf"), 0.0, tl.exp(x - top[:, None]))
    total = tl.sum(weights, 1)
    weights = tl.where(total[:, None] > 0, weights / total[:, None], 0.0)
    tl.store(p_out + row[:, None] * cols + col[None, :], weights, mask=inside)


@triton.jit
def packed_rows(p_values, p_cu, p_out, rows, BLOCK: tl.constexpr):
    """Few programs, each takes every n-th row."""
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        start, stop = tl.load(p_cu + i), tl.load(p_cu + i + 1)
        at = start + tl.arange(0, BLOCK)
        x = tl.load(p_values + at, mask=at < stop, other=float("-inf")).to(tl.float32)
        top = tl.max(x, 0)
        weights = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))
        total = tl.sum(weights, 0)
        tl.store(p_out + at, weights / tl.where(total == 0, 1, total), mask=at < stop)


def ragged_softmax(x, lengths):
    rows, cols = x.shape
    out = torch.zeros((rows, cols), dtype=x.dtype)
    if cols:
        grid = (triton.cdiv(rows, 2),)
        padded_rows[grid](x, lengths, out, *x.stride(), rows, cols, ROWS=2, BLOCK=triton.next_power_of_2(cols))
    return out


def packed_softmax(values, cu_seqlens, max_seqlen):
    out = torch.empty_like(values)
    rows = cu_seqlens.shape[0] - 1
    if max_seqlen:
        packed_rows[(min(rows, 3),)](values, cu_seqlens, out, rows, BLOCK=triton.next_power_of_2(max_seqlen))
    return out
