"""Calls from several threads. In the interpreter one kernel changes what the others would run, so they must take turns."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashlib import attention
from flashlib.inference import decode_attention
from flashlib.reference import check


def test_in_the_interpreter(in_the_interpreter):
    in_the_interpreter("threads")


@pytest.mark.parametrize("backend", ["reference", "tiled", "torch_sdpa_math"])
def test_backends(backend, rng):
    def call(seed: int):
        q, k, v = (torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(seed + n)) for n in range(3))
        decoded = decode_attention(q[:, :, -1:], k, v, backend="torch")
        return q, k, v, attention(q, k, v, causal=True, backend=backend), decoded

    with ThreadPoolExecutor(4) as pool:
        for q, k, v, out, decoded in pool.map(call, range(0, 60, 3)):
            assert check(out, None, q, k, v, causal=True).passed
            assert check(decoded, None, q[:, :, -1:], k, v, causal=True).passed


def test_pytorchs_switches_are_left_as_they_were():
    """Each backend of PyTorch's turns the other kernels off for its call, and the switches are one set for all threads."""
    asked = [
        getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in ("flash", "mem_efficient", "math", "cudnn")
    ]
    before = [enabled() for enabled in asked]
    assert any(before)
    q = torch.randn(1, 2, 9, 16)
    backends = ("torch_sdpa_math", "torch_sdpa_flash")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: attention(q, q, q, backend=backends[number % 2]), range(400)))
    assert [enabled() for enabled in asked] == before
