"""The tiled algorithm: any tile size, both loop orders, whole tiles skipped, linear memory, exact gradients."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import random_problem

from flashlib import masks
from flashlib.backends.pytorch import tiled_attention
from flashlib.measure.counting.meter import TrafficMeter
from flashlib.reference import check, check_gradients, naive_attention
from flashlib.tiled import LOOP_ORDERS, Tiling


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rng=st.randoms(use_true_random=False),
    block_q=st.sampled_from((1, 3, 16, 33, 500)),
    block_k=st.sampled_from((2, 5, 16, 64, 500)),
    loop_order=st.sampled_from(LOOP_ORDERS),
)
def test_any_tiling_within_budget(rng, block_q, block_k, loop_order):
    problem = random_problem(rng, lengths=(0, 1, 7, 17, 40), head_dims=(8, 59))
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    tiling = {"block_q": block_q, "block_k": block_k, "loop_order": loop_order}
    out, lse = tiled_attention(q, k, v, **problem.options, **tiling, return_lse=True)
    comparison = check(out, lse, q, k, v, **problem.options)
    assert comparison.passed, f"{problem}: {comparison.message}"
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    gradients = torch.autograd.grad((out, lse), (q, k, v), grads)
    comparison = check_gradients(gradients, q, k, v, *grads, **problem.options)
    assert comparison.passed, f"{problem}: {comparison.message}"


@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(loop_order, softcap, causal):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 1, 5, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    options = {"mask": masks.KeyLengths([5, 3]), "causal": causal, "softcap": softcap}

    def run(q, k, v):
        return tiled_attention(q, k, v, **options, block_q=2, block_k=3, loop_order=loop_order, return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
def test_skipped_tiles_are_not_read(loop_order):
    """Under a window the bytes of K read grow with the window, not with the sequence."""
    tokens, block, window = 512, 32, 32
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, tokens, 16, generator=generator) for _ in range(3))
    mask = masks.Window(window, 0)
    visited = int((mask.intervals(1, tokens, tokens).tile_map(block, block) != masks.Tile.SKIP).sum())
    with TrafficMeter(k=k) as meter:
        tiled_attention(q, k, v, mask=mask, block_q=block, block_k=block, loop_order=loop_order)
    assert visited < 2.1 * tokens / block
    assert meter.bytes_read["k"] >= visited * block * 16 * 4
    assert meter.bytes_read["k"] < 3 * visited * block * 16 * 4


@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
def test_no_large_tensor_at_4096_tokens(loop_order):
    """Memory is linear: no tensor over N * max(tile, head_dim) * heads, where naive attention makes N * N * heads."""
    tokens, heads, dim, block = 4096, 1, 64, 128
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(3))
    with TrafficMeter() as tiled:
        tiled_attention(q, k, v, causal=True, block_q=block, block_k=block, loop_order=loop_order)
    assert tiled.largest.elements <= tokens * max(block, dim) * heads
    with TrafficMeter() as naive:
        naive_attention(q, k, v, causal=True)
    assert naive.largest.elements == tokens * tokens * heads


def test_backward_is_linear_too():
    tokens, heads, dim, block = 1024, 2, 32, 64
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator, requires_grad=True) for _ in range(3))
    with TrafficMeter() as meter:
        tiled_attention(q, k, v, causal=True, block_q=block, block_k=block).sum().backward()
    assert meter.largest.elements <= tokens * max(block, dim) * heads


def test_the_tiling_of_one_seed_repeats_bitwise():
    problem = random_problem(random.Random(5), lengths=(65,))
    first, second = (tiled_attention(problem.q, problem.k, problem.v, **problem.options) for _ in range(2))
    assert torch.equal(first, second)


BAD = [
    ({"block_q": 0}, ValueError, "block_q must be a whole number of at least 1; got 0"),
    ({"block_k": 2.5}, ValueError, "block_k must be a whole number of at least 1; got 2.5"),
    ({"loop_order": "diagonal"}, ValueError, "loop_order must be one of q_outer, kv_outer; got 'diagonal'"),
]


@pytest.mark.parametrize("options, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(options, error, message):
    q = torch.randn(1, 1, 4, 8)
    for call in (lambda: tiled_attention(q, q, q, **options), lambda: Tiling(**options)):
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value)


def test_a_second_derivative_is_refused():
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(tiled_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="tiled attention has no second derivative; the backends 'reference'"):
        torch.autograd.grad(gradient.sum(), q)
