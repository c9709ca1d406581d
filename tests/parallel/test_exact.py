"""Random problems on two and on four ranks, forward and backward, against the float64 oracle, and against one process."""

import secrets

import pytest
import torch
from parallel_ranks import draw, loaded, whole

from flashlib.reference import check, check_gradients

PROBLEMS = 100  # on each world
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("ranks", [2, 4])
def test_random_problems(ranks, request):
    world = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks])
    first = secrets.randbits(32)
    seeds = list(range(first, first + PROBLEMS))
    answers = [loaded(answer) for answer in world.run("parallel_ranks:solve", seeds, DTYPES)]
    for at, seed in enumerate(seeds):
        problem, method, layout, grad_out, grad_lse = draw(seed, ranks, DTYPES)
        told = f"seed {seed}: {method}, {layout}, {problem}"
        parts = zip(*(answer[at]["results"] for answer in answers), strict=True)
        out, lse, *gradients = (whole(list(part), layout) for part in parts)
        comparison = check(out, lse, problem.q, problem.k, problem.v, **problem.options)
        assert comparison.passed, f"{told}: {comparison.message}"
        comparison = check_gradients(gradients, problem.q, problem.k, problem.v, grad_out, grad_lse, **problem.options)
        assert comparison.passed, f"{told}: {comparison.message}"
