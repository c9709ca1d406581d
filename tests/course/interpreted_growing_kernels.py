"""The stages of chapter 07's kernel against float64. For run_interpreted.py."""

import random

import torch
import triton.language as tl

from flashlib.course.chapters import growing_kernels as growing
from flashlib.measure.counting.kernel_watch import KernelWatch, faults_raised
from flashlib.reference import check


def draw(q_shape, kv_shape, dtype=torch.float32):
    return tuple(torch.randn(shape).to(dtype) for shape in (q_shape, kv_shape, kv_shape))


def hold(out, lse, q, k, v) -> None:
    q, k, v, out = (x if x.ndim == 4 else x[None, None] for x in (q, k, v, out))
    comparison = check(out, lse, q, k, v)
    assert comparison.passed, comparison.message


def one_head() -> None:
    inputs = draw((32, 16), (64, 16))
    hold(growing.one_tile(*inputs), None, *inputs)
    hold(growing.over_keys(*inputs, block_n=16), None, *inputs)
    for lengths in ((75, 101, 24), (9, 130, 16), (1, 1, 40)):
        inputs = draw((lengths[0], lengths[2]), (lengths[1], lengths[2]))
        hold(growing.over_rows(*inputs, 32, 64), None, *inputs)


def heads() -> None:
    for dtype in (torch.float32, torch.float16):
        q, k, v = draw((2, 4, 45, 24), (2, 2, 70, 24), dtype)
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        for stage in (growing.over_heads, growing.in_base_2):
            hold(*stage(q, k, v, 32, 32), q, k, v)


def half_accumulators_are_outside_of_the_budget() -> None:
    q, k, v = draw((1, 1, 16, 16), (1, 1, 512, 16), torch.float16)
    v = v + 200
    out, lse = growing.over_heads(q, k, v, 16, 32, accumulate=tl.float16)
    assert not check(out, lse, q, k, v).passed


def main(rng: random.Random) -> None:
    with KernelWatch(), faults_raised():
        one_head()
        heads()
        half_accumulators_are_outside_of_the_budget()
