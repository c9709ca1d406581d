"""Chapter 06: two small kernels, and the sectors that a load touches. Their kernels run in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong


def _launch_flat(kernel, arguments: tuple) -> Tensor:
    """Launch over x ``[n]`` in programs of 8 lanes; beyond the n results lie four numbers that are nobody's."""
    x, n = arguments
    memory = torch.full((n + 4,), torch.nan)
    kernel[(triton.cdiv(n, 8),)](x, memory, n, BLOCK=8)
    return memory


@triton.jit
def square_kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < n)
    tl.store(p_out + o_x, b_x * b_x, mask=o_x < n)


@triton.jit
def _square_unmasked(p_x, p_out, n, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < n, other=0.0)
    tl.store(p_out + o_x, b_x * b_x, mask=o_x < n + 4)


@triton.jit
def _square_first_block(p_x, p_out, n, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < n)
    tl.store(p_out + o_x, b_x * b_x, mask=o_x < n)


@triton.jit
def _square_without_block(p_x, p_out, n, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < n)
    tl.store(p_out + o_x, b_x * b_x, mask=o_x < n)


def _launch_rows(kernel, arguments: tuple) -> Tensor:
    (x,) = arguments
    out = torch.full((x.shape[0],), torch.nan)
    kernel[(x.shape[0],)](x, out, x.stride(0), x.stride(1), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


@triton.jit
def row_max_kernel(p_x, p_out, stride_row, stride_col, cols, BLOCK: tl.constexpr):
    i_row, o_cols = tl.program_id(0), tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_row * stride_row + o_cols * stride_col, mask=o_cols < cols, other=float("-inf"))
    tl.store(p_out + i_row, tl.max(b_x, 0))


@triton.jit
def _row_max_of_zeros(p_x, p_out, stride_row, stride_col, cols, BLOCK: tl.constexpr):
    i_row, o_cols = tl.program_id(0), tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_row * stride_row + o_cols * stride_col, mask=o_cols < cols, other=0.0)
    tl.store(p_out + i_row, tl.max(b_x, 0))


@triton.jit
def _row_max_contiguous(p_x, p_out, stride_row, stride_col, cols, BLOCK: tl.constexpr):
    i_row, o_cols = tl.program_id(0), tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_row * stride_row + o_cols, mask=o_cols < cols, other=float("-inf"))
    tl.store(p_out + i_row, tl.max(b_x, 0))


@triton.jit
def _row_max_of_the_first(p_x, p_out, stride_row, stride_col, cols, BLOCK: tl.constexpr):
    o_cols = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_cols * stride_col, mask=o_cols < cols, other=float("-inf"))
    tl.store(p_out + tl.program_id(0), tl.max(b_x, 0))


def _matrices(generator: torch.Generator) -> list[tuple]:
    """Far below zero, so that a lane that holds 0 shows; as it is, transposed, and a slice of a wider one."""
    wide = torch.randn(6, 9, generator=generator) - 20
    return [(wide,), (wide.T,), (wide[:, 2:7],)]


def sectors(addresses: list[int]) -> int:
    return len({address // 32 for address in addresses})


TASKS = (
    Task(
        "06-square",
        "square_kernel",
        square_kernel,
        (
            Wrong("the store is not masked by n", "What lies behind the end of out is somebody else's.", _square_unmasked),
            Wrong("every program squares the first block", "Which part of the data is mine? The program id says.", _square_first_block),
            Wrong("the blocks lie one element apart", "Program i begins at i * BLOCK.", _square_without_block),
        ),
        lambda g: [(torch.randn(n, generator=g), n) for n in (8, 20, 3)],
        _launch_flat,
        lines=3,
    ),
    Task(
        "06-row-max",
        "row_max_kernel",
        row_max_kernel,
        (
            Wrong("masked lanes hold 0", "A lane without an element must never be the maximum.", _row_max_of_zeros),
            Wrong("the columns' stride is left out", "The entries of a row lie stride_col apart.", _row_max_contiguous),
            Wrong("every program reads the first row", "Row i begins at i * stride_row.", _row_max_of_the_first),
        ),
        _matrices,
        _launch_rows,
    ),
    Task(
        "06-sectors",
        "sectors",
        sectors,
        (
            Wrong("each address is fetched by itself", "What lies in the same 32 bytes comes along.", len),
            Wrong("bytes were counted, and divided by 32", "Addresses may lie far apart, or be the same.", lambda addresses: -(-4 * len(addresses) // 32)),
            Wrong("from the first address to the last", "Only sectors that hold one of the addresses are fetched.", lambda a: max(a) // 32 - min(a) // 32 + 1),
        ),
        lambda g: [
            (list(range(0, 128, 4)),), (list(range(0, 32 * 256, 256)),), (list(range(16, 144, 4)),), ([0, 0, 4, 64],), (list(range(0, 256, 8)),),
        ],
        lines=1,
    ),
)  # fmt: skip
