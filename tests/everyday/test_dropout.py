"""Dropout as people use it: the share that is asked for, the same pairs on every backend, and torch.manual_seed decides."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from everyday.kept_pairs import BATCH, HEADS, KEYS, ROWS, kept_pairs

from flashlib import attention
from flashlib.dropout import keep_factors
from flashlib.reference import check, check_gradients

BACKENDS = ("reference", "tiled")


def test_in_the_kernels():
    seed = random.SystemRandom().getrandbits(40)
    program = Path(__file__).parent / "interpreted_dropout.py"
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), "--seed", str(seed), "--problems", "8"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout == "8 problems within the budget\n"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_share_that_is_asked_for_is_dropped_and_the_rest_grows(backend, dropout_p, rng):
    seed = torch.tensor([rng.getrandbits(64) - 2**63])
    kept = kept_pairs(backend, seed, dropout_p)
    factors = keep_factors(seed, dropout_p, BATCH, HEADS, slice(0, ROWS), slice(0, KEYS), torch.float64)
    assert torch.equal(kept, factors > 0)
    assert torch.all((factors == 0) | (factors == 1 / (1 - dropout_p)))
    # Seven standard deviations: once in 10^11 draws.
    spread = 7 * math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
    assert abs(1 - kept.double().mean() - dropout_p) < spread
    # Rows, heads and entries of the batch draw each for themselves.
    rows = kept.flatten(0, 2)
    assert len(rows.unique(dim=0)) > 0.9 * len(rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_oracle_that_is_given_the_same_bits(backend, rng):
    q = torch.randn(2, 4, 37, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 50, 16, requires_grad=True) for _ in range(2))
    options = {"causal": True, "dropout_p": 0.3, "dropout_seed": torch.tensor([rng.getrandbits(63)])}
    out, lse = attention(q, k, v, **options, return_lse=True, backend=backend)
    assert (comparison := check(out, lse, q, k, v, **options)).passed, comparison.message
    grads = torch.randn_like(out), torch.randn_like(lse)
    comparison = check_gradients(torch.autograd.grad((out, lse), (q, k, v), grads), q, k, v, *grads, **options)
    assert comparison.passed, comparison.message


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_manual_seed_decides(backend, rng):
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind()
    number = rng.getrandbits(60)

    def two_calls():
        torch.manual_seed(number)
        return [attention(q, k, v, dropout_p=0.5, backend=backend) for _ in range(2)]

    first, again = two_calls(), two_calls()
    assert all(map(torch.equal, first, again))
    assert not torch.equal(*first)


def test_the_lse_does_not_know_of_it(rng):
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind()
    _, without = attention(q, k, v, return_lse=True, backend="tiled")
    _, lse = attention(q, k, v, return_lse=True, backend="tiled", dropout_p=0.5)
    assert torch.equal(lse, without)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1; got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0 and below 1; got -0.1"),
        ({"dropout_p": "half"}, TypeError, "dropout_p must be a number; got 'half'"),
        ({"dropout_p": 0.1, "dropout_seed": 3}, TypeError, "dropout_seed must be an int64 torch.Tensor of shape"),
        ({"dropout_p": 0.1, "dropout_seed": torch.tensor([0.5])}, TypeError, "or None; got torch.float32"),
        (
            {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64, device="meta")},
            TypeError,
            "dropout_seed is on meta but q is on cpu; all must be on one device",
        ),
    ],
)
def test_bad_input_is_named(options, error, message):
    q, k, v = torch.randn(3, 1, 2, 5, 16).unbind()
    with pytest.raises(error, match=message):
        attention(q, k, v, **options)
