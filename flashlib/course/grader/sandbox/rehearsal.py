"""A first launch in Triton's interpreter loads much, for which no child should pay time or memory: the zygote makes it."""

import torch
import triton
import triton.language as tl

from flashlib.measure.counting.kernel_watch import KernelWatch


@triton.jit
def _add_to_total(p_x, p_total, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(p_x + offsets, mask=offsets < n, other=0.0)
    tl.store(p_total, tl.sum(values, 0))


def rehearse_kernel() -> None:
    """Launch a small kernel once, watched."""
    with KernelWatch():
        _add_to_total[(1,)](torch.ones(3), torch.empty(1), 3, BLOCK=4)
