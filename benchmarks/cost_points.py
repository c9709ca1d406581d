"""On a GPU: more points to hold flashlib.cost against, the bytes behind them by the hardware's counters, and what measuring costs.

python benchmarks/cost_points.py --out benchmarks/h200             # cost_points.json: times, of the device and as called
python benchmarks/cost_points.py --out benchmarks/h200 --bytes     # cost_bytes.json: bytes from device memory; needs Nsight Compute's ncu
python benchmarks/cost_points.py --out benchmarks/h200 --profiler  # profiler_cost.json: what the profiler itself costs
python benchmarks/cost_points.py --out benchmarks/h200 --choices   # choices.json: what autoselect picks, and how fast each backend is as called

The points are what the races do not hold: chunks of a prompt against a long cache, whole prompts, grouped heads forward and backward,
decoding in many shapes, and the check of guessed tokens. `python -m flashlib.cost.verdict` takes cost_points.json in if it is there. Without
a GPU all but --bytes runs on small shapes, to see that the script works.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib import attention
from flashlib.config import ProfilingConfig
from flashlib.cost import Problem, backward_launches, decode_launches, device, forward_launches
from flashlib.inference import decode_attention
from flashlib.measure import save_record
from flashlib.measure.counting.counters import marked, read
from flashlib.measure.racing.choosing import HOPELESS, autoselect
from flashlib.measure.racing.profiler import AttentionProfiler
from flashlib.measure.racing.timing import capture, time_in_turns
from flashlib.measure.records.record import new_record
from flashlib.measure.records.sources import decode_sources, kernel_sources

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SMALLER = 1 if ON_GPU else 64  # by how much lengths are shorter on a CPU
CACHES_FULL = 3  # all input sets together are at least so many times the L2 cache
NOTES = (
    "ms: GPU time by device events around CUDA graphs, over enough input sets to miss the L2 cache; the median, per call. eager_ms: the same "
    "calls from Python, one after the other, so that of Python and the device the slower one counts; in turns with the graph. forward and "
    "backward are attention(...), causal and aligned bottom-right; decode is decode_attention(...). The last rows of each forward result were "
    "held against float64."
)
BYTES_NOTES = (
    "dram_read, dram_written: device memory by ncu, each kernel from cold caches; what still lies in the L2 cache when a kernel ends is not among "
    "the bytes written. read, written: by flashlib.cost, summed over the kernels."
)
PROFILER_NOTES = (
    "region: microseconds of an empty region, the best of five times 10,000. call: milliseconds by the clock of a call of about a millisecond, and "
    "by what share it is longer inside a region, the median of pairs; waiting: whether each call is waited for. agreement: the bench harness's "
    "median and the profiler's."
)
CHOICES_NOTES = (
    "chosen: by autoselect, which times calls as a user makes them; raced_ms: its times. ms: of the backends near the best, calls from Python too, "
    "timed afterwards and in turns. regret: the time of the one that was chosen over that of the best."
)
AS_CALLED = "triton" if ON_GPU else "tiled"


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


def shorter(length: int) -> int:
    return max(8, length // SMALLER)


def all_points() -> list[Point]:
    def square(kind: str, heads: tuple[int, int], length: int, tokens: int, head_dim: int = 128) -> Point:
        return Point(kind, shorter(tokens) // shorter(length), *heads, shorter(length), shorter(length), head_dim)

    chunks = [
        Point("forward", 1, *heads, shorter(new), shorter(keys), head_dim)
        for heads, head_dim in (((32, 8), 128), ((64, 8), 64))
        for new in (256, 512, 2048)
        for keys in (8192, 32768)
    ]
    prompts = [square("forward", (32, 8), length, length) for length in (1024, 4096, 16384)]
    grouped = [
        square(kind, heads, length, 16384)
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
    return [*chunks, *prompts, *grouped, *steps, *checked]


def counted_points() -> list[Point]:
    """Fewer: each is run by ``ncu``. Among them K and V that fit the L2 cache and K and V of one head that do not."""
    long = Point("forward", 1, 8, 2, shorter(4096), shorter(262144), 128)
    steps = [point for point in all_points() if point.kind == "decode"]
    others = [point for point in all_points() if point.kind != "decode"]
    return [*others[::2], long, *steps[::3]]


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
    if point.kind == "forward":
        return functools.partial(attention, *drawn, causal=True, backend=AS_CALLED)
    out = attention(*drawn, causal=True, backend=AS_CALLED)
    return functools.partial(torch.autograd.grad, out, drawn, torch.randn_like(out), retain_graph=True)


def check(point: Point, drawn: list[torch.Tensor]) -> None:
    """The last row of the first request and head, in float64."""
    if point.kind == "backward":
        return
    got = call_of(point, drawn)()[0, 0, -1].double()
    q, k, v = drawn[0][0, 0, -1].double(), drawn[1][0, 0].double(), drawn[2][0, 0].double()
    expected = torch.softmax(k @ q / math.sqrt(point.head_dim), 0) @ v
    assert (got - expected).abs().max() < 0.05, point


def timed(point: Point) -> dict[str, float]:
    """Milliseconds of a call: of the device (None without a GPU), and as called."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 0
    sets = [inputs(point) for _ in range(max(1, math.ceil(CACHES_FULL * cache / point.bytes)))]
    with torch.set_grad_enabled(point.kind == "backward"):
        check(point, sets[0])
        stream = torch.cuda.Stream() if ON_GPU else None
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls = [call_of(point, drawn) for drawn in sets]
            for call in calls:
                call()
        bursts = {"eager_ms": lambda: [call() for call in calls]}
        if stream:
            torch.cuda.synchronize()
            bursts["ms"] = capture(calls, stream)
        found = time_in_turns(bursts, device=DEVICE, budget_s=0.2 if ON_GPU else 0.02)
    return {"ms": None} | {name: timing.median_ms / len(calls) for name, timing in found.items()}


def compile_ahead(function, jobs: list) -> None:
    """Fill Triton's cache on disk: a compiler uses one core, and the GPU would wait for each kernel."""
    if ON_GPU:
        with multiprocessing.get_context("spawn").Pool(min(12, os.cpu_count())) as pool:
            pool.map(function, jobs, chunksize=1)


def run_once(point: Point) -> None:
    with torch.set_grad_enabled(point.kind == "backward"):
        call_of(point, inputs(point))()
    torch.cuda.synchronize()


def times() -> list[dict]:
    rows = []
    compile_ahead(run_once, all_points())
    for point in all_points():
        rows.append({**asdict(point), "dtype": "bf16" if ON_GPU else "fp32", **timed(point)})
        print(rows[-1], flush=True)
        if ON_GPU:
            torch.cuda.empty_cache()
    return rows


def run_marked() -> None:
    """What `ncu` watches: each point once, under its number."""
    for number, point in enumerate(counted_points()):
        drawn = inputs(point)
        with torch.set_grad_enabled(point.kind == "backward"):
            call = call_of(point, drawn)
            call()  # compiled before it is counted
            with marked(number):
                call()
        del drawn, call
        torch.cuda.empty_cache()


def counted_bytes() -> list[dict]:
    """Bytes from and to device memory by the counters, and by :mod:`flashlib.cost`."""
    metrics = ("seconds", "dram_read", "dram_written")
    found = read([sys.executable, __file__, "--marked"], metrics, stalls=False)
    rows = []
    for number, point in enumerate(counted_points()):
        counted = found[number]
        rows.append({**asdict(point), "dtype": "bf16", "kernels": counted.kernels, **counted.figures})
        rows[-1] |= estimated(point)
    return rows


def estimated(point: Point) -> dict[str, float]:
    makes = {"forward": forward_launches, "backward": backward_launches, "decode": decode_launches}
    launches = makes[point.kind](point.problem, device("h200"))
    return {
        "read": sum(launch.memory_read for launch in launches),
        "written": sum(launch.memory_written for launch in launches),
    }


def profiler_costs() -> list[dict]:
    """An empty region, off and on; a call of about a millisecond with and without one around it; and whether the times agree."""
    rows = []
    for enabled in (False, True):
        profiler = AttentionProfiler(ProfilingConfig(enabled=enabled), device=DEVICE)

        def regions(profiler=profiler, count=10_000) -> None:
            for _ in range(count):
                with profiler.profile("region"):
                    pass

        best = min(_seconds(regions) for _ in range(5))
        rows.append({"what": "region", "enabled": enabled, "us": best / 10_000 * 1e6})
    work = _millisecond()
    for waiting in (False, True):
        profiler = AttentionProfiler(ProfilingConfig(), device=DEVICE)
        inside = profiler.profile("work")(work)
        pairs = [[_wall_ms(call, 20, waiting=waiting) for call in (work, inside)] for _ in range(30 if ON_GPU else 3)]
        bare, share = (
            statistics.median(found) for found in zip(*((one, two / one - 1) for one, two in pairs), strict=True)
        )
        rows.append({"what": "call", "waiting": waiting, "bare_ms": bare, "share": share})  # fmt: skip
    for name, call in _known_calls(work).items():
        profiler = AttentionProfiler(ProfilingConfig(), device=DEVICE)
        seen = profiler.profile(name)(call)
        harness = time_in_turns({"bare": call, "seen": seen}, device=DEVICE, budget_s=0.5 if ON_GPU else 0.02)[
            "bare"
        ].median_ms
        profiled = profiler.regions()[name].ms.percentile(0.5)
        rows.append({"what": "agreement", "call": name, "harness_ms": harness, "profiler_ms": profiled, "share": profiled / harness - 1})  # fmt: skip
    return rows


def _millisecond():
    size = 4096 if ON_GPU else 256
    x = torch.randn(size, size, device=DEVICE, dtype=DTYPE)

    def work() -> None:
        for _ in range(5 if ON_GPU else 1):
            torch.matmul(x, x)

    return work


def _known_calls(work) -> dict:
    prompt = Point("forward", 1, 32, 8, shorter(8192), shorter(8192), 128)
    step = Point("decode", 32, 32, 8, 1, shorter(16384), 128)
    return {"five matrix products": work, **{point.kind: call_of(point, inputs(point)) for point in (prompt, step)}}


def _wall_ms(call, count: int, *, waiting: bool) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
        if waiting and ON_GPU:
            torch.cuda.synchronize()
    if ON_GPU:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / count


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def choices() -> list[dict]:
    """What autoselect picks in a fresh folder, and the same backends timed apart."""
    rows, cells = [], all_cells()
    compile_ahead(run_cell_once, cells)
    for cell in cells:
        drawn = drawn_for(cell)
        with tempfile.TemporaryDirectory() as folder, torch.set_grad_enabled(cell["backward"]):
            chosen = autoselect(*drawn, causal=cell["causal"], folder=Path(folder))
            (kept,) = Path(folder).glob("*.json")
            raced = json.loads(kept.read_text(encoding="utf-8"))["race"]["ms"]
            near = [name for name, ms in raced.items() if ms <= HOPELESS * min(raced.values())]
            calls = {name: functools.partial(as_called, name, drawn, cell) for name in near}
            found = time_in_turns(calls, device=DEVICE, budget_s=0.1, max_rounds=20)
        ms = {name: timing.median_ms for name, timing in found.items()}
        told = {"chosen": chosen, "ms": ms, "raced_ms": raced, "regret": ms[chosen] / min(ms.values())}
        rows.append({**cell, "dtype": "bf16" if ON_GPU else "fp32", **told})
        print(rows[-1], flush=True)
        if ON_GPU:
            torch.cuda.empty_cache()
    return rows


def all_cells() -> list[dict]:
    sizes = (
        (1, 8, 8, 128, 64),
        (16, 12, 12, 1024, 64),
        (1, 32, 8, 1024, 128),
        (4, 32, 8, 4096, 128),
        (32, 16, 16, 256, 128),
    )
    return [
        {"batch": batch, "q_heads": q_heads, "kv_heads": kv_heads, "length": shorter(length), "head_dim": head_dim, "causal": causal, "backward": backward}
        for batch, q_heads, kv_heads, length, head_dim in sizes
        for causal, backward in ((True, False), (True, True), (False, False))
    ]  # fmt: skip


def drawn_for(cell: dict) -> list[torch.Tensor]:
    return [
        torch.randn(cell["batch"], heads, cell["length"], cell["head_dim"], device=DEVICE)
        .to(DTYPE)
        .requires_grad_(cell["backward"])
        for heads in (cell["q_heads"], cell["kv_heads"], cell["kv_heads"])
    ]


def as_called(name: str, drawn: list[torch.Tensor], cell: dict) -> None:
    out = attention(*drawn, causal=cell["causal"], backend=name)
    if cell["backward"]:
        torch.autograd.grad(out, drawn, torch.ones_like(out))


def run_cell_once(cell: dict) -> None:
    with torch.set_grad_enabled(cell["backward"]):
        as_called(AS_CALLED, drawn_for(cell), cell)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--bytes", action="store_true")
    what.add_argument("--profiler", action="store_true")
    what.add_argument("--choices", action="store_true")
    what.add_argument("--marked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.marked:
        run_marked()
        return
    sources = sorted({*kernel_sources(), *decode_sources()})
    if options.bytes:
        record = new_record("cost_bytes", counted_bytes(), sources, BYTES_NOTES)
    elif options.profiler:
        record = new_record("profiler_cost", profiler_costs(), ["measure/racing/profiler.py"], PROFILER_NOTES)
    elif options.choices:
        record = new_record("choices", choices(), sorted({*sources, "measure/racing/choosing.py"}), CHOICES_NOTES)
    else:
        record = new_record("cost_points", times(), sources, NOTES)
    print(save_record(record, options.out))
    for row in record.rows:
        print(row)


if __name__ == "__main__":
    main()
