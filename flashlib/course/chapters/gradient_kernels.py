"""One kernel for chapter 09: programs that meet in one sum, with and without an atomic. Runs in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
