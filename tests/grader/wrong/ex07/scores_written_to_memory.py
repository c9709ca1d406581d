# diagnosis: untiled, read-before-the-kernel
import math

import torch
import triton
import triton.language as tl


@triton.jit
def scores_kernel(
    p_q,
    p_k,
    p_s,
    sq,
    sk,
    d,
    g,
    scale,
    qb,
    qh,
    qs,
    qd,
    kb,
    kh,
    ks,
    kd,
    HQ,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    i, j, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = bh // HQ, bh % HQ
    rows, cols, dims = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BD)
    q = tl.load(
        p_q + b * qb + h * qh + rows[:, None] * qs + dims[None, :] * qd,
        mask=(rows < sq)[:, None] & (dims < d)[None, :],
        other=0.0,
    )
    k = tl.load(
        p_k + b * kb + h // g * kh + cols[:, None] * ks + dims[None, :] * kd,
        mask=(cols < sk)[:, None] & (dims < d)[None, :],
        other=0.0,
    )
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    tl.store(
        p_s + bh * sq * sk + rows[:, None] * sk + cols[None, :], s, mask=(rows < sq)[:, None] & (cols < sk)[None, :]
    )


@triton.jit
def output_kernel(
    p_s, p_v, p_out, p_lse, sq, sk, d, g, vb, vh, vs, vd, HQ, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    i, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // HQ, bh % HQ
    rows, dims = i * BM + tl.arange(0, BM), tl.arange(0, BD)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for j in range(0, sk, BN):
        cols = j + tl.arange(0, BN)
        inside = (rows < sq)[:, None] & (cols < sk)[None, :]
        s = tl.load(p_s + bh * sq * sk + rows[:, None] * sk + cols[None, :], mask=inside, other=float("-inf"))
        v = tl.load(
            p_v + b * vb + h // g * vh + cols[:, None] * vs + dims[None, :] * vd,
            mask=(cols < sk)[:, None] & (dims < d)[None, :],
            other=0.0,
        )
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp(s - safe[:, None])
        l = l * tl.exp(m - safe) + tl.sum(p, 1)
        acc = acc * tl.exp(m - safe)[:, None] + tl.dot(p, v.to(tl.float32), input_precision="ieee")
        m = m_new
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    inside = (rows < sq)[:, None] & (dims < d)[None, :]
    tl.store(p_out + (bh * sq + rows[:, None]) * d + dims[None, :], out.to(p_out.dtype.element_ty), mask=inside)
    tl.store(p_lse + bh * sq + rows, m + tl.log(l), mask=rows < sq)


def attention_forward(q, k, v, scale=None, block_m=64, block_n=32):
    """Two kernels, with all the scores in memory between them."""
    batch, hq, sq, d = q.shape
    hkv, sk = k.shape[1:3]
    scores = torch.empty(batch, hq, sq, sk)
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3])
    scale = 1 / math.sqrt(d) if scale is None else scale
    rows, cols, bd = triton.cdiv(sq, block_m), triton.cdiv(sk, block_n), triton.next_power_of_2(d)
    sizes = (sq, sk, d, hq // hkv)
    scores_kernel[(rows, cols, batch * hq)](
        q, k, scores, *sizes, scale, *q.stride(), *k.stride(), hq, BM=block_m, BN=block_n, BD=bd
    )
    output_kernel[(rows, batch * hq)](scores, v, out, lse, *sizes, *v.stride(), hq, BM=block_m, BN=block_n, BD=bd)
    return out, lse
