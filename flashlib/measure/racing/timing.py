"""Timing calls, alone or against each other: on a CPU by the clock, on a GPU by device events."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

__all__ = ["Timing", "capture", "time_call", "time_in_turns"]

BURST_MS = 8.0  # of one call after another before it is the next one's turn: long beside the events around it


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls: the median, and the 20th and 80th percentile as its spread."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.p20_ms:.3g} to {self.p80_ms:.3g}, {self.repeats} repeats)"


def time_call(
    call: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 0.5,
    min_repeats: int = 3,
    max_repeats: int = 1000,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Call again and again for about ``budget_s`` seconds, after a warm-up, and summarize.

    Args:
        call: takes no argument.
        device: where the call's work is done. On CUDA the time is between two device events, so that it holds the device's
            work and not Python's.
        budget_s: about how long to measure. At least ``min_repeats`` and at most ``max_repeats`` calls.

    Raises:
        TypeError: ``call`` cannot be called.
    """
    if not callable(call):
        raise TypeError(f"call must be callable without arguments; got {type(call).__name__}")
    on_gpu = torch.device(device).type == "cuda"
    once = _gpu_ms if on_gpu else partial(_cpu_ms, clock=clock)
    once(call)  # warm-up: compilation, caches, thread pools
    estimate = once(call)
    repeats = int(min(max_repeats, max(min_repeats, budget_s * 1000 / max(estimate, 1e-3))))
    return _summary([once(call) for _ in range(repeats)])


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 0.5,
    min_rounds: int = 5,
    max_rounds: int = 100,
    rng: random.Random | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time several calls against each other, so that whatever slows the machine down for a while slows all of them down.

    In each round every call has its turn, in an order drawn anew: once untimed, for what the one before left in the caches, and
    then as often as fills :data:`BURST_MS`. A round's mean is one sample.

    Args:
        calls: by name; none takes an argument.
        budget_s: about how long to measure each.
        rng: where the orders come from; None for a fresh source.
        clock: seconds, for calls on a CPU. ``time.process_time`` does not count what other processes take of the machine, but it adds
            up the threads of this one.

    Returns:
        by name, the median of the rounds and its spread.
    """
    rng, on_gpu = rng or random.Random(), torch.device(device).type == "cuda"
    burst = _gpu_ms if on_gpu else partial(_cpu_ms, clock=clock)
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        burst(call)
        repeats[name] = max(1, min(50, round(BURST_MS / max(burst(call), 1e-3))))
    slowest_s = max((burst(calls[name], repeats[name]) * repeats[name] for name in calls), default=0.0) / 1e3
    rounds = int(min(max_rounds, max(min_rounds, budget_s / max(slowest_s, 1e-6))))
    for _ in range(rounds):
        for name in rng.sample(list(calls), len(calls)):
            calls[name]()
            samples[name].append(burst(calls[name], repeats[name]))
    return {name: _summary(times) for name, times in samples.items()}


def capture(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> Callable[[], object]:
    """One CUDA graph of all the calls, one after the other; the function that launches it.

    With a graph the time is the device's, however long Python takes to launch. The calls must have run before, on ``stream``.

    Raises:
        RuntimeError: one of the calls cannot be captured, because it waits for the device, for instance.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def _summary(times: list[float]) -> Timing:
    times, count = sorted(times), len(times)
    return Timing(statistics.median(times), times[int(0.2 * count)], times[int(0.8 * count)], count)


def _cpu_ms(call: Callable[[], object], repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    for _ in range(repeats):
        call()
    return (clock() - started) * 1e3 / repeats


def _gpu_ms(call: Callable[[], object], repeats: int = 1) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats
