"""The kernel of chapter 09, with and without its atomic. For run_interpreted.py."""

import random

import torch

from flashlib.course.chapters.gradient_kernels import sum_of_parts
from flashlib.course.chapters.gradients import sum_in_order
from flashlib.measure.counting.kernel_watch import KernelWatch, Race, faults_raised


def main(rng: random.Random) -> None:
    parts = torch.randn(rng.randint(2, 9), 100)
    order = torch.randperm(len(parts))
    with KernelWatch():
        total = sum_of_parts(parts, order)
    assert torch.equal(total, sum_in_order(parts, order))
    try:
        with KernelWatch(), faults_raised():
            sum_of_parts(parts, order, atomic=False)
    except Race:
        return
    raise AssertionError("programs that store without an atomic were not told apart")
