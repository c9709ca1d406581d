"""The budgets of the checks leave room for every right way to sum."""

import secrets

import pytest
import torch

from flashlib import reference
from flashlib.course.exercises.pieces import combine64, fold_budget, merged_budget


def merged_key_by_key(q, k, v):
    """Attention in float32, one key after the other, each merged by the lse so far."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[3]), torch.full(q.shape[:3], -torch.inf)
    for key in range(k.shape[2]):
        score = (q @ k[:, :, key, :, None])[..., 0] * q.shape[3] ** -0.5
        both = torch.logaddexp(lse, score)
        out = torch.exp(lse - both)[..., None] * out + torch.exp(score - both)[..., None] * v[:, :, key, None]
        lse = both
    return out, lse


def fold_backwards(outs, lses):
    """The pieces from the last to the first, each merged by the lse so far."""
    out, lse = torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)
    for piece, piece_lse in zip(outs.flip(0), lses.flip(0), strict=True):
        both = torch.logaddexp(lse, piece_lse)
        out = torch.exp(lse - both)[..., None] * out + torch.exp(piece_lse - both)[..., None] * piece
        lse = both
    return out, lse


@pytest.mark.parametrize("spread", [1, 3, 8])
def test_merging_key_by_key_stays_far_within_the_budget(spread):
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (4, 40, 40))
        q = spread * q
        budget = merged_budget(q, k, v, pieces=40)
        errors = map(reference.largest_error, merged_key_by_key(q, k, v), reference.oracle(q, k, v))
        for name, error, allowed in zip(("out", "lse"), errors, (budget.out, budget.lse), strict=True):
            assert error < allowed / 2, f"{name}: {error:.3g} of {allowed:.3g} (seed {seed})"
        assert max(budget.out, budget.lse) < 0.01, f"{budget} hides mistakes (seed {seed})"


@pytest.mark.parametrize("height", [0, 200, -9000])
def test_folding_in_another_order_stays_far_within_the_budget(height):
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(40):
        outs, lses = torch.randn(9, 6, 3, generator=generator), torch.randn(9, 6, generator=generator) + height
        budget, exact = fold_budget(outs, lses), combine64(outs, lses)
        errors = map(reference.largest_error, fold_backwards(outs, lses), exact)
        for name, error, allowed in zip(("out", "lse"), errors, budget, strict=True):
            assert error < allowed / 2, f"{name}: {error:.3g} of {allowed:.3g} (seed {seed})"
