"""Launches by plan on a GPU: the same bits as launches made anew, in graphs, on other streams and from several threads.

python tests/gpu/launch_checks.py --workers 14 --out results

Each class of problem is computed without plans, then as the call that makes its plan, then by the plan that is there; then with other lengths at
every call, planned by recipe.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from in_sets import count_failures

from flashlib import attention, routes
from flashlib.inference import decode_attention
from flashlib.launch import packets, plans
from flashlib.masks import Causal, KeyLengths, Varlen, Window
from flashlib.measure.records.record import Record, new_record, save_record
from flashlib.measure.records.sources import decode_sources, kernel_sources, launching_sources

CHECKED_ON = sorted({*launching_sources(), *kernel_sources(), *decode_sources()})


@dataclass(frozen=True)
class Class:
    """A class of problems, by name: shapes as in :func:`flashlib.attention`, and what else the call says."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (8, 8)
    lengths: tuple[int, int] = (300, 300)
    head_dim: int = 64
    v_head_dim: int | None = None
    rows_first: bool = False
    mask: str | None = None
    causal: bool = True
    softcap: float = 0.0
    alibi: bool = False
    lse: bool = False

    def inputs(self, seed: int) -> tuple[list[Tensor], dict]:
        generator = torch.Generator("cuda").manual_seed(seed)
        (q_heads, kv_heads), (q_len, kv_len) = self.heads, self.lengths
        sizes = [
            (q_heads, q_len, self.head_dim),
            (kv_heads, kv_len, self.head_dim),
            (kv_heads, kv_len, self.v_head_dim or self.head_dim),
        ]

        def drawn(heads, length, dim):
            shape = (2, length, heads, dim) if self.rows_first else (2, heads, length, dim)
            x = torch.randn(shape, generator=generator, device="cuda").to(self.dtype)
            return x.transpose(1, 2) if self.rows_first else x

        options = {"causal": self.causal, "softcap": self.softcap, "mask": self.made_mask(seed)}
        if self.alibi:
            options["alibi_slopes"] = torch.rand(q_heads, generator=generator, device="cuda")
        return [drawn(*size) for size in sizes], options

    def made_mask(self, seed: int):
        q_len, kv_len = self.lengths
        if self.mask == "window":
            return Window(left=100, right=7)
        if self.mask == "offset":
            return Causal(offset=11)
        if self.mask == "lengths":
            return KeyLengths(torch.tensor([kv_len - seed % 50, kv_len // 2], device="cuda"))
        if self.mask == "varlen":
            ends = sorted(random.Random(seed).sample(range(1, q_len), 3))
            return Varlen(torch.tensor([0, *ends, q_len], dtype=torch.int32, device="cuda"))
        return None


CLASSES = [
    Class("causal"),
    Class("full, D128", head_dim=128, causal=False),
    Class("grouped heads, rows first", heads=(8, 2), rows_first=True, lengths=(100, 300), lse=True),
    Class("window", mask="window", causal=False),
    Class("offset", mask="offset", causal=False),
    Class("key lengths", mask="lengths", head_dim=128),
    Class("packed", mask="varlen"),
    Class("softcap", softcap=20.0, head_dim=128),
    Class("ALiBi", alibi=True),
    Class("ALiBi, window, D128", alibi=True, mask="window", causal=False, head_dim=128),
    Class("fp32", dtype=torch.float32),
    Class("fp16, D256", dtype=torch.float16, head_dim=256),
    Class("Dv unlike D", head_dim=128, v_head_dim=64),
    Class("D80", head_dim=80),
    Class("more queries than keys", lengths=(400, 130), lse=True),
    Class("odd head_dim, copied", head_dim=59),
]


def without_plans() -> ExitStack:
    """A block in which every launch is made anew."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(plans, "plannable", lambda device: False))
    stack.enter_context(mock.patch.object(routes, "plans_are_possible", lambda: False))
    return stack


def both_ways(inputs: list[Tensor], options: dict, seed: int, lse: bool) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = attention(*leaves, **options, return_lse=lse, backend="triton")
    results = results if lse else (results,)
    generator = torch.Generator("cuda").manual_seed(seed)
    given = [torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, leaves, given)
    with torch.no_grad():
        alone = attention(*inputs, **options, backend="triton")
    return [*results, *gradients, alone]


def check_class(job: tuple[int, int]) -> dict:
    index, seed = job
    subject, failed = CLASSES[index], []
    launched = []
    start = plans.Plan.start_on

    def noted(plan, *arguments):
        launched.append(plan)
        return start(plan, *arguments)

    for number in range(4):
        inputs, options = subject.inputs(seed + number)
        with without_plans():
            expected = both_ways(inputs, options, seed, subject.lse)
        with mock.patch.object(plans.Plan, "start_on", noted):
            came = both_ways(inputs, options, seed, subject.lse)
        if not all(torch.equal(a, b) for a, b in zip(expected, came, strict=True)):
            failed.append(f"call {number} differs")
        if len(launched) != 3 * (number + 1):
            failed.append(f"call {number}: {len(launched)} plans were started, expected {3 * (number + 1)}")
    failed += in_a_graph(subject, seed) + on_streams(subject, seed) + with_other_lengths(subject, seed)
    return {"check": subject.name, "failed": failed, "plans": len({id(plan) for plan in launched})}


def with_other_lengths(subject: Class, seed: int, calls: int = 24) -> list[str]:
    """What failed where each call has lengths of its own."""
    rng, failed, by_recipe = random.Random(seed), [], 0
    found = plans._by_recipe

    def counted(*arguments):
        nonlocal by_recipe
        plan = found(*arguments)
        by_recipe += plan is not None
        return plan

    for number in range(calls):
        q_len = rng.randint(100, 800)
        lengths = (q_len, q_len) if subject.lengths[0] == subject.lengths[1] else (q_len, rng.randint(100, 1200))
        other = replace(subject, lengths=lengths)
        inputs, options = other.inputs(seed + number)
        with without_plans():
            expected = both_ways(inputs, options, seed, subject.lse)
        with mock.patch.object(plans, "_by_recipe", counted):
            came = both_ways(inputs, options, seed, subject.lse)
        if not all(torch.equal(a, b) for a, b in zip(expected, came, strict=True)):
            failed.append(f"lengths {lengths} differ")
    if by_recipe < calls:
        failed.append(f"{by_recipe} plans of {3 * calls} were made by recipe")
    return failed


def in_a_graph(subject: Class, seed: int) -> list[str]:
    inputs, options = subject.inputs(seed)
    torch.manual_seed(seed)  # a mask's tensors stay the graph's
    others = [torch.randn_like(x) for x in inputs]
    with torch.no_grad():
        expected = attention(*others, **options, backend="triton")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            attention(*inputs, **options, backend="triton")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(*inputs, **options, backend="triton")
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
        for _ in range(3):
            out.zero_()
            graph.replay()
    return [] if torch.equal(out, expected) else ["a graph's replay differs"]


def on_streams(subject: Class, seed: int) -> list[str]:
    """Four threads, two of them on streams of their own, 50 steps each of their own numbers."""
    failed: list[str] = []

    def work(number: int) -> None:
        inputs, options = subject.inputs(seed + number)
        stream = torch.cuda.current_stream() if number % 2 else torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            first = both_ways(inputs, options, seed, subject.lse)
            for _ in range(50):
                again = both_ways(inputs, options, seed, subject.lse)
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                failed.append(f"thread {number} differs")
        torch.cuda.synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def decoding(seed: int) -> list[dict]:
    """Steps of decoding, contiguous and paged, with lengths that change in place."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = []
    for batch, capacity, page_size, window in itertools.product((1, 5), (640, 4096), (None, 64), (None, (300, 0))):
        failed = []
        q = torch.randn(batch, 8, 1, 128, generator=generator, device="cuda").bfloat16()
        shape = (batch, 2, capacity, 128) if page_size is None else (batch * capacity // page_size, 2, page_size, 128)
        k, v = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(2))
        table = None if page_size is None else torch.randperm(len(k), device="cuda").view(batch, -1).int()
        lengths = torch.randint(1, capacity, (batch,), generator=generator, device="cuda")
        with torch.no_grad():
            for _ in range(4):
                options = {
                    "lengths": lengths,
                    "block_table": table,
                    "window": window,
                    "return_lse": True,
                    "backend": "triton",
                }
                with without_plans():
                    expected = decode_attention(q, k, v, **options)
                came = decode_attention(q, k, v, **options)
                if not all(torch.equal(a, b) for a, b in zip(expected, came, strict=True)):
                    failed.append(f"lengths {lengths.tolist()}")
                lengths.sub_(1).clamp_(min=1)
        name = f"decoding, {batch} of {capacity}, pages {page_size}, window {window}"
        rows.append({"check": name, "failed": failed})
    return rows


def check_all(seed: int, workers: int, out: Path) -> Record:
    if packets.why_missing():
        raise RuntimeError(packets.why_missing())
    jobs = [(index, seed + 100 * index) for index in range(len(CLASSES))]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        rows = pool.map(check_class, jobs, chunksize=1)
    rows += decoding(seed)
    notes = "Bitwise: forward, gradients, graph replays and four threads by plans, against launches made anew."
    record = new_record("launch_plans", rows, CHECKED_ON, notes, seed=seed)
    save_record(record, out)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    options = parser.parse_args()
    failures = count_failures("launch plans", lambda: check_all(options.seed, options.workers, options.out))
    print(f"{failures} failures" if failures else "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
