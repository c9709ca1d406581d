"""The kernels of chapter 06, each as short as its idea allows, and the mistakes that the chapter looks for.

They are read in the chapter and run there in Triton's interpreter (``TRITON_INTERPRET=1`` before the first import of triton);
on a GPU they run as they are. Names are those of `flashlib.kernels`: ``i_`` the index of a program, ``o_`` offsets of its lanes,
``m_`` masks, ``p_`` addresses, ``b_`` blocks of numbers. Sizes in capitals are known when the kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def double_kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    """out = 2 * x: program i doubles elements i * BLOCK to (i + 1) * BLOCK - 1 of n."""
    i_block = tl.program_id(0)
    o_x = i_block * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < n
    b_x = tl.load(p_x + o_x, mask=m_x)
    tl.store(p_out + o_x, 2 * b_x, mask=m_x)


def double(x: Tensor, block: int = 256) -> Tensor:
    """2 * x for a contiguous x, in programs of `block` elements."""
    out = torch.empty_like(x)
    programs = triton.cdiv(x.numel(), block)
    double_kernel[(programs,)](x, out, x.numel(), BLOCK=block)
    return out


@triton.jit
def softmax_kernel(p_x, p_out, stride_row, stride_col, cols, BLOCK: tl.constexpr):
    """Softmax of row i of x ``[rows, cols]``, whose entries lie `stride_col` apart; out is contiguous."""
    i_row = tl.program_id(0)
    o_cols = tl.arange(0, BLOCK)
    m_cols = o_cols < cols
    b_x = tl.load(p_x + i_row * stride_row + o_cols * stride_col, mask=m_cols, other=float("-inf"))
    b_p = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(p_out + i_row * cols + o_cols, b_p / tl.sum(b_p, 0), mask=m_cols)


def row_softmax(x: Tensor) -> Tensor:
    """Softmax over the rows of x ``[rows, cols]``, float32, any strides: one program for each row."""
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    softmax_kernel[(rows,)](x, out, x.stride(0), x.stride(1), cols, BLOCK=triton.next_power_of_2(cols))
    return out


@triton.jit
def causal_softmax_kernel(p_x, p_out, cols, BLOCK: tl.constexpr):
    """Softmax of the first i + 1 entries of row i, and 0 beyond; x and out contiguous."""
    i_row = tl.program_id(0)
    o_cols = tl.arange(0, BLOCK)
    m_row = o_cols < i_row + 1
    b_x = tl.load(p_x + i_row * cols + o_cols, mask=m_row, other=float("-inf"))
    b_p = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(p_out + i_row * cols + o_cols, b_p / tl.sum(b_p, 0), mask=o_cols < cols)


def causal_softmax(x: Tensor) -> Tensor:
    """Softmax of scores ``[N, N]`` under a causal mask: float32, contiguous, weights 0 beyond the diagonal."""
    rows, cols = x.shape
    out = torch.empty_like(x)
    causal_softmax_kernel[(rows,)](x, out, cols, BLOCK=triton.next_power_of_2(cols))
    return out


@triton.jit
def dot_kernel(p_a, p_b, p_out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """out = a @ b, all ``[SIZE, SIZE]`` and contiguous, in one program; out is float32."""
    o_rows, o_cols = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    b_a = tl.load(p_a + o_rows * SIZE + o_cols)
    b_b = tl.load(p_b + o_rows * SIZE + o_cols)
    tl.store(p_out + o_rows * SIZE + o_cols, tl.dot(b_a, b_b, input_precision=PRECISION))


def dot(a: Tensor, b: Tensor, precision: str = "ieee") -> Tensor:
    """a @ b in float32, for square matrices whose size is a power of two, at least 16.

    Args:
        precision: how a GPU multiplies float32: `"ieee"` as it says, or `"tf32"` on tensor cores (Triton's default).
    """
    out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    dot_kernel[(1,)](a, b, out, SIZE=a.shape[0], PRECISION=precision)
    return out


# ------------------------------------------------------------------------------------------------------------- mistakes
# Each of these is wrong in one place. The chapter runs them, and the interpreter objects to none.


@triton.jit
def double_unmasked_kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    tl.store(p_out + o_x, 2 * b_x)


@triton.jit
def causal_softmax_of_zeros_kernel(p_x, p_out, cols, BLOCK: tl.constexpr):
    i_row = tl.program_id(0)
    o_cols = tl.arange(0, BLOCK)
    m_row = o_cols < i_row + 1
    b_x = tl.load(p_x + i_row * cols + o_cols, mask=m_row, other=0.0)
    b_p = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(p_out + i_row * cols + o_cols, b_p / tl.sum(b_p, 0), mask=m_row)


@triton.jit
def total_kernel(p_x, p_total, n, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < n, other=0.0)
    total = tl.load(p_total)
    tl.store(p_total, total + tl.sum(b_x, 0))


@triton.jit
def atomic_total_kernel(p_x, p_total, n, BLOCK: tl.constexpr):
    """The repair of `total_kernel`: the addition in memory cannot be interrupted."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < n, other=0.0)
    tl.atomic_add(p_total, tl.sum(b_x, 0))


@triton.jit
def add_kernel(p_a, p_b, p_out, n, BLOCK: tl.constexpr):
    """out = a + b. Nothing is wrong with it; in bfloat16 the interpreter is."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < n
    tl.store(p_out + o_x, tl.load(p_a + o_x, mask=m_x) + tl.load(p_b + o_x, mask=m_x), mask=m_x)


def possible_totals(parts: Sequence[int]) -> set[int]:
    """Every total that the programs of `total_kernel` can leave in memory, one part each, if they run in any order.

    A program loads the total and later stores it with its own part added. Between the two, others may do the same.
    """

    @cache
    def after(total: int, loaded: tuple[int | None, ...], done: frozenset[int]) -> frozenset[int]:
        if len(done) == len(parts):
            return frozenset([total])
        ends: set[int] = set()
        for i in set(range(len(parts))) - done:
            if loaded[i] is None:
                ends |= after(total, (*loaded[:i], total, *loaded[i + 1 :]), done)
            else:
                ends |= after(loaded[i] + parts[i], loaded, done | {i})
        return frozenset(ends)

    return set(after(0, (None,) * len(parts), frozenset()))


def as_tf32(x: Tensor) -> Tensor:
    """x ``float32`` rounded to the 10 bits of mantissa that a tensor core keeps of it in TF32 (nearest, ties away from 0).

    NVIDIA PTX ISA, section "Alternate floating-point data formats", and ``cvt.rna.tf32.f32``.
    """
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)
