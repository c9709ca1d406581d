"""On a GPU: the backward for Hopper in other orders, cut into other parts and tiles, and overlapped, beside SDPA on cuDNN.

python benchmarks/backward_orders.py --out results --compilers 14

For each shape: dK/dV alone, dQ alone, the forward and delta alone, then whole steps (forward and backward). Every variant's gradients are first held
against the error budget on small problems; on the timed ones they must be the bits of today's order wherever only the order differs, and the same
bits twice.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.launch.hopper import hopper_dkdv_launches, hopper_dq_launches, hopper_launches
from flashlib.launch.options import KernelOptions, blocks
from flashlib.launch.plain import backward_launches
from flashlib.launch.start import Launch
from flashlib.launch.tiles import (
    HOPPER_BACKWARD,
    HOPPER_DQ,
    HopperBackwardTiles,
    HopperTiles,
    multiprocessors,
)
from flashlib.measure.racing.timing import capture, time_in_turns
from flashlib.measure.records.record import new_record, save_record
from flashlib.measure.records.sources import kernel_sources
from flashlib.reference import assert_gradients_within_budget
from flashlib.spec import AttentionSpec

NOTES = (
    "bf16, CUDA graphs of several launches each, everything of a shape in turns, shuffled; the median of the rounds, in microseconds per call. "
    "Steps are a forward and a backward."
)
COPIES = 4  # of a kernel or a step in one graph


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool = True

    @property
    def group_size(self) -> int:
        return self.q_heads // self.kv_heads

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output."""
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        return [
            torch.randn(self.batch, h, self.length, self.head_dim, device="cuda", dtype=torch.bfloat16) for h in heads
        ]


SHAPES = [
    Shape("GPT-2", 16, 12, 12, 1024, 64),
    Shape("Llama-8B 2k", 1, 32, 8, 2048, 128),
    Shape("Llama-8B 8k", 1, 32, 8, 8192, 128),
    Shape("70B 4k", 1, 64, 8, 4096, 128),
    Shape("Qwen3 3000", 1, 32, 8, 3000, 128),
    Shape("D64 4k", 4, 32, 32, 4096, 64),
    Shape("D128 4k", 4, 16, 16, 4096, 128),
    Shape("Llama-8B 1k", 1, 32, 8, 1024, 128),
    Shape("GPT-2 full", 16, 12, 12, 1024, 64, False),
    Shape("Llama-8B 2k full", 1, 32, 8, 2048, 128, False),
    Shape("D64 4k full", 4, 32, 32, 4096, 64, False),
    Shape("D128 4k full", 4, 16, 16, 4096, 128, False),
]
SMALL = [Shape("small", 2, 8, 2, 600, head_dim, causal) for head_dim in (64, 128) for causal in (True, False)]


@dataclass(frozen=True)
class Variant:
    """How one kernel is launched. ``waves``: heads go together so that they have about so many waves of programs; 0 for head by head, None for as
    many as the library chooses, and so for ``parts`` and ``tiles``."""

    waves: float | None = None
    parts: int | None = None
    tiles: HopperBackwardTiles | HopperTiles | None = None

    def together(self, heads: int, blocks_each: int, units: int) -> int | None:
        if self.waves is None:
            return None
        return heads if self.waves == math.inf else min(heads, max(1, -(-int(self.waves * units) // blocks_each)))


TODAY, CHOSEN = Variant(waves=0, parts=1), Variant()
ORDERS = {f"{waves:g} waves": Variant(waves=waves, parts=1) for waves in (1, 2, 4, math.inf)}
DKDV_TILES = {
    64: [(64, 2, 2, 240), (64, 2, 4, 240), (128, 2, 3, 240), (64, 1, 2, 232), (64, 1, 4, 232)],
    128: [(64, 1, 2, 232)],
}
DQ_TILES = {
    64: [(2, 128, 2, 240), (2, 128, 3, 240), (2, 64, 4, 240), (1, 64, 3, 232), (1, 128, 2, 232)],
    128: [(1, 64, 2, 232)],
}
FORWARD_TILES = {64: [(3, 128, 3, 160), (2, 128, 4, 240), (2, 128, 3, 240), (2, 64, 4, 240)], 128: []}
DELTA_ROWS = (32, 64, 128)


def dkdv_variants(shape: Shape) -> dict[str, Variant]:
    parts = {f"{parts} parts": Variant(parts=parts) for parts in (2, 4) if shape.group_size % parts == 0}
    tiles = {str(t): Variant(parts=1, tiles=HopperBackwardTiles(*t)) for t in DKDV_TILES[shape.head_dim]}
    return {"today": TODAY, "chosen": CHOSEN, **(ORDERS if shape.causal else {}), **parts, **tiles}


def dq_variants(shape: Shape) -> dict[str, Variant]:
    tiles = {str(t): Variant(tiles=HopperTiles(*t)) for t in DQ_TILES[shape.head_dim]}
    return {"today": TODAY, "chosen": CHOSEN, **(ORDERS if shape.causal else {}), **tiles}


class Problem:
    """A shape with its tensors, and launches for them."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.inputs = shape.tensors()
        q, k, v, _ = self.inputs
        self.options = KernelOptions.from_spec(AttentionSpec.from_tensors(q, k, v, causal=shape.causal))
        self.units = multiprocessors(q.device)
        self.forward, self.out, self.lse = hopper_launches(q, k, v, self.options)

    def forwards(self) -> dict[str, list[Launch]]:
        tiles = {str(t): HopperTiles(*t) for t in FORWARD_TILES[self.shape.head_dim]}
        others = {name: hopper_launches(*self.inputs[:3], self.options, tiles=t)[0] for name, t in tiles.items()}
        return {"chosen": self.forward, **others}

    def backward(self, dkdv: Variant, dq: Variant) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
        """The launches of a backward, and ``(dq, dk, dv)``."""
        shape = self.shape
        rows = dq.tiles or HOPPER_DQ
        keys = dkdv.tiles or HOPPER_BACKWARD[shape.head_dim]
        parts = dkdv.parts or 1
        of_dkdv = dkdv.together(shape.batch * shape.kv_heads * parts, blocks(shape.length, keys.block_n), self.units)
        of_dq = dq.together(shape.batch * shape.q_heads, blocks(shape.length, rows.block_m), self.units)
        q, k, v, grad_out = self.inputs
        return backward_launches(
            q, k, v, self.out, self.lse, grad_out, None, self.options,
            dkdv=lambda tensors, options, _: hopper_dkdv_launches(tensors, options, dkdv.tiles, together=of_dkdv, parts=dkdv.parts),
            dq=lambda tensors, options, _: hopper_dq_launches(tensors, options, dq.tiles, together=of_dq),
        )  # fmt: skip

    def sdpa(self) -> Callable[[], object]:
        q, k, v, grad_out = self.inputs
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]

        def step():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = scaled_dot_product_attention(
                    *inputs, is_causal=self.shape.causal, enable_gqa=self.shape.group_size > 1
                )
            return torch.autograd.grad(out, inputs, grad_out)

        return step


def named(launches: list[Launch], *names: str) -> list[Launch]:
    return [launch for launch in launches if launch.name in names]


def overlapped(launches: list[Launch]) -> list[Launch]:
    """The same with dQ begun where dK and dV have nothing more to start; parts are added up behind both."""
    later = named(launches, "hopper_sum_parts")
    first = [replace(launch, overlaps=launch.name == "hopper_dq") for launch in launches if launch not in later]
    return [*first, *later]


def start(launches: list[Launch]) -> None:
    for launch in launches:
        launch.start()


def compile_ahead(job: tuple[Shape, str, str, str]) -> str | None:
    """Fill Triton's cache on disk."""
    shape, kind, dkdv, dq = job
    try:
        problem = Problem(shape)
        if kind == "forward":
            launches = problem.forwards()[dkdv]
        else:
            launches = problem.backward(dkdv_variants(shape)[dkdv], dq_variants(shape)[dq])[0]
        for launch in overlapped(launches) if kind == "overlapped" else launches:
            launch.kernel.run(grid=(1, 1, 1), warmup=True, **launch.triton_arguments, **launch.compile_options)
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"
    return None


def jobs_of(shape: Shape) -> list[tuple[Shape, str, str, str]]:
    """What compiles everything that the variants of a shape launch."""
    waiting = [("today", "today"), *[(name, "today") for name in dkdv_variants(shape) if name[0] in "2("]]
    waiting += [("today", name) for name in dq_variants(shape) if name[0] == "("]
    jobs = [(shape, "backward", *pair) for pair in waiting]
    jobs += [(shape, "overlapped", "today", name) for name in dq_variants(shape) if name == "today" or name[0] == "("]
    tiles = ["chosen", *map(str, FORWARD_TILES[shape.head_dim])]
    return [*jobs, *[(shape, "forward", name, "") for name in tiles]]


def gradients_of(problem: Problem, dkdv: Variant, dq: Variant, order: Callable = list) -> list[torch.Tensor]:
    launches, gradients = problem.backward(dkdv, dq)
    for x in gradients:
        x.fill_(math.nan)
    start(order(launches))
    return list(gradients)


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def ways_of(shape: Shape) -> list[tuple[str, Variant, Variant, bool]]:
    """Every variant of one kernel beside today's other one, and whether only an order differs from today's."""
    ways = [(f"dkdv {name}", x, TODAY, x.parts == 1 and x.tiles is None) for name, x in dkdv_variants(shape).items()]
    return [*ways, *[(f"dq {name}", TODAY, x, x.tiles is None) for name, x in dq_variants(shape).items()]]


def check(problem: Problem, *, budget: bool) -> None:
    """That an order changes no bit, that everything comes out the same twice and overlapped, and is within the error budget.

    Raises:
        RuntimeError: bits differ. AssertionError: a gradient is over its budget.
    """
    shape = problem.shape
    today = gradients_of(problem, TODAY, TODAY)
    for name, dkdv, dq, only_order in ways_of(shape):
        came = gradients_of(problem, dkdv, dq)
        for order in (list, overlapped):
            if not equal(came, gradients_of(problem, dkdv, dq, order)):
                raise RuntimeError(f"{shape.name}, {name}, {order.__name__}: not the same bits twice")
        if only_order and not equal(came, today):
            raise RuntimeError(f"{shape.name}, {name}: an order changed bits")
        if not all(x.isfinite().all() for x in came):
            raise RuntimeError(f"{shape.name}, {name}: something was not written")
        if budget:
            assert_gradients_within_budget(tuple(came), *problem.inputs, causal=shape.causal)


def graph_of(call: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    return capture([call] * COPIES, stream)


def microseconds(calls: dict[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs = {name: graph_of(call, stream) for name, call in calls.items()}
    timed = time_in_turns(graphs, device="cuda", budget_s=budget_s)
    return {name: timing.median_ms * 1e3 / COPIES for name, timing in timed.items()}


def rows_of(shape: Shape, budget_s: float) -> list[dict]:
    problem = Problem(shape)
    start(problem.forward)
    check(problem, budget=False)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, dkdv in dkdv_variants(shape).items():
        launches, _ = problem.backward(dkdv, TODAY)
        calls["dkdv", name] = partial(start, named(launches, "hopper_dkdv", "hopper_sum_parts"))
    for name, dq in dq_variants(shape).items():
        calls["dq", name] = partial(start, named(problem.backward(TODAY, dq)[0], "hopper_dq"))
    for name, launches in problem.forwards().items():
        calls["forward", name] = partial(start, launches)
    calls["delta", "today"] = partial(start, named(problem.backward(TODAY, TODAY)[0], "backward_delta"))
    us = microseconds(calls, budget_s)
    fastest = {
        kind: min((t, name) for (other, name), t in us.items() if other == kind)[1]
        for kind in ("dkdv", "dq", "forward")
    }
    best = dkdv_variants(shape)[fastest["dkdv"]], dq_variants(shape)[fastest["dq"]]
    steps = {("step", "cuDNN"): problem.sdpa()}
    for name, ways, forward in (
        ("today", (TODAY, TODAY), problem.forward),
        ("chosen", (CHOSEN, CHOSEN), problem.forward),
        ("fastest", best, problem.forwards()[fastest["forward"]]),
    ):
        launches, _ = problem.backward(*ways)
        steps["step", name] = partial(start, [*forward, *launches])
        steps["step", f"{name}, overlapped"] = partial(start, [*forward, *overlapped(launches)])
    us |= microseconds(steps, budget_s)
    return [
        {"shape": shape.name, "kernel": kind, "variant": name, "us": t, "fastest": fastest.get(kind)}
        for (kind, name), t in us.items()
    ]


def show(rows: list[dict]) -> None:
    shape = rows[0]["shape"]
    for kind in ("dkdv", "dq", "forward", "delta", "step"):
        found = {row["variant"]: row["us"] for row in rows if row["kernel"] == kind}
        print(f"{shape:16} {kind:7} " + ", ".join(f"{name} {us:.1f}" for name, us in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES], help="names of those to time")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each variant")
    parser.add_argument("--compilers", type=int, default=8, help="processes that compile ahead")
    options = parser.parse_args()
    began = time.perf_counter()
    wanted = [shape for shape in SHAPES if shape.name in options.shapes]
    kinds = {(shape.head_dim, shape.causal) for shape in wanted}
    small = [shape for shape in SMALL if (shape.head_dim, shape.causal) in kinds]
    with multiprocessing.get_context("spawn").Pool(options.compilers) as pool:
        failed = [
            why for why in pool.imap_unordered(compile_ahead, [job for shape in small for job in jobs_of(shape)]) if why
        ]
    print(*failed, f"compiled after {time.perf_counter() - began:.0f} s", sep="\n", flush=True)
    for shape in small:
        problem = Problem(shape)
        start(problem.forward)
        check(problem, budget=True)
    print(f"within the budget, after {time.perf_counter() - began:.0f} s", flush=True)
    rows = []
    for shape in wanted:
        found = rows_of(shape, options.seconds)
        show(found)
        rows += found
        save_record(new_record("backward_orders", rows, kernel_sources(), NOTES), options.out)
    print(f"done after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
