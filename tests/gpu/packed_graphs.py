"""Packed and paged calls of flash_attn's functions captured in a CUDA graph, and replayed after the lengths have changed.

Without a GPU there is nothing to capture, and the "graph" is the call itself (TRITON_INTERPRET=1, or any backend).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from device_checks import DEVICE, _captured, _same

from flashlib.interop.flash_attn import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flashlib.measure.bench import decode_sources, kernel_sources
from flashlib.measure.record import Record, new_record, save_record

COUNT, HEADS, KV_HEADS, D, PAGE = 4, 4, 2, 64, 16
LONGEST = 200 if DEVICE == "cuda" else 20
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CHECKED_ON = [
    "masks.py", "spec.py", "attention.py", "values.py", "interop/flash_attn/flash_attn_interface.py", "interop/flash_attn/kv_cache.py",
    "interop/flash_attn/pages.py", *sorted({*kernel_sources(), *decode_sources()}),
]  # fmt: skip


def graphs(out: Path, seed: int, replays: int = 5) -> Record:
    """Each call captured once and replayed with other lengths and inputs: bitwise what is computed without a graph?"""
    rng, generator = random.Random(seed), torch.Generator(device=DEVICE).manual_seed(seed)
    rows = []
    for name, (call, draw) in _cases(rng, generator).items():
        static = draw()
        results, replay = _captured(lambda call=call, static=static: call(*static))
        differ = []
        for number in range(replays):
            for old, new in zip(static, draw(), strict=True):
                old.copy_(new)
            fresh = [x.clone() for x in static]
            replay()
            if not _same(call(*fresh), results):
                differ.append(number)
        rows.append({"case": name, "replays": replays, "differ": differ})
    note = "Packed and paged calls captured in a CUDA graph, replayed with other lengths and inputs, against the same calls without it, bitwise."
    record = new_record("packed_graphs", rows, CHECKED_ON, note, seed=seed)
    save_record(record, out)
    return record


def _cases(rng: random.Random, generator: torch.Generator) -> dict:
    total = COUNT * LONGEST

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(DTYPE)

    def ends(longest: int, least: int = 0) -> Tensor:
        lengths = [rng.randint(least, longest) for _ in range(COUNT)]
        return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)

    def both_ways(function, *tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        result = function(*leaves)
        return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]

    def varlen(q, k, v, ends_q, ends_k):
        sizes = (ends_q, ends_k, LONGEST, LONGEST)
        return both_ways(lambda q, k, v: flash_attn_varlen_func(q, k, v, *sizes, causal=True), q, k, v)

    def kvpacked(q, kv, ends_q, ends_k, slopes):
        options = {"window_size": (30, 5), "alibi_slopes": slopes}
        sizes = (ends_q, ends_k, LONGEST, LONGEST)
        return both_ways(lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, *sizes, **options), q, kv)

    def qkvpacked(qkv, at):
        return both_ways(lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, at, LONGEST), qkv)

    def pages(longest_q):
        @torch.no_grad()
        def call(q, k, v, ends_q, ends_k, table):
            return [flash_attn_varlen_func(q, k, v, ends_q, ends_k, longest_q, LONGEST, causal=True, block_table=table)]

        return call

    @torch.no_grad()
    def cache(q, k_cache, v_cache, k, v, lengths):
        return [
            flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True),
            k_cache,
            v_cache,
        ]

    each = -(-LONGEST // PAGE)

    def table() -> Tensor:
        order = rng.sample(range(COUNT * each), COUNT * each)
        return torch.tensor(order, dtype=torch.int32, device=DEVICE).view(COUNT, each)

    def memory() -> Tensor:
        return randn(COUNT * each, PAGE, KV_HEADS, D)

    def lengths() -> Tensor:
        return torch.tensor([rng.randint(0, LONGEST - 1) for _ in range(COUNT)], dtype=torch.int32, device=DEVICE)

    tokens = (total, KV_HEADS, D)
    return {
        "varlen": (varlen, lambda: [randn(total, HEADS, D), randn(*tokens), randn(*tokens), ends(LONGEST), ends(LONGEST)]),
        "varlen kvpacked, window, ALiBi": (
            kvpacked,
            lambda: [
                randn(total, HEADS, D), randn(total, 2, KV_HEADS, D), ends(LONGEST), ends(LONGEST),
                torch.rand(COUNT, HEADS, generator=generator, device=DEVICE),
            ],
        ),
        "varlen qkvpacked": (qkvpacked, lambda: [randn(total, 3, HEADS, D), ends(LONGEST)]),
        "pages read in place": (
            pages(5), lambda: [randn(5 * COUNT, HEADS, D), memory(), memory(), ends(5), ends(LONGEST, 5), table()],
        ),
        "pages copied": (pages(LONGEST), lambda: [randn(total, HEADS, D), memory(), memory(), ends(LONGEST), ends(LONGEST), table()]),
        "cache, appended to": (
            cache,
            lambda: [
                randn(COUNT, 1, HEADS, D), *(randn(COUNT, LONGEST, KV_HEADS, D) for _ in range(2)),
                *(randn(COUNT, 1, KV_HEADS, D) for _ in range(2)), lengths(),
            ],
        ),
    }  # fmt: skip
