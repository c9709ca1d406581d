"""The kernel of chapter 09, with and without its atomic. Run with TRITON_INTERPRET=1."""

import random

import torch

from flashlib.course.gradient_kernels import sum_of_parts
from flashlib.course.gradients import sum_in_order
from flashlib.course.kernel_watch import KernelWatch, Race, faults_raised


def main() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    torch.manual_seed(seed)
    parts = torch.randn(random.Random(seed).randint(2, 9), 100)
    order = torch.randperm(len(parts))
    with KernelWatch():
        total = sum_of_parts(parts, order)
    assert torch.equal(total, sum_in_order(parts, order))
    try:
        with KernelWatch(), faults_raised():
            sum_of_parts(parts, order, atomic=False)
    except Race:
        print("all as expected")


if __name__ == "__main__":
    main()
