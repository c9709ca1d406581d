"""The kernels of chapter 06 against float64, and its mistakes against KernelWatch. For run_interpreted.py."""

import random

import torch
import triton

from flashlib.course.chapters import first_kernels as kernels
from flashlib.course.exercises.softmax import softmax64, softmax_naive, softmax_terms
from flashlib.course.grader.exercise import budget_of
from flashlib.measure.counting.kernel_watch import KernelWatch, OutOfBoundsLoad, OutOfBoundsStore, Race, faults_raised
from flashlib.reference import largest_error

budget = budget_of(softmax_naive, softmax64, softmax_terms)


def right_kernels_are_right(rng: random.Random) -> None:
    n, block = rng.randint(1, 700), rng.choice([16, 256])
    x = torch.randn(n)
    with KernelWatch(x=x) as watch:
        assert torch.equal(kernels.double(x, block), 2 * x)
    assert watch.bytes_read["x"] == x.nbytes and watch.programs == -(-n // block)

    scores = 30 * torch.randn(rng.randint(1, 20), rng.randint(1, 70))
    for matrix in (scores, scores.T, scores[::2, 1:] if scores.shape[1] > 1 else scores):
        with KernelWatch(x=scores) as watch:
            weights = kernels.row_softmax(matrix)
        assert largest_error(weights, softmax64(matrix)) <= budget(matrix)[0]
        assert watch.bytes_read["x"] == 4 * matrix.numel() == watch.bytes_written.total()

    size = rng.randint(1, 50)
    square = 10 * torch.randn(size, size)
    hidden = square.masked_fill(~torch.ones(size, size).tril().bool(), -torch.inf)
    with KernelWatch(x=square) as watch:
        weights = kernels.causal_softmax(square)
    assert largest_error(weights, softmax64(hidden)) <= budget(hidden)[0]
    assert watch.bytes_read["x"] == 4 * size * (size + 1) // 2

    a, b = torch.randn(2, 32, 32)
    product = kernels.dot(a, b)
    rounded = torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs()).max()
    assert largest_error(product, a.double() @ b.double()) <= 32 * rounded


def mistakes_go_wrong_as_told(rng: random.Random) -> None:
    n = 256 * rng.randint(0, 3) + rng.randint(1, 250)
    x, grid = torch.randn(n), (triton.cdiv(n, 256),)
    room = torch.randn(grid[0] * 256)
    memory = torch.zeros(grid[0] * 256)
    with KernelWatch():  # both tensors end in the middle of a larger one, so nothing is out of bounds yet
        kernels.double_unmasked_kernel[grid](room, memory[:n], n, BLOCK=256)
    assert torch.equal(memory, 2 * room)
    raises(OutOfBoundsLoad, kernels.double_unmasked_kernel, grid, x, torch.empty(n), n, BLOCK=256)
    raises(OutOfBoundsStore, kernels.double_unmasked_kernel, grid, room, torch.empty(n), n, BLOCK=256)

    total = torch.zeros(1)
    kernels.total_kernel[(4,)](torch.ones(1000), total, 1000, BLOCK=256)
    assert total == 1000
    raises(Race, kernels.total_kernel, (4,), torch.ones(1000), torch.zeros(1), 1000, BLOCK=256)
    total.zero_()
    with KernelWatch():
        kernels.atomic_total_kernel[(4,)](torch.ones(1000), total, 1000, BLOCK=256)
    assert total == 1000

    weights = torch.zeros(40, 40)
    kernels.causal_softmax_of_zeros_kernel[(40,)](torch.randn(40, 40), weights, 40, BLOCK=64)
    assert (weights.sum(-1) < 0.99).all()


def the_interpreter_is_still_wrong_in_bfloat16() -> None:
    """If this fails, Triton has repaired it: change chapter 06 and `flashlib.backends.triton.interpretable`."""
    a = torch.tensor([1.5, -2.0, 3.0]).bfloat16()
    out = torch.empty_like(a)
    kernels.add_kernel[(1,)](a, a, out, 3, BLOCK=4)
    assert not torch.equal(out, a + a)
    kernels.add_kernel[(1,)](a.float(), a.float(), out32 := torch.empty(3), 3, BLOCK=4)
    assert torch.equal(out32, 2 * a.float())
    identity = torch.eye(16).bfloat16()
    assert largest_error(kernels.dot(identity, identity), torch.eye(16).double()) > 1e6


def tf32_keeps_ten_bits() -> None:
    assert torch.equal(kernels.as_tf32(torch.tensor([1 + 2**-10, -3.5, 0.0])), torch.tensor([1 + 2**-10, -3.5, 0.0]))
    assert torch.equal(kernels.as_tf32(torch.tensor([1 + 2**-11, 1 + 2**-12])), torch.tensor([1 + 2**-10, 1.0]))
    x = torch.randn(1000)
    error = (kernels.as_tf32(x) - x).abs() / x.abs()
    assert 2**-12.5 < error.max() <= 2**-11


def totals_of_racing_programs() -> None:
    assert kernels.possible_totals([5]) == {5}
    assert kernels.possible_totals([1, 2]) == {1, 2, 3}
    assert kernels.possible_totals([1, 2, 4]) == set(range(1, 8))


def raises(fault: type, kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    try:
        with KernelWatch(), faults_raised():
            kernel[grid](*args, **kwargs)
    except fault:
        return
    raise AssertionError(f"{fault.__name__} was not raised")


def main(rng: random.Random) -> None:
    right_kernels_are_right(rng)
    mistakes_go_wrong_as_told(rng)
    the_interpreter_is_still_wrong_in_bfloat16()
    tf32_keeps_ten_bits()
    totals_of_racing_programs()
