"""Timing one call, on a CPU by the clock and on a GPU by device events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Timing", "time_call"]


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
    once = _gpu_ms if on_gpu else _cpu_ms
    once(call)  # warm-up: compilation, caches, thread pools
    estimate = once(call)
    repeats = int(min(max_repeats, max(min_repeats, budget_s * 1000 / max(estimate, 1e-3))))
    times = sorted(once(call) for _ in range(repeats))
    return Timing(statistics.median(times), times[int(0.2 * repeats)], times[int(0.8 * repeats)], repeats)


def _cpu_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _gpu_ms(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
