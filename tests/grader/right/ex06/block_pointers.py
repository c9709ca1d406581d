import torch
import triton
import triton.language as tl


@triton.jit
def padded(x_ptr, lengths_ptr, out_ptr, rows, cols, x_row, x_col, BLOCK: tl.constexpr):
    """The row's place in memory is described by a block pointer; bounds are checked by it, the length by a mask."""
    i = tl.program_id(0)
    length = tl.load(lengths_ptr + i).to(tl.int32)
    x_row_ptr = tl.make_block_ptr(
        x_ptr + i * x_row, shape=(length,), strides=(x_col,), offsets=(0,), block_shape=(BLOCK,), order=(0,)
    )
    x = tl.load(x_row_ptr, boundary_check=(0,), padding_option="zero").to(tl.float32)
    seen = (tl.arange(0, BLOCK) < length) & (x != float("-inf"))
    highest = tl.max(tl.where(seen, x, float("-inf")), 0)
    e = tl.where(seen, tl.exp(tl.where(seen, x - highest, 0.0)), 0.0)
    p = e / tl.maximum(tl.sum(e, 0), 1e-20)
    out_row_ptr = tl.make_block_ptr(
        out_ptr + i * cols, shape=(cols,), strides=(1,), offsets=(0,), block_shape=(BLOCK,), order=(0,)
    )
    tl.store(out_row_ptr, p.to(out_ptr.dtype.element_ty), boundary_check=(0,))


@triton.jit
def packed(v_ptr, cu_ptr, out_ptr, BLOCK: tl.constexpr):
    begin = tl.load(cu_ptr + tl.program_id(0))
    end = tl.load(cu_ptr + tl.program_id(0) + 1)
    lanes = begin + tl.arange(0, BLOCK)
    v = tl.load(v_ptr + lanes, lanes < end, float("-inf")).to(tl.float32)
    seen = v > float("-inf")
    highest = tl.max(v, 0)
    e = tl.where(seen, tl.exp(tl.where(seen, v - highest, 0.0)), 0.0)
    tl.store(out_ptr + lanes, e / tl.maximum(tl.sum(e, 0), 1e-20), lanes < end)


def ragged_softmax(x, lengths):
    rows, cols = x.size()
    out = torch.empty(rows, cols, dtype=x.dtype)
    BLOCK = triton.next_power_of_2(cols) or 1
    padded[(rows,)](x, lengths, out, rows, cols, x.stride(0), x.stride(1), BLOCK=BLOCK)
    return out


def packed_softmax(values, cu_seqlens, max_seqlen):
    out = torch.empty(values.shape, dtype=values.dtype)
    packed[(cu_seqlens.numel() - 1,)](values, cu_seqlens, out, BLOCK=triton.next_power_of_2(max_seqlen) or 1)
    return out
