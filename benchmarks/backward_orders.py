"""On a GPU: the backward for Hopper with the tiles that are adopted, with two consumers to a program everywhere, and beside SDPA on cuDNN.

python benchmarks/backward_orders.py --out results --compilers 14

For each shape: dK/dV alone and dQ alone, then whole steps (forward and backward). All gradients are first held against the error budget on small
problems; on the timed ones they must be the same bits twice.

The tiles adopted come from the record h200/backward_orders.json. It was taken, at the commit that it names, by a wider form of this, in which orders
of heads, numbers of parts and other tiles were tried one by one, and dQ was begun before dK and dV had ended ("overlapped": 1 to 3% of a step).
It calls tiles by their numbers: rows, consumers, stages and registers of dK/dV, or consumers, keys, stages and registers of dQ. "today" is head
by head and without parts.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.launch.hopper import hopper_dkdv_launches, hopper_dq_launches, hopper_launches
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches
from flashlib.launch.start import Launch
from flashlib.launch.tiles import HOPPER_BACKWARD, HOPPER_DQ
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
VARIANTS = ("adopted", "two consumers")
KERNELS = {"dkdv": ("hopper_dkdv", "hopper_sum_parts"), "dq": ("hopper_dq",)}


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
# Of the first lengths groups are cut into parts, rows of the second see few keys, of the third many.
SMALL = [
    Shape("small", batch, 8, 2, length, head_dim, causal)
    for batch, length in ((2, 600), (40, 200), (20, 1600))
    for head_dim in (64, 128)
    for causal in (True, False)
]


class Problem:
    """A shape with its tensors, and launches for them."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.inputs = shape.tensors()
        q, k, v, _ = self.inputs
        self.options = KernelOptions.from_spec(AttentionSpec.from_tensors(q, k, v, causal=shape.causal))
        self.forward, self.out, self.lse = hopper_launches(q, k, v, self.options)

    def backward(self, variant: str) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
        """The launches of a backward, and ``(dq, dk, dv)``."""
        q, k, v, grad_out = self.inputs
        keys, rows = (None, None) if variant == "adopted" else (HOPPER_BACKWARD[self.shape.head_dim], HOPPER_DQ[128])
        return backward_launches(
            q, k, v, self.out, self.lse, grad_out, None, self.options,
            dkdv=lambda tensors, options, _: hopper_dkdv_launches(tensors, options, keys),
            dq=lambda tensors, options, _: hopper_dq_launches(tensors, options, rows),
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


def start(launches: list[Launch]) -> None:
    for launch in launches:
        launch.start()


def compile_ahead(job: tuple[Shape, str]) -> str | None:
    """Fill Triton's cache on disk."""
    shape, variant = job
    try:
        problem = Problem(shape)
        for launch in [*problem.forward, *problem.backward(variant)[0]]:
            launch.kernel.run(grid=(1, 1, 1), warmup=True, **launch.triton_arguments, **launch.compile_options)
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"
    return None


def gradients_of(problem: Problem, variant: str) -> list[torch.Tensor]:
    launches, gradients = problem.backward(variant)
    for x in gradients:
        x.fill_(math.nan)
    start(launches)
    return list(gradients)


def check(problem: Problem, *, budget: bool) -> None:
    """That everything is written, comes out the same twice, and is within the error budget.

    Raises:
        RuntimeError: bits differ, or some were not written. AssertionError: a gradient is over its budget.
    """
    for variant in VARIANTS:
        came, again = (gradients_of(problem, variant) for _ in range(2))
        if not all(x.isfinite().all() for x in came):
            raise RuntimeError(f"{problem.shape}, {variant}: something was not written")
        if not all(torch.equal(a, b) for a, b in zip(came, again, strict=True)):
            raise RuntimeError(f"{problem.shape}, {variant}: not the same bits twice")
        if budget:
            assert_gradients_within_budget(tuple(came), *problem.inputs, causal=problem.shape.causal)


def graph_of(call: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    return capture([call] * COPIES, stream)


def microseconds(calls: dict[tuple[str, str], Callable[[], object]], budget_s: float) -> dict[tuple[str, str], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs = {name: graph_of(call, stream) for name, call in calls.items()}
    timed = time_in_turns(graphs, device="cuda", budget_s=budget_s)
    return {name: timing.median_ms * 1e3 / COPIES for name, timing in timed.items()}


def rows_of(shape: Shape, budget_s: float) -> list[dict]:
    problem = Problem(shape)
    start(problem.forward)
    check(problem, budget=False)
    calls: dict[tuple[str, str], Callable[[], object]] = {("step", "cuDNN"): problem.sdpa()}
    for variant in VARIANTS:
        launches, _ = problem.backward(variant)
        for kernel, names in KERNELS.items():
            calls[kernel, variant] = partial(start, [launch for launch in launches if launch.name in names])
        calls["step", variant] = partial(start, [*problem.forward, *launches])
    us = microseconds(calls, budget_s)
    return [{"shape": shape.name, "kernel": kernel, "variant": variant, "us": t} for (kernel, variant), t in us.items()]


def show(rows: list[dict]) -> None:
    for kernel in (*KERNELS, "step"):
        found = {row["variant"]: row["us"] for row in rows if row["kernel"] == kernel}
        said = ", ".join(f"{name} {us:.1f}" for name, us in found.items())
        print(f"{rows[0]['shape']:16} {kernel:7} {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES], help="names of those to time")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each variant")
    parser.add_argument("--compilers", type=int, default=8, help="processes that compile ahead")
    options = parser.parse_args()
    began = time.perf_counter()
    wanted = [shape for shape in SHAPES if shape.name in options.shapes]
    jobs = [(shape, variant) for shape in SMALL for variant in VARIANTS]
    with multiprocessing.get_context("spawn").Pool(options.compilers) as pool:
        failed = [why for why in pool.imap_unordered(compile_ahead, jobs) if why]
    print(*failed, f"compiled after {time.perf_counter() - began:.0f} s", sep="\n", flush=True)
    for shape in SMALL:
        problem = Problem(shape)
        start(problem.forward)
        check(problem, budget=True)
    print(f"within the budget, after {time.perf_counter() - began:.0f} s", flush=True)
    rows = []
    for shape in wanted:
        found = rows_of(shape, options.seconds)
        show(found)
        rows += found
        save_record(new_record("backward_tiles", rows, kernel_sources(), NOTES), options.out)
    print(f"done after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
