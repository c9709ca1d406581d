# diagnosis: compile-error
"""FlashAttention, backward, in Triton: three kernels that recompute the probabilities from the saved log-sum-exp.

The forward kept q, k, v, out and one number per row. From these, and from the gradient of the output, come the gradients of
q, k and v, and no tensor as large as Sq x Sk is made on the way. Chapter 9 derives the formulas.

What is not attention is given: which tile a program works on, loading and storing tiles, and the launches. You write three
kernels from where their tiles are loaded. Begin with `delta_kernel`, then `dq_kernel`; each is graded by itself.

Without a GPU the kernels run in Triton's interpreter, which `TRITON_INTERPRET=1` in the environment turns on before triton is
imported; the grader does that for you. There `print` works inside a kernel. Multiply tiles with
`tl.dot(a, b, input_precision="ieee")`: both of one dtype, the result float32, and no float32 cut down to TF32 on a GPU.

Names: p_ pointers, i_ indices of a program, o_ offsets in a tensor, b_ tiles. Capitals are known at compile time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x * LOG2_E); a GPU has an instruction for 2^x


@triton.jit
def load_rows(p_matrix, o_rows, n_rows, n_cols, BLOCK_COLS: tl.constexpr):
    """Rows `o_rows` of a contiguous matrix ``[n_rows, n_cols]``: a tile ``[rows, BLOCK_COLS]``, 0 beyond the matrix."""
    o_cols = tl.arange(0, BLOCK_COLS)
    m_tile = (o_rows[:, None] < n_rows) & (o_cols[None, :] < n_cols)
    return tl.load(p_matrix + o_rows[:, None] * n_cols + o_cols[None, :], mask=m_tile, other=0.0)


@triton.jit
def store_rows(p_matrix, b_tile, o_rows, n_rows, n_cols, BLOCK_COLS: tl.constexpr):
    """Write a tile ``[rows, BLOCK_COLS]``, rounded to the matrix's dtype, as far as it lies in the matrix."""
    o_cols = tl.arange(0, BLOCK_COLS)
    m_tile = (o_rows[:, None] < n_rows) & (o_cols[None, :] < n_cols)
    b_tile = b_tile.to(p_matrix.dtype.element_ty)
    tl.store(p_matrix + o_rows[:, None] * n_cols + o_cols[None, :], b_tile, mask=m_tile)


@triton.jit
def delta_kernel(p_out, p_do, p_delta, q_len, v_dim, BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Write delta for `BLOCK_Q` rows of one head: the sum of P * dP over the row's keys, for which neither P nor dP is needed.

    All arithmetic is float32, also where out is float16.

    Args:
        p_out, p_do: out and its gradient dO, ``[B * Hq, Sq, Dv]``.
        p_delta: float32 ``[B * Hq, Sq]``.
    """
    i_head = tl.program_id(1)  # of B * Hq
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_out += i_head * q_len * v_dim
    p_do += i_head * q_len * v_dim
    p_delta += i_head * q_len
    b_out = load_rows(p_out, o_q, q_len, v_dim, BLOCK_DV).to(tl.float32)
    b_do = load_rows(p_do, o_q, q_len, v_dim, BLOCK_DV).to(tl.float32)
    tl.store(p_delta + o_q, tl.sum(b_out * b_do, 1), mask=o_q < q_len)


@triton.jit
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, q_len, kv_len, dim, v_dim, scale, group_size,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of `BLOCK_K` keys of one KV head: all that the rows of its query heads give to them.

    Args:
        p_q, p_do: ``[B * Hq, Sq, D]`` and ``[B * Hq, Sq, Dv]``. p_lse, p_delta: float32 ``[B * Hq, Sq]``.
        p_k, p_dk: ``[B * Hkv, Sk, D]``. p_v, p_dv: ``[B * Hkv, Sk, Dv]``.
        group_size: Hq / Hkv. Query heads ``h * group_size`` to ``(h + 1) * group_size - 1`` share KV head h.
    """
    i_kv = tl.program_id(1)  # of B * Hkv; its query heads are i_kv * group_size and the group_size - 1 after it
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_k = load_rows(p_k + i_kv * kv_len * dim, o_k, kv_len, dim, BLOCK_D)  # [BLOCK_K, BLOCK_D]
    b_v = load_rows(p_v + i_kv * kv_len * v_dim, o_k, kv_len, v_dim, BLOCK_DV)  # [BLOCK_K, BLOCK_DV]
    p_dk += i_kv * kv_len * dim
    p_dv += i_kv * kv_len * v_dim
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for i_head in range(i_kv * group_size, (i_kv + 1) * group_size):
        for first in range(0, q_len, BLOCK_Q):
            o_q = first + tl.arange(0, BLOCK_Q)
            b_q = load_rows(p_q + i_head * q_len * dim, o_q, q_len, dim, BLOCK_D)
            b_do = load_rows(p_do + i_head * q_len * v_dim, o_q, q_len, v_dim, BLOCK_DV)
            b_lse = tl.load(p_lse + i_head * q_len + o_q, mask=o_q < q_len, other=0.0)
            b_delta = tl.load(p_delta + i_head * q_len + o_q, mask=o_q < q_len, other=0.0)
            # Keys first: b_p and b_ds [BLOCK_K, BLOCK_Q] are P and dS transposed.
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
            m_seen = (o_k[:, None] < kv_len) & (o_q[None, :] < q_len)
            if CAUSAL:
                m_seen = m_seen & (o_k[:, None] <= o_q[None, :] + kv_len - q_len)
            b_p = tl.where(m_seen, tl.exp2((b_s - b_lse[None, :]) * LOG2_E), 0.0)
            b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
    store_rows(p_dk, b_dk * scale, o_k, kv_len, dim, BLOCK_D)
    store_rows(p_dv, b_dv, o_k, kv_len, v_dim, BLOCK_DV)


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, q_len, kv_len, dim, v_dim, scale, group_size,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write dQ of `BLOCK_Q` rows of one query head: all that the keys give to them. Arguments as in `dkdv_kernel`."""
    i_head = tl.program_id(1)  # of B * Hq
    i_kv = i_head // group_size
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_rows(p_q + i_head * q_len * dim, o_q, q_len, dim, BLOCK_D)  # [BLOCK_Q, BLOCK_D]
    b_do = load_rows(p_do + i_head * q_len * v_dim, o_q, q_len, v_dim, BLOCK_DV)  # [BLOCK_Q, BLOCK_DV]
    b_lse = tl.load(p_lse + i_head * q_len + o_q, mask=o_q < q_len, other=0.0)
    b_delta = tl.load(p_delta + i_head * q_len + o_q, mask=o_q < q_len, other=0.0)
    p_k += i_kv * kv_len * dim
    p_v += i_kv * kv_len * v_dim
    p_dq += i_head * q_len * dim
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    tiles = list(range(0, kv_len, BLOCK_K))
    for first in tiles:
        o_k = first + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, o_k, kv_len, dim, BLOCK_D)
        b_v = load_rows(p_v, o_k, kv_len, v_dim, BLOCK_DV)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_Q, BLOCK_K]
        m_seen = (o_q[:, None] < q_len) & (o_k[None, :] < kv_len)
        if CAUSAL:
            m_seen = m_seen & (o_k[None, :] <= o_q[:, None] + kv_len - q_len)
        b_p = tl.where(m_seen, tl.exp2((b_s - b_lse[:, None]) * LOG2_E), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    store_rows(p_dq, b_dq * scale, o_q, q_len, dim, BLOCK_D)


# What follows launches your kernels, and is given. All tensors are float16 or float32, and all sizes at least 1.


def row_delta(out: Tensor, grad_out: Tensor) -> Tensor:
    """delta of each row, float32 ``[B, Hq, Sq]``.

    Args:
        out, grad_out: the output of the forward and its gradient, ``[B, Hq, Sq, Dv]``.
    """
    batch, q_heads, q_len, v_dim = out.shape
    delta = torch.empty(batch, q_heads, q_len, device=out.device)
    grid = (triton.cdiv(q_len, 32), batch * q_heads)
    out, grad_out = out.contiguous(), grad_out.contiguous()
    delta_kernel[grid](out, grad_out, delta, q_len, v_dim, BLOCK_Q=32, BLOCK_DV=padded(v_dim))
    return delta


def key_value_gradients(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad_out: Tensor,
    causal: bool = False, scale: float | None = None, block_q: int = 32, block_k: int = 32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of k and of v, shaped and typed like them.

    Args:
        q, k, v: ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]``, ``[B, Hkv, Sk, Dv]``; Hq is a multiple of Hkv.
        lse: float32 ``[B, Hq, Sq]``: the natural logarithm of the sum of exp(score) over each row, -inf where a row sees no key.
        delta: what `row_delta` returns.
        grad_out: ``[B, Hq, Sq, Dv]``.
        causal: row i sees the keys up to i + Sk - Sq, so that the last row sees all. With Sq > Sk the first rows see nothing.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        block_q, block_k: rows and keys of a tile, powers of two. They need not divide the lengths.

    Precision: tiles are multiplied in the inputs' dtype; P, dS and all sums are float32.
    Memory: no tensor, and no tile, has more than O((Sq + Sk) * D + block_q * block_k) elements.
    """
    dk, dv = empty_like(k), empty_like(v)
    inputs, sizes = kernel_arguments(q, k, v, grad_out, lse, delta, scale)
    grid = (triton.cdiv(k.shape[2], block_k), k.shape[0] * k.shape[1])
    dkdv_kernel[grid](
        *inputs, dk, dv, *sizes, q.shape[1] // k.shape[1], CAUSAL=causal, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_D=padded(k.shape[3]), BLOCK_DV=padded(v.shape[3]),
    )  # fmt: skip
    return dk, dv


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad_out: Tensor,
    causal: bool = False, scale: float | None = None, block_q: int = 32, block_k: int = 32,
) -> Tensor:  # fmt: skip
    """Gradient of q, shaped and typed like it. Arguments as in `key_value_gradients`. A row that sees no key gets 0."""
    dq = empty_like(q)
    inputs, sizes = kernel_arguments(q, k, v, grad_out, lse, delta, scale)
    grid = (triton.cdiv(q.shape[2], block_q), q.shape[0] * q.shape[1])
    dq_kernel[grid](
        *inputs, dq, *sizes, q.shape[1] // k.shape[1], CAUSAL=causal, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_D=padded(k.shape[3]), BLOCK_DV=padded(v.shape[3]),
    )  # fmt: skip
    return dq


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    causal: bool = False, scale: float | None = None, block_q: int = 32, block_k: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v: all three kernels. Arguments as above; out ``[B, Hq, Sq, Dv]`` and lse come from the forward."""
    delta = row_delta(out, grad_out)
    dq = query_gradient(q, k, v, lse, delta, grad_out, causal, scale, block_q, block_k)
    dk, dv = key_value_gradients(q, k, v, lse, delta, grad_out, causal, scale, block_q, block_k)
    return dq, dk, dv


def kernel_arguments(q, k, v, grad_out, lse, delta, scale):
    """What both kernels start with: the inputs, contiguous, and the sizes."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    inputs = tuple(x.contiguous() for x in (q, k, v, grad_out, lse, delta))
    return inputs, (q.shape[2], k.shape[2], q.shape[3], v.shape[3], scale)


def empty_like(x: Tensor) -> Tensor:
    """Contiguous, shaped and typed like x. When you are graded it holds NaN, so what no program writes is seen."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def padded(dim: int) -> int:
    """Columns of the tile that holds `dim` channels: a power of two, and at least the 16 that a tensor core takes."""
    return max(16, triton.next_power_of_2(dim))
