"""An error budget is a finite number, or there is none and the check fails; and a check fails in every mode of Python."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashlib
from flashlib import attention, reference
from flashlib.reference import (
    ErrorBudget,
    assert_gradients_within_budget,
    assert_within_budget,
    check,
    check_gradients,
    error_budget,
)

# dtype, and how large q and k are: scores of fp16 overflow from 65,520 on.
OVERFLOWING = ((torch.float16, 300.0), (torch.float16, 2000.0))
LARGE = (*OVERFLOWING, (torch.bfloat16, 1e4), (torch.float32, 1e4), (torch.float32, 1e18), (torch.float64, 1e6))


def draw(dtype: torch.dtype, size: float) -> list[torch.Tensor]:
    q, k, v = (torch.randn(1, 2, 17, 16) for _ in range(3))
    return [(q * size).to(dtype), (k * size).to(dtype), v.to(dtype)]


@pytest.mark.parametrize(("dtype", "size"), LARGE)
@pytest.mark.parametrize("backend", ["tiled", "torch_sdpa_math"])
def test_large_inputs_have_a_budget_that_right_results_are_within(dtype, size, backend, rng):
    q, k, v = (x.requires_grad_() for x in draw(dtype, size))
    out = attention(q, k, v, backend=backend)
    assert_within_budget(out, q, k, v)
    grad = torch.randn_like(out)
    assert_gradients_within_budget(torch.autograd.grad(out, (q, k, v), grad), q, k, v, grad)


@pytest.mark.parametrize(("dtype", "size"), LARGE)
def test_and_that_nothing_else_is(dtype, size, rng):
    q, k, v = draw(dtype, size)
    budget = error_budget(q, k, v)
    assert math.isfinite(budget.out) and math.isfinite(budget.lse)
    # Scores this large pick one key, mostly, and what comes out is its v. No budget may reach from there to everywhere.
    assert budget.out < 20 * v.abs().max()
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert not check(torch.full_like(v, wrong), None, q, k, v).passed
        grad = torch.randn_like(v)
        assert not check_gradients([torch.full_like(x, wrong) for x in (q, k, v)], q, k, v, grad).passed


def test_sums_over_rows_are_redrawn_too(monkeypatch):
    """In float64 naive attention in the order of the oracle makes no error at all, and who sums dV in another order makes one."""
    q, k, v, grad = (torch.zeros(1, 3, rows, 8, dtype=torch.float64) for rows in (31, 4, 4, 31))
    grad.normal_()
    right = torch.zeros_like(q), torch.zeros_like(k), (grad.flip(2).cumsum(2)[:, :, -1:] / 4).expand(v.shape)
    redrawn = check_gradients(right, q, k, v, grad)
    assert redrawn.passed and redrawn.error["dv"] > 0
    monkeypatch.setattr(reference, "REORDERINGS", 0)
    assert redrawn.budget["dv"] > check_gradients(right, q, k, v, grad).budget["dv"]


@pytest.mark.parametrize(("dtype", "size"), OVERFLOWING)
def test_the_budget_of_scores_that_overflow_is_that_of_wider_scores(dtype, size, rng):
    """As tight as that of the same numbers in float32, but for what rounding weights and results to 16 bits costs."""
    q, k, v = draw(dtype, size)
    wide = error_budget(q.float(), k.float(), v.float())
    rounding = torch.finfo(dtype).eps * float(v.abs().max())
    assert error_budget(q, k, v).out <= 3 * wide.out + 8 * rounding
    assert not check(attention(q, k, v, backend="reference"), None, q, k, v).passed  # the formula in fp16: NaN


def unbounded():
    """Inputs without a budget: scores that overflow float32 and float64; a NaN and an infinity that is seen."""
    yield draw(torch.float32, 1e20)
    yield draw(torch.float64, 1e160)
    yield draw(torch.float64, 1e100)  # they do not, but what a rounding of theirs does to a weight does
    for value in (torch.nan, torch.inf):
        for which in range(3):
            inputs = draw(torch.float32, 1.0)
            inputs[which][0, 0, 5, 3] = value
            yield inputs


@pytest.mark.parametrize("number", range(9))
def test_where_there_is_no_budget_everything_fails(number, rng):
    q, k, v = list(unbounded())[number]
    out, grad = torch.zeros_like(v), torch.zeros_like(v)
    with pytest.raises(ValueError, match="there is no error budget for out"):
        error_budget(q, k, v)
    with pytest.raises(ValueError, match="there is no error budget for out"):
        assert_within_budget(out, q, k, v)
    with pytest.raises(ValueError, match="there is no error budget for d[qkv]"):
        assert_gradients_within_budget((q, k, v), q, k, v, grad + 1)


def test_what_nobody_sees_may_be_anything(rng):
    q, k, v = draw(torch.float16, 300.0)
    k[:, :, 9:], v[:, :, 9:] = torch.nan, torch.inf
    budget = error_budget(q, k, v, mask=flashlib.masks.KeyLengths([9]))
    assert isinstance(budget, ErrorBudget) and math.isfinite(budget.out)


def test_without_assert_statements_checks_still_raise():
    program = """
import torch
from flashlib import reference
q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
calls = {
    "out": lambda: reference.assert_within_budget(torch.zeros(1, 1, 4, 8), q, k, v),
    "gradients": lambda: reference.assert_gradients_within_budget((q, k, v), q, k, v, q),
}
for name, call in calls.items():
    try:
        call()
    except AssertionError as error:
        print(name, "OUTSIDE" in str(error))
"""
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["out True", "gradients True"]


def tells_a_type(test: ast.expr) -> bool:
    """Whether an assert only says ``x is not None``, for the type checker, of what the line before it has made sure of."""
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.ops[0], ast.IsNot)
        and ast.unparse(test.comparators[0]) == "None"
    )


def test_no_check_of_the_package_is_an_assert_statement():
    for file in Path(flashlib.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert) and not tells_a_type(node.test)]
        assert not found, f"{file}: python -O leaves the asserts of lines {found} out; raise an error"
        debug = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "__debug__"]
        assert not debug, f"{file}, line {debug}"
