"""On a GPU: more points to hold flashlib.cost against, and the bytes behind them by the hardware's counters.

python benchmarks/cost_points.py --out benchmarks/h200             # cost_points.json: times
python benchmarks/cost_points.py --out benchmarks/h200 --bytes     # cost_bytes.json: bytes from device memory; needs Nsight Compute's ncu
python benchmarks/cost_points.py --out benchmarks/h200 --profiler  # profiler_cost.json: what the profiler itself costs

The points are what the races do not hold: chunks of a prompt against a long cache, grouped heads forward and backward, decoding in many
shapes, and the check of guessed tokens. `python -m flashlib.cost.verdict` takes cost_points.json in if it is there. Without a GPU the
same runs on small shapes, to see that the script works.
"""

import argparse
import csv
import functools
import io
import math
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib import attention
from flashlib.config import ProfilingConfig
from flashlib.cost import Problem, backward_launches, decode_launches, device, forward_launches
from flashlib.inference import decode_attention
from flashlib.measure import save_record, time_call
from flashlib.measure.bench import decode_sources, kernel_sources
from flashlib.measure.profiler import AttentionProfiler
from flashlib.measure.record import new_record
from flashlib.measure.timing import capture

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SMALLER = 1 if ON_GPU else 64  # by how much lengths are shorter on a CPU
CACHES_FULL = 3  # all input sets together are at least so many times the L2 cache
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
NOTES = (
    "GPU time by device events around CUDA graphs, over enough input sets to miss the L2 cache; the median, per call. forward and backward are "
    "attention(...), causal and aligned bottom-right; decode is decode_attention(...). The last rows of each result were held against float64."
)


@dataclass(frozen=True)
class Point:
    """One call: its kind, ``forward``, ``backward`` or ``decode``, and its shapes."""

    kind: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int

    @property
    def problem(self) -> Problem:
        sizes = (self.batch, self.q_heads, self.kv_heads, self.q_len, self.kv_len, self.head_dim)
        return Problem.causal(*sizes, dtype="bf16" if ON_GPU else "fp32")

    @property
    def bytes(self) -> int:
        keys = 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim
        return (keys + 2 * self.batch * self.q_heads * self.q_len * self.head_dim) * DTYPE.itemsize


def all_points() -> list[Point]:
    def shorter(length: int) -> int:
        return max(8, length // SMALLER)

    chunks = [
        Point("forward", 1, 32, 8, shorter(new), shorter(keys), 128)
        for new in (256, 512, 2048)
        for keys in (8192, 32768)
    ]
    grouped = [
        Point(kind, shorter(16384) // shorter(length), *heads, shorter(length), shorter(length), 128)
        for kind in ("forward", "backward")
        for heads in ((32, 8), (64, 8))
        for length in (2048, 8192)
    ]
    steps = [
        Point("decode", batch, *heads, 1, shorter(length), head_dim)
        for heads, head_dim in (((32, 8), 128), ((64, 8), 128), ((32, 8), 64))
        for batch, length in ((4, 2048), (4, 32768), (32, 2048), (32, 16384), (128, 4096))
    ]
    checked = [Point("decode", batch, 32, 8, 5, shorter(length), 128) for batch, length in ((4, 8192), (32, 8192))]
    return [*chunks, *grouped, *steps, *checked]


def inputs(point: Point) -> list[torch.Tensor]:
    shapes = ((point.q_heads, point.q_len), *[(point.kv_heads, point.kv_len)] * 2)
    drawn = [
        torch.randn(point.batch, heads, length, point.head_dim, device=DEVICE).to(DTYPE) for heads, length in shapes
    ]
    return [x.requires_grad_(point.kind == "backward") for x in drawn]


def call_of(point: Point, drawn: list[torch.Tensor]):
    """What is timed; a backward runs again and again on what one forward kept."""
    if point.kind == "decode":
        return functools.partial(decode_attention, *drawn)
    backend = "triton" if ON_GPU else "tiled"
    if point.kind == "forward":
        return functools.partial(attention, *drawn, causal=True, backend=backend)
    out = attention(*drawn, causal=True, backend=backend)
    return functools.partial(torch.autograd.grad, out, drawn, torch.randn_like(out), retain_graph=True)


def check(point: Point, drawn: list[torch.Tensor]) -> None:
    """The last row of the first request and head, in float64."""
    if point.kind == "backward":
        return
    got = call_of(point, drawn)()[0, 0, -1].double()
    q, k, v = drawn[0][0, 0, -1].double(), drawn[1][0, 0].double(), drawn[2][0, 0].double()
    expected = torch.softmax(k @ q / math.sqrt(point.head_dim), 0) @ v
    assert (got - expected).abs().max() < 0.05, point


def timed(point: Point) -> float:
    """Milliseconds of a call."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 0
    sets = [inputs(point) for _ in range(max(1, math.ceil(CACHES_FULL * cache / point.bytes)))]
    with torch.set_grad_enabled(point.kind == "backward"):
        check(point, sets[0])
        if not ON_GPU:
            return time_call(call_of(point, sets[0]), budget_s=0.02).median_ms
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls = [call_of(point, drawn) for drawn in sets]
            for call in calls:
                call()
        torch.cuda.synchronize()
        replay = capture(calls, stream)
        return time_call(replay, device="cuda", budget_s=0.3).median_ms / len(calls)


def times() -> list[dict]:
    rows = []
    for point in all_points():
        rows.append({**asdict(point), "dtype": "bf16" if ON_GPU else "fp32", "ms": timed(point)})
        print(rows[-1], flush=True)
        if ON_GPU:
            torch.cuda.empty_cache()
    return rows


def run_marked() -> None:
    """What `ncu` watches: each point once, in a range that says which."""
    for number, point in enumerate(all_points()):
        drawn = inputs(point)
        with torch.set_grad_enabled(point.kind == "backward"):
            call = call_of(point, drawn)
            call()  # compiled before it is counted
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_push(f"case:{number}")
            call()
            torch.cuda.nvtx.range_pop()


def counted_bytes() -> list[dict]:
    """Bytes from and to device memory by the counters, and by :mod:`flashlib.cost`."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--nvtx", "--clock-control", "none"]
    command += ["--metrics", ",".join(METRICS), sys.executable, __file__, "--marked"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = [line for line in answer.stdout.splitlines() if line.startswith('"')]
    if answer.returncode or not lines:
        raise RuntimeError(f"ncu failed ({answer.returncode}): {answer.stdout[-2000:]} {answer.stderr[-2000:]}")
    found: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel in csv.DictReader(io.StringIO("\n".join(lines))):
        if case := re.search(r"case:(\d+)", " ".join(filter(None, kernel.values()))):
            for n, metric in enumerate(METRICS):
                found[int(case[1])][n] += float(kernel[metric].replace(",", ""))
    makes = {"forward": forward_launches, "backward": backward_launches, "decode": decode_launches}
    rows = []
    for number, point in enumerate(all_points()):
        counted = sum(launch.memory for launch in makes[point.kind](point.problem, device("h200")))
        rows.append(
            {**asdict(point), "dram_read": found[number][0], "dram_written": found[number][1], "counted": counted}
        )
    return rows


def profiler_costs() -> list[dict]:
    """Microseconds of a region, off and on; and a call of about a millisecond with and without one around it."""
    rows = []
    for enabled in (False, True):
        profiler = AttentionProfiler(ProfilingConfig(enabled=enabled), device=DEVICE)

        def regions(profiler=profiler, count=10_000) -> None:
            for _ in range(count):
                with profiler.profile("region"):
                    pass

        best = min(_seconds(regions) for _ in range(5))
        rows.append({"what": "region", "enabled": enabled, "us": best / 10_000 * 1e6})
    x = torch.randn(4096 if ON_GPU else 256, 4096 if ON_GPU else 256, device=DEVICE, dtype=DTYPE)
    call = functools.partial(torch.matmul, x, x)
    calls = 5 if ON_GPU else 1  # about a millisecond

    def work() -> None:
        for _ in range(calls):
            call()

    profiler = AttentionProfiler(ProfilingConfig(), device=DEVICE)
    plain, measured = time_call(work, device=DEVICE), time_call(profiler.profile("work")(work), device=DEVICE)
    seen = profiler.regions()["work"].ms.percentile(0.5)
    rows.append({"what": "call", "plain_ms": plain.median_ms, "profiled_ms": measured.median_ms, "seen_ms": seen})
    return rows


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--profiler", action="store_true")
    parser.add_argument("--marked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.marked:
        run_marked()
        return
    sources = sorted({*kernel_sources(), *decode_sources()})
    if options.bytes:
        record = new_record(
            "cost_bytes", counted_bytes(), sources, "Device memory by ncu, cold caches; counted: flashlib.cost."
        )
    elif options.profiler:
        record = new_record(
            "profiler_cost", profiler_costs(), ["measure/profiler.py"], "The best of five, and medians."
        )
    else:
        record = new_record("cost_points", times(), sources, NOTES)
    save_record(record, options.out)
    for row in record.rows:
        print(row)


if __name__ == "__main__":
    main()
