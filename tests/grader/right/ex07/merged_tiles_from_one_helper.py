import torch
import triton
import triton.language as tl


@triton.jit
def tile_of(p, stride_row, stride_col, rows, cols, first, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Rows from `first` on, 0 beyond the edges."""
    row, col = first + tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(p + row[:, None] * stride_row + col[None, :] * stride_col, mask=inside, other=0.0)


@triton.jit
def attend(
    q, k, v, out, lse, q_strides, k_strides, v_strides, Hq, G, Sq, Sk, D, scale,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Each tile has a softmax of its own, and is merged by its log-sum-exp."""
    pid, n_blocks = tl.program_id(0), tl.cdiv(Sq, BM)
    block, head = pid % n_blocks, pid // n_blocks
    b, h = head // Hq, head % Hq
    q_tile = tile_of(q + b * q_strides[0] + h * q_strides[1], q_strides[2], q_strides[3], Sq, D, block * BM, BM, BD)
    merged = tl.zeros((BM, BD), tl.float32)
    merged_lse = tl.zeros((BM,), tl.float32) - float("inf")
    for n in range(0, Sk, BN):
        k_tile = tile_of(k + b * k_strides[0] + h // G * k_strides[1], k_strides[2], k_strides[3], Sk, D, n, BN, BD)
        v_tile = tile_of(v + b * v_strides[0] + h // G * v_strides[1], v_strides[2], v_strides[3], Sk, D, n, BN, BD)
        s = tl.dot(q_tile, k_tile.trans(), input_precision="ieee") * scale
        s = tl.where((n + tl.arange(0, BN))[None, :] < Sk, s, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp(s - m[:, None])
        l = tl.sum(p, 1)
        tile_lse = m + tl.log(l)
        top = tl.maximum(merged_lse, tile_lse)
        new_lse = top + tl.log(tl.exp(merged_lse - top) + tl.exp(tile_lse - top))
        o = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee") / l[:, None]
        merged = merged * tl.exp(merged_lse - new_lse)[:, None] + o * tl.exp(tile_lse - new_lse)[:, None]
        merged_lse = new_lse
    rows, cols = block * BM + tl.arange(0, BM), tl.arange(0, BD)
    inside = (rows < Sq)[:, None] & (cols < D)[None, :]
    tl.store(out + (head * Sq + rows)[:, None] * D + cols[None, :], merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * Sq + rows, merged_lse, mask=rows < Sq)


def attention_forward(q, k, v, scale=None, block_m=64, block_n=32):
    B, Hq, Sq, D = q.shape
    out, lse = torch.zeros(B, Hq, Sq, D, dtype=q.dtype), torch.zeros(B, Hq, Sq)
    scale = D**-0.5 if scale is None else scale
    attend[(triton.cdiv(Sq, block_m) * B * Hq,)](
        q, k, v, out, lse, q.stride(), k.stride(), v.stride(), Hq, Hq // k.shape[1], Sq, k.shape[2], D, scale,
        BM=block_m, BN=block_n, BD=triton.next_power_of_2(D),
    )  # fmt: skip
    return out, lse
