# diagnosis: race
import torch
import triton
import triton.language as tl


@triton.jit
def block_softmax(b_x, m_row):
    b_x = tl.where(m_row, b_x.to(tl.float32), float("-inf"))
    maximum = tl.max(b_x, 0)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
    b_p = tl.exp(b_x - pivot)
    total = tl.sum(b_p, 0)
    return b_p / tl.where(total == 0.0, 1.0, total)


@triton.jit
def padded_kernel(p_x, p_lengths, p_out, stride_row, stride_col, cols, BLOCK: tl.constexpr):
    i_row = tl.program_id(1)
    o_cols = tl.arange(0, BLOCK)
    m_row = o_cols < tl.load(p_lengths + i_row)
    b_x = tl.load(p_x + i_row * stride_row + o_cols * stride_col, mask=m_row, other=float("-inf"))
    b_p = block_softmax(b_x, m_row)
    tl.store(p_out + i_row * cols + o_cols, b_p, mask=o_cols < cols)


@triton.jit
def packed_kernel(p_values, p_cu_seqlens, p_out, BLOCK: tl.constexpr):
    i_row = tl.program_id(0)
    start = tl.load(p_cu_seqlens + i_row)
    length = tl.load(p_cu_seqlens + i_row + 1) - start
    o_row = tl.arange(0, BLOCK)
    m_row = o_row < length
    b_x = tl.load(p_values + start + o_row, mask=m_row, other=float("-inf"))
    tl.store(p_out + start + o_row, block_softmax(b_x, m_row), mask=m_row)


def ragged_softmax(x, lengths):
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=x.dtype)
    block = triton.next_power_of_2(max(cols, 1))
    padded_kernel[(rows,)](x, lengths, out, x.stride(0), x.stride(1), cols, BLOCK=block)
    return out


def packed_softmax(values, cu_seqlens, max_seqlen):
    out = torch.empty_like(values)
    block = triton.next_power_of_2(max(max_seqlen, 1))
    packed_kernel[(len(cu_seqlens) - 1,)](values, cu_seqlens, out, BLOCK=block)
    return out
