import torch
import triton
import triton.language as tl


@triton.jit
def rows_kernel(p_x, p_out, p_starts, p_lengths, p_widths, step, BLOCK: tl.constexpr):
    """Row i begins at element starts[0, i] of x and is written to starts[1, i] of out, widths[i] entries wide."""
    i = tl.program_id(0)
    rows = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    length = tl.load(p_lengths + i)
    x = tl.load(p_x + tl.load(p_starts + i) + lanes * step, mask=lanes < length, other=-float("inf")).to(tl.float32)
    highest = tl.maximum(tl.max(x, axis=0), -3.4028234e38)
    weights = tl.exp(x - highest)
    weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)
    p_row = p_out + tl.load(p_starts + rows + i)
    tl.store(p_row + lanes, weights.to(p_out.dtype.element_ty), mask=lanes < tl.load(p_widths + i))


def _launch(x, out, starts, lengths, widths, step, widest):
    if out.numel():
        rows_kernel[(len(lengths),)](x, out, starts, lengths, widths, step, BLOCK=triton.next_power_of_2(widest))
    return out


def ragged_softmax(x, lengths):
    rows, cols = x.shape
    out = x.new_empty(rows, cols)
    i = torch.arange(rows)
    widths = torch.full((rows,), cols)
    return _launch(x, out, torch.stack([i * x.stride(0), i * cols]), lengths, widths, x.stride(1), cols)


def packed_softmax(values, cu_seqlens, max_seqlen):
    starts = cu_seqlens[:-1].repeat(2, 1)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    return _launch(values, torch.empty_like(values), starts, lengths, lengths, 1, max_seqlen)
