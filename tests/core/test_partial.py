"""The merge is a commutative monoid, safe at the infinities, and differentiable."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlib import Partial, attention
from flashlib.masks import Causal
from flashlib.partial import fold, merge
from flashlib.reference import assert_within_budget, naive_attention, oracle_gradients

ROWS, DIM = 6, 3


def close(a: Partial, b: Partial) -> bool:
    """Equal up to the rounding of float64 arithmetic on numbers of order 1."""
    return all(
        torch.allclose(x, y, rtol=1e-12, atol=1e-12, equal_nan=True) for x, y in ((a.out, b.out), (a.lse, b.lse))
    )


def same_bits(a: Partial, b: Partial) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in ((a.out, b.out), (a.lse, b.lse)))


@st.composite
def partials(draw, overflow=True):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    out = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    special = [0.0, -800.0, 800.0, float("-inf")] + ([float("inf")] if overflow else [])
    lse = torch.tensor(draw(st.lists(st.sampled_from(special), min_size=ROWS, max_size=ROWS)), dtype=torch.float64)
    lse = lse + torch.randn(ROWS, generator=generator, dtype=torch.float64)
    garbage = (lse == float("-inf"))[:, None]  # what an empty piece's output holds must not matter
    return Partial(out.masked_fill(garbage, float("nan")), lse)


@settings(max_examples=300, deadline=None)
@given(a=partials(), b=partials(), c=partials())
def test_commutative_and_associative(a, b, c):
    assert same_bits(merge(a, b), merge(b, a))
    assert close(merge(merge(a, b), c), merge(a, merge(b, c)))


@settings(max_examples=200, deadline=None)
@given(a=partials())
def test_identity_is_exact(a):
    nothing = Partial.identity(ROWS, DIM, dtype=torch.float64)
    visible = Partial(a.out.masked_fill((a.lse == float("-inf"))[:, None], 0.0), a.lse)
    assert same_bits(merge(a, nothing), visible)
    assert same_bits(merge(nothing, a), visible)
    assert same_bits(merge(nothing, nothing), nothing)


@settings(max_examples=200, deadline=None)
@given(a=partials(overflow=False), b=partials(overflow=False))
def test_no_nan_without_an_overflow(a, b):
    merged = merge(a, b)
    assert not merged.out.isnan().any()
    assert not merged.lse.isnan().any()


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(partials(), min_size=1, max_size=9), seed=st.integers(0, 2**32))
def test_any_order_and_any_grouping_give_the_same(pieces, seed):
    """Splits may come in any order, and be merged as a list or as any tree."""
    draw, waiting = random.Random(seed), [Partial.identity(ROWS, DIM, dtype=torch.float64), *pieces]
    expected = fold(waiting)
    while len(waiting) > 1:
        a, b = (waiting.pop(draw.randrange(len(waiting))) for _ in range(2))
        waiting.append(merge(a, b))
    assert close(waiting[0], expected)


def test_two_empty_pieces_are_empty_and_have_no_gradient():
    inf = float("inf")
    outs = [torch.full((4, DIM), value, requires_grad=True) for value in (float("nan"), 7.0)]
    lses = [torch.full((4,), -inf, requires_grad=True) for _ in range(2)]
    merged = merge(*map(Partial, outs, lses))
    assert torch.equal(merged.out, torch.zeros(4, DIM))
    assert torch.equal(merged.lse, torch.full((4,), -inf))
    merged.out.sum().backward()
    for x in (*outs, *lses):
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_an_overflowed_piece_wins_and_two_are_undecided():
    inf = float("inf")
    a = Partial(torch.tensor([[1.0], [1.0]]), torch.tensor([inf, inf]))
    b = Partial(torch.tensor([[2.0], [2.0]]), torch.tensor([5.0, inf]))
    merged = merge(a, b)
    assert merged.out[0].item() == 1.0
    assert merged.out[1].isnan().item()
    assert merged.lse.tolist() == [inf, inf]


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_attention_over_pieces_is_attention(pieces):
    generator = torch.Generator().manual_seed(pieces)
    q, k, v = (torch.randn(2, 3, 20, 16, generator=generator) for _ in range(3))
    results = [
        Partial(*attention(q, k[:, :, part], v[:, :, part], return_lse=True, backend="tiled"))
        for part in torch.arange(20).tensor_split(pieces)
    ]
    merged = fold(results)
    assert_within_budget(merged.out, q, k, v, lse=merged.lse)


@pytest.mark.parametrize("splits", [2, 133])
def test_many_splits_of_few_keys_stay_within_the_budget(splits):
    """Most of the 133 are empty. Scores of all sizes, so that splits are far apart."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator) for length in (4, 60, 60))
    q = q * 10.0 ** torch.arange(-1, 3)[:, None]
    results = [
        Partial(*attention(q, k[:, :, part], v[:, :, part], return_lse=True, backend="tiled"))
        for part in torch.arange(60).tensor_split(splits)
    ]
    merged = fold(results)
    assert_within_budget(merged.out, q, k, v, lse=merged.lse)


def test_gradients_through_the_pieces_are_those_of_attention():
    """Of q, k and v, with one piece that no row sees and rows that see nothing of some pieces."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 12, 8), (2, 3, 20, 8), (2, 3, 20, 5), (2, 3, 12, 5))
    q, k, v, grad_out = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    expected = oracle_gradients(q, k, v, grad_out, mask=Causal(0))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    pieces = [
        Partial(*naive_attention(q, k[:, :, part], v[:, :, part], mask=Causal(-part.start), return_lse=True))
        for part in (slice(0, 3), slice(3, 10), slice(10, 20))
    ]
    results = torch.autograd.grad(fold(pieces).out, inputs, grad_out)
    for result, exact in zip(results, expected, strict=True):
        assert torch.allclose(result, exact, rtol=1e-10, atol=1e-12)


def test_gradcheck_with_empty_and_distant_pieces():
    generator = torch.Generator().manual_seed(0)
    out_a, out_b = (torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inf = float("inf")
    finite_a = torch.tensor([0.3, -2.0, 40.0], dtype=torch.float64, requires_grad=True)
    finite_b = torch.tensor([0.1, 3.0, -1.0], dtype=torch.float64, requires_grad=True)

    def merged(out_a, finite_a, out_b, finite_b):
        lse_a = torch.cat([finite_a, finite_a.new_tensor([-inf, -inf])])
        lse_b = torch.cat([finite_b, finite_b.new_tensor([0.5, -inf])])
        result = merge(Partial(out_a, lse_a), Partial(out_b, lse_b))
        return result.out, result.lse.masked_fill(result.lse == -inf, 0.0)

    assert torch.autograd.gradcheck(merged, (out_a, finite_a, out_b, finite_b))


def test_gradient_of_infinite_lse_is_not_nan():
    for lse in (float("-inf"), float("inf")):
        values = torch.full((2,), lse, requires_grad=True)
        other = torch.zeros(2, requires_grad=True)
        result = merge(Partial(torch.ones(2, 1), values), Partial(torch.ones(2, 1), other))
        result.out.sum().backward()
        assert values.grad.isfinite().all()
        assert other.grad.isfinite().all()


BAD = [
    (lambda: Partial(torch.zeros(2, 3), torch.zeros(3)), ValueError, "out has shape (2, 3) and lse (3,)"),
    (
        lambda: Partial(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2)),
        TypeError,
        "floating point; got torch.int64",
    ),
    (lambda: merge(Partial.identity(2, 3), Partial.identity(2, 4)), ValueError, "shapes (2, 3) and (2, 4)"),
    (lambda: fold([]), ValueError, "fold needs at least one Partial"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
