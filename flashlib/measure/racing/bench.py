"""Attention against its peers: speed and memory, in one run, checked and recorded.

python -m flashlib.measure.racing.bench training-forward --out results

``flashlib bench`` is the same with a progress bar and figures. Each case is a race: every peer's result is first held against
the float64 oracle, then they are timed in turns. What is done is written down after every case, so a run that is killed keeps it.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from flashlib.launch.cpu.library import library, why_missing
from flashlib.measure.racing.cases import PRESETS, parse_grid, short_labels
from flashlib.measure.racing.contender import (
    Contender,
    DecodeWitness,
    Inputs,
    Witness,
    draw_inputs,
    failure,
    inputs_for,
    witness_of,
)
from flashlib.measure.racing.counted import run_counters
from flashlib.measure.racing.decoding import DECODE_PRESETS, DecodeCase, decode_cases, decode_peers
from flashlib.measure.racing.machine import matmul_flops_per_s, stream_bytes_per_s
from flashlib.measure.racing.memory import peak_bytes
from flashlib.measure.racing.peers import Peer, default_peers, find_peers
from flashlib.measure.racing.plan import AnyCase, Plan, case_of, sources_of
from flashlib.measure.racing.protocol import Protocol, protocol_cases, protocol_peers
from flashlib.measure.racing.timing import Timing, time_in_turns
from flashlib.measure.records.record import Record, new_record, save_record
from flashlib.measure.records.tables import Table, format_bytes, format_number, table

__all__ = [
    "compile_ahead",
    "plan",
    "race",
    "run",
    "summary",
    "told",
]

NOTES = (
    "Peers take turns in shuffled order. GPU time by device events around CUDA graphs, with enough input sets to miss the L2 "
    "cache; median of the rounds, 20th and 80th percentile. TFLOP/s by the papers' count: 4 B H S^2 D, half if causal, 2.5 times "
    "for the backward, visible pairs for windows. Masks are laid out and kernels compiled beforehand. Every result was within "
    "the error budget against float64 on sampled rows. eager_: the same calls from Python, one after another, by the clock."
)
DECODE_NOTES = (
    "Peers take turns in shuffled order. GPU time by device events around CUDA graphs, but for calls that read the host's memory, with "
    "enough input sets to miss the L2 cache; median of the rounds, 20th and 80th percentile. GB/s: bytes of K and V, each counted once, "
    "over the time. cache_bytes: of K and V as the peer holds them, which a memory has in the host's RAM; peak_bytes: the most that one "
    "call needs beside them and its queries. Every result was within the error budget against float64 on sampled requests. eager_: the same calls "
    "from Python, one after another, by the clock."
)
CPU_NOTES = (
    "Peers take turns in shuffled order, at first untimed, on one set of inputs; median of the rounds, 20th and 80th percentile. {clock} "
    "TFLOP/s and GB/s are counted as in the records of GPUs. Every result was within the error budget against float64 on sampled rows."
)
CPU_CLOCKS = {
    True: "Processor time of one thread, which other processes on the machine do not add to.",
    False: "Time by the clock.",
}
MEMORY_NOTES = (
    "Peak memory of one forward and backward, beyond q, k, v and the gradient of out, as the allocator counts it."
)
PROTOCOL_NOTES = (
    "Causal forward passes as a program calls them, one after the other, each waited for. ms, p90_ms, p99_ms: by the clock. tokens_per_s: at the "
    "mean. peak_bytes: beyond q, k and v. processors: seconds of processor time a second. Every result was within the error budget against "
    "float64 on sampled rows."
)
Report = Callable[[AnyCase, list[dict]], None]


def plan(
    what: str,
    *,
    peers: Iterable[str] = (),
    device: str | None = None,
    tutorial: Path | None = None,
    topic: str | None = None,
    seconds: float = 0.3,
    seed: int | None = None,
    limit_s: float | None = None,
) -> Plan:
    """A plan from the name of a preset, or from a grid such as ``"length=4096 mask=full,causal"``.

    Args:
        what: a name of :data:`flashlib.measure.racing.cases.PRESETS` or :data:`flashlib.measure.racing.decoding.DECODE_PRESETS`, ``"protocol"``, or a grid
            of :func:`flashlib.measure.racing.cases.parse_grid`.
        peers: by name; none for those worth racing on the device.
        device: ``"cuda"`` or ``"cpu"``; None for the GPU if there is one.
        tutorial: a copy of Triton's tutorial ``06-fused-attention.py``, to be a peer.
        topic: of the record; None for the preset's name.
        seconds, seed, limit_s: as in :class:`Plan`; without a seed, one is drawn.

    Raises:
        ValueError: there is no such preset, field, peer, device or file; says which there are.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU here")
    presets = (*PRESETS, *DECODE_PRESETS, "protocol")
    if what not in presets and "=" not in what:
        raise ValueError(
            f"there is no preset {what!r}; presets are {', '.join(presets)}; or name a grid: length=4096 ..."
        )
    if what == "protocol":
        cases, chosen = protocol_cases(device), find_peers(list(peers or protocol_peers(device)), tutorial)
    elif what in DECODE_PRESETS:
        cases, chosen = decode_cases(what, device), decode_peers(list(peers) or DECODE_PRESETS[what][2])
    else:
        cases = parse_grid(PRESETS.get(what, what), device=device, preset=what in PRESETS)
        chosen = find_peers(list(peers), tutorial) if peers else default_peers(device, tutorial)
    return Plan(
        topic=topic or (what.replace("-", "_") if what in presets else "bench"),
        cases=cases,
        peers=chosen,
        device=device,
        measures=what if what in ("memory", "protocol") else "speed",
        seconds=seconds,
        seed=random.SystemRandom().getrandbits(31) if seed is None else seed,
        limit_s=limit_s,
        tutorial=tutorial,
    )


def compile_ahead(plan: Plan, workers: int) -> None:
    """Fill the compilers' caches on disk by running each case once for each peer that compiles, in so many processes.

    A compiler uses one core, and hundreds of kernels are compiled before the first is timed. What fails here fails again, and is
    told, when its turn comes.
    """
    jobs = [
        (case, peer.name, plan.device, plan.tutorial) for case in plan.cases for peer in plan.peers if peer.compiles
    ]
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are as many as there should be
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(_compile_one, jobs, chunksize=1)


def _compile_one(case: AnyCase, name: str, device: str, tutorial: Path | None) -> None:
    (peer,) = decode_peers([name]) if isinstance(case, DecodeCase) else find_peers([name], tutorial)
    drawn = draw_inputs(case, torch.device(device), torch.Generator(device=device).manual_seed(0))[:1]
    _enter(peer, case, drawn, witness_of(case, drawn, random.Random(0)))
    _free(device)


def run(plan: Plan, out: Path, report: Report = lambda case, rows: None) -> Record:
    """Run all cases, and write ``<out>/<topic>.json`` after each.

    Args:
        report: called after each case with the rows it gave.

    Returns:
        the record. Its ``extra["complete"]`` is False as long as cases are missing.
    """
    started, rows = time.monotonic(), list[dict]()
    machine = ceilings(plan.device) if plan.measures == "speed" else {}
    measure: Any = {"speed": _Speed, "memory": _Memory, "protocol": Protocol}[plan.measures](plan)
    record = _record(plan, rows, machine, complete=False)
    for number, case in enumerate(plan.cases, start=1):
        if plan.limit_s is not None and time.monotonic() - started > plan.limit_s:
            break
        new = measure(case)
        rows += new
        record = _record(plan, rows, machine, complete=number == len(plan.cases))
        save_record(record, out)
        report(case, new)
    return record


def _record(plan: Plan, rows: list[dict], machine: dict, *, complete: bool) -> Record:
    extra = {"complete": complete, "cases": len(plan.cases), "seed": plan.seed, "device": plan.device, **machine}
    notes = {"speed": DECODE_NOTES if plan.decodes else NOTES, "memory": MEMORY_NOTES, "protocol": PROTOCOL_NOTES}[
        plan.measures
    ]
    if plan.device == "cpu" and plan.measures == "speed":
        notes = CPU_NOTES.format(clock=CPU_CLOCKS[_one_thread()])
    if plan.device == "cpu" and plan.measures != "memory":
        extra |= _processor()
    return new_record(plan.topic, rows, sources_of(plan), notes, **extra)


def _one_thread() -> bool:
    return torch.get_num_threads() == 1


def _clock(device: str) -> Callable[[], float]:
    """What is read around calls on a CPU: the processor's time, where one thread spends it."""
    return time.process_time if device == "cpu" and _one_thread() else time.perf_counter


def _processor() -> dict[str, str | int | None]:
    """What a record of a processor says of it: name, threads that PyTorch uses, and the instructions that our kernels use."""
    name = torch.cpu.get_capabilities().get("cpu_name", "unknown")
    variant = None if why_missing() else library().variant.name
    return {"cpu": name, "threads": torch.get_num_threads(), "cpu_kernels": variant}


def ceilings(device: str) -> dict[str, float]:
    """What this machine can do at best, in the same run: a large matrix product, and memory read and written."""
    matmul, stream = (8192, 2**32) if device == "cuda" else (1024, 2**26)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    clock = _clock(device)
    return {
        "matmul_flops_per_s": matmul_flops_per_s(matmul, dtype=dtype, device=device, clock=clock),
        "stream_bytes_per_s": stream_bytes_per_s(stream, device=device, clock=clock),
    }


class _Speed:
    """Races; draws its randomness from the plan's seed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rng = plan, random.Random(plan.seed)

    def __call__(self, case: AnyCase) -> list[dict]:
        return race(case, self.plan.peers, device=self.plan.device, seconds=self.plan.seconds, rng=self.rng)


def race(case: AnyCase, peers: Iterable[Peer], *, device: str, seconds: float, rng: random.Random) -> list[dict]:
    """Check and time all peers on one case: one row for each, with its figures or the reason why there are none.

    Columns: the case's own; ``peer``, ``peer_dtype``; ``ms``, ``p20_ms``, ``p80_ms``, ``rounds``, ``tflops``; ``error`` and
    ``budget`` by result; ``no_graph``; ``why_not``. On a GPU also ``eager_ms`` and its rate: a program's calls, one after another from Python, by
    the clock.
    """
    try:
        return _race(case, peers, torch.device(device), seconds, rng)
    finally:
        _free(device)  # the graphs, and what autograd kept


def _race(case: AnyCase, peers: Iterable[Peer], device: torch.device, seconds: float, rng: random.Random) -> list[dict]:
    drawn = draw_inputs(case, device, torch.Generator(device=device).manual_seed(rng.getrandbits(48)))
    witness = witness_of(case, drawn, rng)
    rows, contenders = [], {}
    for peer in peers:
        contender, obstacle = _enter(peer, case, drawn, witness)
        row = {**case.columns(), "peer": peer.name, "peer_dtype": peer.dtype or case.dtype, "ms": None}
        if contender is not None:
            row |= {"error": contender.comparison.error, "budget": contender.comparison.budget}
            if contender.comparison.passed:
                contenders[peer.name] = contender
            else:
                obstacle = f"wrong: {contender.comparison.message}"
        rows.append({**row, "why_not": obstacle})
    bursts = {name: contender.burst for name, contender in contenders.items()}
    timings = time_in_turns(bursts, device=device, budget_s=seconds, rng=rng, clock=_clock(device.type))
    eager = {name: contender.eager for name, contender in contenders.items() if contender.eager}
    waited = time_in_turns(eager, budget_s=seconds / 2, rng=rng)
    for row in rows:
        if row["peer"] in timings:
            row |= _figures(case, contenders[row["peer"]], timings[row["peer"]])
            if row["peer"] in waited:
                eager_ms = waited[row["peer"]].median_ms / contenders[row["peer"]].calls
                rates = {f"eager_{name}": rate for name, rate in case.rates(eager_ms).items()}
                row |= {"eager_ms": eager_ms, **rates}
            if isinstance(case, DecodeCase) and case.about_memory:
                contender = contenders[row["peer"]]
                row |= {"cache_bytes": contender.cache_bytes, "peak_bytes": peak_bytes(contender.once, device)}
    return rows


def _enter(
    peer: Peer, case: AnyCase, drawn: list[Inputs], witness: Witness | DecodeWitness
) -> tuple[Contender | None, str | None]:
    """The contender, or why there is none."""
    try:
        return Contender(peer, case, drawn, witness), None
    except Exception as error:  # other people's code may fail in any way, and the race goes on
        return None, failure(error)


def _figures(case: AnyCase, contender: Contender, timing: Timing) -> dict:
    median, low, high = (ms / contender.calls for ms in (timing.median_ms, timing.p20_ms, timing.p80_ms))
    figures = {
        "ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "rounds": timing.repeats,
        **case.rates(median),
    }
    return {**figures, "input_sets": contender.calls, "no_graph": contender.no_graph}


class _Memory:
    """Peak memory of forward and backward. A peer that ran out of memory is not asked for longer sequences."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rng = plan, random.Random(plan.seed)
        self.walls: dict[str, int] = {}

    def __call__(self, case: AnyCase) -> list[dict]:
        return [{**case.columns(), "peer": peer.name, **self._peak(peer, case)} for peer in self.plan.peers]

    def _peak(self, peer: Peer, case: AnyCase) -> dict:
        if peer.name in self.walls:
            return {"peak_bytes": None, "why_not": f"out of memory at length {self.walls[peer.name]}"}
        try:
            return {"peak_bytes": self._measured(peer, case), "why_not": None}
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.walls[peer.name] = case.length
            return {"peak_bytes": None, "why_not": failure(error)}
        finally:
            _free(self.plan.device)

    def _measured(self, peer: Peer, case: AnyCase) -> int:
        device = torch.device(self.plan.device)
        generator = torch.Generator(device=device).manual_seed(self.rng.getrandbits(48))
        inputs = inputs_for(peer, case, draw_inputs(case, device, generator)[0])
        qkv = (inputs.q, inputs.k, inputs.v)
        attend = peer.prepare(case, *qkv)

        def forward_and_backward():
            return torch.autograd.grad(attend(*qkv), qkv, inputs.grad_out)

        forward_and_backward()  # compiles, tunes, and sets up workspaces, none of which is the algorithm's memory
        _free(self.plan.device)
        return peak_bytes(forward_and_backward, device)


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def summary(record: Record) -> Table:
    """A record as a table: a line for each case, a column for each peer, and below it who could not run and why."""
    if any("stalls" in row for row in record.rows):
        return _counters_told(record)
    if any("tokens_per_s" in row for row in record.rows):
        return _protocol_told(record)
    if any("gb_per_s" in row for row in record.rows):
        value, show, unit = "gb_per_s", format_number, "GB/s of K and V, each counted once; more is better."
    elif any("peak_bytes" in row for row in record.rows):
        value, show, unit = "peak_bytes", format_bytes, "Peak memory of forward and backward, beyond their inputs."
    elif record.extra["device"] == "cuda":
        value, show, unit = "tflops", format_number, "TFLOP/s; more is better."
    else:
        value, show, unit = "tflops", lambda rate: format_number(1e3 * rate), "GFLOP/s; more is better."
    peers = list(dict.fromkeys(row["peer"] for row in record.rows))
    ran = [peer for peer in peers if any(row.get(value) for row in record.select(peer=peer))]
    labels, shared = short_labels(dict.fromkeys(map(case_of, record.rows)))
    lines: dict[str, dict[str, str]] = {}
    for row in record.rows:
        line = lines.setdefault(labels[case_of(row)], {})
        line[row["peer"]] = show(row[value]) if row.get(value) else "-"
        if row.get(f"eager_{value}"):
            line[row["peer"]] += f" / {show(row[f'eager_{value}'])}"
    rows = [(label, *(line.get(peer, "") for peer in ran)) for label, line in lines.items()]
    notes = [f"{unit} All: {shared}."]
    if any(row.get(f"eager_{value}") for row in record.rows):
        notes.append("In a CUDA graph / called from Python, one after another.")
    for peer in peers:
        reasons = dict.fromkeys(row["why_not"] for row in record.select(peer=peer) if row["why_not"])
        notes += [f"{peer}: {reason}" for reason in reasons]
    if value == "gb_per_s":
        notes += [_told_bytes(labels[case_of(row)], row) for row in record.rows if row.get("cache_bytes")]
    return table(rows, ["case", *ran], notes=notes)


def _counters_told(record: Record) -> Table:
    """Hardware counters: a line for each peer in each case."""
    labels, shared = short_labels(dict.fromkeys(map(case_of, record.rows)))
    rows, notes = [], [f"All: {shared}."]
    for row in record.rows:
        if row["why_not"]:
            notes.append(f"{labels[case_of(row)]}, {row['peer']}: {row['why_not']}")
            continue
        moved = (None if row[name] is None else format_bytes(row[name]) for name in ("dram_read", "dram_written", "l2_read", "l2_written", "shared_bytes"))  # fmt: skip
        busy = (None if row[name] is None else f"{row[name]:.0%}" for name in ("tensor_pipe", "exponential_unit"))
        waits = sorted(((reason, warps) for reason, warps in row["stalls"].items() if reason != "selected"), key=lambda stall: -stall[1])  # fmt: skip
        waiting = ", ".join(f"{reason} {warps:.1f}" for reason, warps in waits[:3])
        rows.append((labels[case_of(row)], row["peer"], 1e3 * row["seconds"], *moved, *busy, waiting))
    headers = ["case", "peer", "ms", "memory read", "written", "L2 read", "written", "shared memory", "tensor pipe", "exponentials", "warps waiting for each issue"]  # fmt: skip
    return table(rows, headers, notes=notes)


def _protocol_told(record: Record) -> Table:
    labels, shared = short_labels(dict.fromkeys(map(case_of, record.rows)))
    rows, notes = [], [f"All: {shared}."]
    for row in record.rows:
        label = labels[case_of(row)]
        if row["ms"] is None:
            notes.append(f"{label}, {row['peer']}: {row['why_not']}")
            continue
        latency = (row["ms"], row["p90_ms"], row["p99_ms"])
        rows.append((label, row["peer"], *latency, float(f"{row['tokens_per_s']:.3g}"), format_bytes(row["peak_bytes"]), round(row["processors"], 2), row["cache_misses"]))  # fmt: skip
    notes += dict.fromkeys(f"Cache misses: {row['cache_why_not']}." for row in record.rows if row.get("cache_why_not"))
    headers = ["case", "peer", "P50 ms", "P90 ms", "P99 ms", "tokens/s", "peak memory", "processors", "cache misses"]
    return table(rows, headers, notes=notes)


def _told_bytes(label: str, row: dict) -> str:
    held, needed = format_bytes(row["cache_bytes"]), format_bytes(row["peak_bytes"])
    return f"{label}, {row['peer']}: {format_number(row['ms'])} ms, K and V hold {held}, a call needs {needed} more"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        help=f"a preset ({', '.join((*PRESETS, *DECODE_PRESETS, 'protocol'))}) or a grid: 'length=4096 mask=full,causal'",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the record")
    parser.add_argument("--topic", help="name of the record; the preset's if not given")
    parser.add_argument("--peers", nargs="*", default=[], help="by name; none for those worth racing here")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--tutorial", type=Path, help="a copy of Triton's 06-fused-attention.py")
    parser.add_argument("--seconds", type=float, default=0.3, help="to time each peer in each case")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--limit", type=float, dest="limit_s", help="begin no case after so many seconds")
    parser.add_argument("--compilers", type=int, default=0, help="compile ahead in so many processes")
    parser.add_argument("--counters", action="store_true", help="read hardware counters instead of timing; needs ncu")
    options = vars(parser.parse_args())
    out, what, compilers, counters = (options.pop(name) for name in ("out", "what", "compilers", "counters"))
    chosen = plan(what, **options)
    if compilers:
        compile_ahead(chosen, compilers)
    print(summary(run_counters(chosen, out) if counters else run(chosen, out, report=_print_case)))


def _print_case(case: AnyCase, rows: list[dict]) -> None:
    print(f"{case.label}: {told(rows)}", flush=True)


def told(rows: list[dict]) -> str:
    """The rows of one case in one line."""
    figures = [f"{row['peer']} {format_number(row['ms'])} ms" for row in rows if row.get("ms")]
    figures += [
        f"{row['peer']} {format_bytes(row['peak_bytes'])}"
        for row in rows
        if row.get("peak_bytes") is not None and not row.get("ms")
    ]
    return ", ".join(figures) or "no peer could run it"


if __name__ == "__main__":
    main()
