"""Every backend, on random problems, forward and backward, against the float64 oracle."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import random_problem

from flashlib import BackendUnavailableError, attention
from flashlib.backends import BACKENDS, available
from flashlib.config import FlashAttentionConfig
from flashlib.reference import check, check_gradients

RUNNABLE = [name for name, missing in available().items() if missing is None]
EXAMPLES = 300


def test_the_cpu_backends_are_among_those_tested():
    assert {"reference", "tiled", "torch_sdpa_math", "torch_sdpa_flash"} <= set(RUNNABLE)


def supported_problem(backend: str, rng: random.Random):
    """A random problem that the backend runs: what it refuses is changed until it does, so that no example is wasted."""
    while True:
        problem = random_problem(rng)
        if backend.startswith("torch_sdpa"):
            problem.options.pop("softcap", None)
            problem.options.pop("alibi_slopes", None)
        if BACKENDS[backend].why_not(problem.spec, FlashAttentionConfig()) is None:
            return problem


@pytest.mark.parametrize("backend", RUNNABLE)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_outputs_and_gradients(backend, rng):
    problem = supported_problem(backend, rng)
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    wants_lse = not backend.startswith("torch_sdpa")
    result = attention(q, k, v, **problem.options, backend=backend, return_lse=wants_lse)
    out, lse = result if wants_lse else (result, None)
    comparison = check(out, lse, q, k, v, **problem.options)
    assert comparison.passed, f"{problem}: {comparison.message}"

    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(lse.dtype) if wants_lse else None
    outputs, grads = ((out, lse), (grad_out, grad_lse)) if wants_lse else ((out,), (grad_out,))
    gradients = torch.autograd.grad(outputs, (q, k, v), grads)
    comparison = check_gradients(gradients, q, k, v, grad_out, grad_lse, **problem.options)
    # PyTorch's fused kernels recompute weights by an exponential that is right to 20 units in the last place, and rows of a single key, where
    # naive attention is exact, show it: dv at 1.13 of the budget was seen. What is held here is that they are asked the right question.
    slack = 2 if backend in ("torch_sdpa_flash", "torch_sdpa_efficient", "torch_sdpa_cudnn") else 1
    assert all(error <= slack * comparison.budget[name] for name, error in comparison.error.items()), (
        f"{problem}: {comparison.message}"
    )


def test_a_named_backend_runs_or_raises():
    q = torch.randn(1, 1, 4, 8)
    for backend, missing in available().items():
        if missing is not None:
            with pytest.raises(BackendUnavailableError, match=backend):
                attention(q, q, q, backend=backend)
    with pytest.raises(BackendUnavailableError, match="does not return the LSE"):
        attention(q, q, q, backend="torch_sdpa_math", return_lse=True)
