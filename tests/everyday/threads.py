"""Kernels started from several threads at once. A program for the interpreter."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from flashlib import attention
from flashlib.inference import decode_attention
from flashlib.reference import check, check_gradients

THREADS, CALLS = 4, 2


def train(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(1, 2, 20, 16, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs, causal=True, backend="triton", return_lse=True)
    for comparison in (
        check(out, lse, q, k, v, causal=True),
        check_gradients(torch.autograd.grad(out, inputs, grad), q, k, v, grad, causal=True),
    ):
        assert comparison.passed, comparison.message


def decode(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, length, 16, generator=generator) for length in (1, 40, 40))
    out, lse = decode_attention(q, k, v, num_splits=3, backend="triton", return_lse=True)
    comparison = check(out, lse, q, k, v, causal=True)
    assert comparison.passed, comparison.message


def main(rng: random.Random) -> None:
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads meet inside of a kernel, not only between two
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            running = [pool.submit(call, rng.getrandbits(32)) for call in (train, decode) * THREADS * CALLS]
            for future in running:
                future.result()
    finally:
        sys.setswitchinterval(switching)
