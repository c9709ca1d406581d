"""Gates that are learned begin at 0: their gradient is the right limit there, and no number that ends a training."""

import math

import pytest
import torch

from flashlib.config import InjectionConfig
from flashlib.inference import KVInjector, Memory
from flashlib.masks import KeyLengths


def draw(**options) -> tuple[list[torch.Tensor], Memory]:
    q, k, v = (torch.randn(2, 2, 3, 16, **options) for _ in range(3))
    return [q, k, v], Memory(torch.randn(1, 2, 4, 16, **options), torch.randn(1, 2, 4, 16, **options))


@pytest.mark.parametrize("mode", ["gate", "blend"])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_rows_without_own_keys_give_a_gate_at_0_no_gradient_that_explodes(mode, backend, rng):
    """The second request sees no key of its own. In mode gate any alpha above 0 gives it the whole memory: nothing changes there."""
    inputs, memory = draw()
    injector = KVInjector(InjectionConfig(mode=mode), backend=backend)
    mask = KeyLengths([3, 0])

    def gradient(value: float) -> torch.Tensor:
        alpha = torch.full((2, 2), value, requires_grad=True)
        injector.inject(*inputs, memory, alpha=alpha, mask=mask).sum().backward()
        return alpha.grad

    closed, ajar = gradient(0.0), gradient(1e-4)
    torch.testing.assert_close(closed, ajar, rtol=2e-2, atol=1e-3)
    assert closed[0].all() and (mode == "blend" or not closed[1].any())


@pytest.mark.parametrize("mode", ["gate", "blend"])
def test_all_gradients_are_finite_where_one_side_or_both_are_empty(mode, rng):
    for own in ([0, 0], [3, 0]):
        for length in (0, 4):
            for value in (-0.5, 0.0, 1e-30, 0.5):
                inputs, memory = draw()
                memory = Memory(memory.k[:, :, :length], memory.v[:, :, :length])
                alpha = torch.tensor(value, requires_grad=True)
                leaves = [*inputs, memory.k, memory.v]
                for leaf in leaves:
                    leaf.requires_grad_()
                injector = KVInjector(InjectionConfig(mode=mode), backend="tiled")
                out = injector.inject(*inputs, memory, alpha=alpha, mask=KeyLengths(own))
                out.square().sum().backward()
                for x in (out, alpha.grad, *(leaf.grad for leaf in leaves if leaf.grad is not None)):
                    assert x.isfinite().all(), f"own {own}, memory {length}, alpha {value}"


def test_a_gate_below_0_mirrors_one_above(rng):
    """Far below, too: a memory that a row needs does not come through a gate that is shut."""
    inputs, memory = draw(dtype=torch.float64)
    injector = KVInjector(InjectionConfig(mode="gate"), backend="reference")

    def change(alpha: float) -> torch.Tensor:
        out = injector.inject(*inputs, memory, alpha=torch.tensor(alpha))
        return out - injector.inject(*inputs, memory, alpha=0.0)

    for alpha in (1e-6, 0.1, 0.5, 1.0, math.e, 100.0):
        torch.testing.assert_close(change(-alpha), -change(alpha), rtol=1e-4, atol=1e-6)
