"""The kernels of chapter 09: a bare backward, and programs that meet in one sum. They run in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashlib.reference import naive_attention


@triton.jit
def bare_dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, q_len, scale, BLOCK: tl.constexpr, D: tl.constexpr
):
    """dK and dV of one tile of keys of one head: float32, no mask, lengths that BLOCK divides, all contiguous."""
    o_n, o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    at_keys = o_n[:, None] * D + o_d[None, :]
    b_k, b_v = tl.load(p_k + at_keys), tl.load(p_v + at_keys)  # [keys, D]
    b_dk, b_dv = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
    for m in range(0, q_len, BLOCK):
        o_m = m + tl.arange(0, BLOCK)
        at_rows = o_m[:, None] * D + o_d[None, :]
        b_q, b_do = tl.load(p_q + at_rows), tl.load(p_do + at_rows)  # [rows, D]
        b_lse, b_delta = tl.load(p_lse + o_m)[:, None], tl.load(p_delta + o_m)[:, None]
        b_p = tl.exp(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse)  # [rows, keys]
        b_dv += tl.dot(tl.trans(b_p), b_do, input_precision="ieee")
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta) * scale
        b_dk += tl.dot(tl.trans(b_ds), b_q, input_precision="ieee")
    tl.store(p_dk + at_keys, b_dk)
    tl.store(p_dv + at_keys, b_dv)


def bare_dkdv(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """dK and dV of one head without a mask: q, k, v, grad_out ``[N, D]``, float32, contiguous, N a multiple of the block, D a power of two."""
    out, lse = (x[0, 0] for x in naive_attention(q[None, None], k[None, None], v[None, None], return_lse=True))
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    rows = lse.contiguous(), (out * grad_out).sum(-1)
    scale = q.shape[1] ** -0.5
    bare_dkdv_kernel[(k.shape[0] // block,)](
        q, k, v, grad_out, *rows, dk, dv, q.shape[0], scale, BLOCK=block, D=q.shape[1]
    )
    return dk, dv


@triton.jit
def add_part(p_parts, p_order, p_out, size, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    """Add one part to out. On a GPU the order in which programs come is the scheduler's; here it is read from p_order."""
    i_part = tl.load(p_order + tl.program_id(0))
    o_x = tl.arange(0, BLOCK)
    b_part = tl.load(p_parts + i_part * size + o_x, mask=o_x < size)
    if ATOMIC:
        tl.atomic_add(p_out + o_x, b_part, mask=o_x < size)
    else:
        b_sum = tl.load(p_out + o_x, mask=o_x < size) + b_part
        tl.store(p_out + o_x, b_sum, mask=o_x < size)


def sum_of_parts(parts: Tensor, order: Tensor, *, atomic: bool = True) -> Tensor:
    """The sum of parts ``[count, size]`` over the first axis, one program for each part, started in the given order.

    Args:
        parts: float32, contiguous.
        order: int64 ``[count]``, each of 0 .. count - 1 once.
        atomic: False for the mistake: load, add, store, while others do the same.
    """
    count, size = parts.shape
    out = torch.zeros(size, dtype=parts.dtype, device=parts.device)
    add_part[(count,)](parts, order, out, size, BLOCK=triton.next_power_of_2(size), ATOMIC=atomic)
    return out
