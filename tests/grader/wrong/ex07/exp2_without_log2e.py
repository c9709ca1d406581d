# diagnosis: exp2-for-exp
import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_os, stride_od,
    q_heads, group_size, q_len, kv_len, head_dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // q_heads, i_bh % q_heads
    i_kv = i_h // group_size
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_q = (o_m < q_len)[:, None] & (o_d < head_dim)[None, :]

    p_q += i_b * stride_qb + i_h * stride_qh + o_m[:, None] * stride_qs + o_d[None, :] * stride_qd
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    unit = scale
    for n in range(0, kv_len, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_k = (o_n < kv_len)[:, None] & (o_d < head_dim)[None, :]
        b_k = tl.load(p_k + o_n[:, None] * stride_ks + o_d[None, :] * stride_kd, mask=m_k, other=0.0)
        b_v = tl.load(p_v + o_n[:, None] * stride_vs + o_d[None, :] * stride_vd, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * unit
        b_s = tl.where((o_n < kv_len)[None, :], b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        rescale = tl.exp2(b_m - m_new)
        b_p = tl.exp2(b_s - m_new[:, None])
        b_l = b_l * rescale + tl.sum(b_p, 1)
        b_acc = b_acc * rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_m = m_new

    p_out += i_b * stride_ob + i_h * stride_oh + o_m[:, None] * stride_os + o_d[None, :] * stride_od
    tl.store(p_out, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + i_bh * q_len + o_m, b_m + tl.log(b_l), mask=o_m < q_len)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, block_m: int = 64, block_n: int = 32
) -> tuple[Tensor, Tensor]:
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    forward_kernel[(triton.cdiv(q_len, block_m), batch * q_heads)](
        q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        q_heads, q_heads // kv_heads, q_len, kv_len, head_dim, 1 / math.sqrt(head_dim) if scale is None else scale,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return out, lse
