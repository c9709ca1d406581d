"""Calls in which there is nothing: no sequences, no query heads, no rows, no keys. A program for the interpreter, too."""

import random

import torch

from flashlib import attention, masks, reference
from flashlib.backends.pytorch import tiled_attention
from flashlib.config import InjectionConfig
from flashlib.inference import (
    KVCache,
    KVInjector,
    Memory,
    SharedPrefix,
    decode_attention,
    shared_prefix_attention,
)
from flashlib.inference.decode import combine_splits, split_partials
from flashlib.interop.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

# batch, query heads, KV heads, rows, keys
EMPTY = {
    "no sequence": (0, 2, 2, 3, 4),
    "no query head": (2, 0, 2, 3, 4),
    "no row": (2, 2, 2, 0, 4),
    "no key": (2, 4, 2, 3, 0),
    "nothing": (0, 0, 1, 0, 0),
}
DIM = 16


def draw(batch: int, q_heads: int, kv_heads: int, q_len: int, kv_len: int) -> list[torch.Tensor]:
    kv_shape = (batch, kv_heads, kv_len, DIM)
    return [torch.randn(shape) for shape in ((batch, q_heads, q_len, DIM), kv_shape, kv_shape)]


def expect_nothing(out: torch.Tensor, shape: tuple[int, ...], said: str) -> None:
    """Of this shape; and where rows have no keys, 0."""
    assert out.shape == shape and not out.any(), f"{said}: {out}"


def training_holds(backend: str) -> None:
    for what, sizes in EMPTY.items():
        batch, q_heads, _, q_len, kv_len = sizes
        shape = (batch, q_heads, q_len, DIM)
        rules = [
            *(masks.Unmasked(), masks.Causal(), masks.Window(1, 1), masks.Prefix(1)),
            *(masks.KeyLengths([min(2, kv_len)] * batch), masks.Causal(offset=torch.zeros(batch, dtype=torch.int64))),
            *(masks.Varlen([0, q_len], [0, kv_len]), masks.Documents([0] * q_len, [0] * kv_len)),
        ]
        for mask in rules:
            said = f"{backend}, {what}, {mask}"
            q, k, v = (x.requires_grad_() for x in draw(*sizes))
            expect_nothing(attention(q.detach(), k.detach(), v.detach(), mask=mask, backend=backend), shape, said)
            out = attention(q, k, v, mask=mask, backend=backend)
            expect_nothing(out, shape, said)
            for gradient, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
                expect_nothing(gradient, x.shape, said)


def decoding_holds(backend: str) -> None:
    for what, sizes in EMPTY.items():
        batch, q_heads, kv_heads, q_len, kv_len = sizes
        (q, k, v), shape = draw(*sizes), (batch, q_heads, q_len, DIM)
        lengths = torch.zeros(batch, dtype=torch.int64)
        ways = [{"num_splits": 3}, {"split_size": 16}, {"window": (1, 1), "causal": False}, {}]
        for options in ways:
            out = decode_attention(q, k, v, lengths=lengths, **options, backend=backend)
            expect_nothing(out, shape, f"{backend}, {what}, {options}")
            assert decode_attention(q, k, v, **options, backend=backend).shape == shape
        pages = torch.randn(5, kv_heads, 4, DIM)
        table = torch.zeros(batch, 0 if kv_len == 0 else 1, dtype=torch.int32)
        options = {"block_table": table, "lengths": lengths, "backend": backend}
        expect_nothing(decode_attention(q, pages, pages, **options), shape, f"{backend}, {what}, paged")
        out, lse = combine_splits(torch.randn(2, *shape), torch.randn(2, *shape[:3]), backend=backend)
        assert out.shape == shape and lse.shape == shape[:3]


def prefixes_hold(backend: str) -> None:
    """Where rows are, they may see the prefix: only the shape is known."""
    for what, sizes in EMPTY.items():
        batch, q_heads, kv_heads, q_len, kv_len = sizes
        (q, k, v), shape = draw(*sizes), (batch, q_heads, q_len, DIM)
        one, two = (torch.randn(count, kv_heads, 6, DIM) for count in (1, 2))
        nobody = SharedPrefix(one[:, :, :0], one[:, :, :0])
        levels = [
            SharedPrefix(one, one),
            SharedPrefix(two, two, members=[0] * batch),
            SharedPrefix(two, two, members=[1] * batch, lengths=[3, 0]),
            [SharedPrefix(one, one), nobody],
        ]
        for level in levels:
            options = {"lengths": [min(1, kv_len)] * batch, "return_lse": True, "backend": backend}
            out, lse = shared_prefix_attention(q, level, k, v, **options)
            assert out.shape == shape and lse.shape == shape[:3] and not out.isnan().any(), f"{backend}, {what}"
        out = shared_prefix_attention(q, nobody, k[:, :, :0], v[:, :, :0], backend=backend)
        expect_nothing(out, shape, f"{backend}, {what}, no key anywhere")


def injection_holds(backend: str) -> None:
    for what, sizes in EMPTY.items():
        batch, q_heads, kv_heads, q_len, _ = sizes
        (q, k, v), shape = draw(*sizes), (batch, q_heads, q_len, DIM)
        shared, own = (torch.randn(count, kv_heads, 6, DIM) for count in (1, batch))
        for mode in ("gate", "blend"):
            for alpha in (0.0, 0.5, 1.0, torch.tensor(0.5), torch.zeros(q_heads), torch.rand(batch, q_heads)):
                injector = KVInjector(InjectionConfig(mode=mode), backend=backend)
                outs = [
                    *(injector.inject(q, k, v, Memory(memory, memory), alpha=alpha) for memory in (shared, own)),
                    injector.inject_chunked(q, k, v, Memory(shared, shared), alpha=alpha, chunk_size=4),
                    injector.inject_chunked(q, k, v, Memory(*[shared[:, :, :0]] * 2), alpha=alpha, chunk_size=4),
                ]
                assert all(out.shape == shape and not out.isnan().any() for out in outs), f"{backend}, {what}, {mode}"
                # There may be no output to take a part of; that part is no NaN, which later calls would inherit.
                assert 0 <= injector.statistics[None].share <= 1, f"{backend}, {what}, {mode}"


def the_rest_holds() -> None:
    for sizes in EMPTY.values():
        batch, q_heads, kv_heads, q_len, kv_len = sizes
        (q, k, v), shape = draw(*sizes), (batch, q_heads, q_len, DIM)
        for order in ("q_outer", "kv_outer"):
            expect_nothing(tiled_attention(q, k[:, :, :0], v[:, :, :0], loop_order=order), shape, order)
        budget = reference.error_budget(q, k, v)
        assert (budget.out, budget.lse) == (0, 0) or 0 not in shape
        assert reference.check_gradients([torch.zeros_like(x) for x in (q, k, v)], q, k, v, torch.zeros(shape)).passed
        assert [part.out.shape for part in split_partials(q, k, v, [range(kv_len)])] == [shape]
        cache = KVCache(batch, kv_heads, kv_len, DIM, device="cpu")
        cache.append(k, v)
        assert cache.max_length == (kv_len if batch else 0) and cache.next_positions(2).shape == (batch, 2)
        assert attention(q, cache.keys, cache.values, mask=cache.mask(q_len)).shape == shape


def flash_attn_holds() -> None:
    for batch, q_heads, kv_heads, q_len, kv_len in EMPTY.values():
        q, k, v = (x.transpose(1, 2).contiguous() for x in draw(batch, q_heads, kv_heads, q_len, kv_len))
        assert flash_attn_func(q, k, v, causal=True, window_size=(1, 1)).shape == (batch, q_len, q_heads, DIM)
        ends = [torch.arange(batch + 1, dtype=torch.int32) * length for length in (q_len, kv_len)]
        out = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *ends, q_len, kv_len)
        assert out.shape == (batch * q_len, q_heads, DIM)
        assert flash_attn_with_kvcache(q, k, v, cache_seqlens=0).shape == (batch, q_len, q_heads, DIM)


def main(rng: random.Random) -> None:
    training_holds("triton")
    with torch.no_grad():
        decoding_holds("triton")
        prefixes_hold("triton")
        injection_holds("triton")
        flash_attn_holds()
