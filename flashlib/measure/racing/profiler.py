"""Where the time of attention goes, while a program runs: by region, by phase and layer of a model, on the device's own clock.

    profiler = AttentionProfiler()
    with profiler.profile("prefill", tokens=4096):
        attention(q, k, v, causal=True)
    print(profiler.table())

    with profile(model) as seen:  # a transformers model
        model.generate(**inputs)
    print(seen.table())

Nothing waits for the device: on a GPU each region is two events on its stream, which are read when their turn has come or when a result
is asked for. No sample is kept: a region holds its count, mean and variance, and a histogram from which percentiles are read.

What is captured into a CUDA graph runs without Python: put regions around the graph's replay, not into what it captures. Noting peak
memory resets PyTorch's own peak (``torch.cuda.max_memory_allocated``); ``ProfilingConfig(memory=False)`` leaves it alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashlib.config import ProfilingConfig, current_config
from flashlib.measure.records.tables import Table, format_bytes, table

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AttentionProfiler", "ModelProfile", "RunningStatistics", "profile"]

BUCKETS = 64  # of the histogram, to each doubling: a percentile is within 0.6% of a sample
PENDING = 512  # regions whose events are not read yet, at most, before those that are done are


class RunningStatistics:
    """Count, mean, variance, extremes and percentiles of positive numbers, in memory that does not grow with their count.

    Percentiles come from a histogram whose buckets are evenly spaced by logarithm. Mean and variance are updated as in Welford 1962,
    "Note on a method for calculating corrected sums of squares and products" (Technometrics 4).
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0
        self.least, self.most = math.inf, -math.inf
        self._buckets: dict[int, int] = {}

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)
        self.least, self.most = min(self.least, value), max(self.most, value)
        bucket = math.floor(BUCKETS * math.log2(value)) if value > 0 else -(2**30)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    @property
    def total(self) -> float:
        return self.mean * self.count

    @property
    def deviation(self) -> float:
        """The sample standard deviation; 0 of fewer than two."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def percentile(self, share: float) -> float:
        """The least value that is no smaller than this share of all, to within a bucket. nan of none.

        Raises:
            ValueError: ``share`` is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1; got {share}")
        if not self.count:
            return math.nan
        rank, passed = max(1, math.ceil(share * self.count)), 0
        for bucket in sorted(self._buckets):
            passed += self._buckets[bucket]
            if passed >= rank:
                break
        middle = 2 ** ((bucket + 0.5) / BUCKETS) if bucket > -(2**30) else 0.0
        return min(max(middle, self.least), self.most)

    def to_dict(self) -> dict[str, float]:
        percentiles = (
            {f"p{round(100 * share)}": self.percentile(share) for share in (0.5, 0.9, 0.99)} if self.count else {}
        )
        ends = {"min": self.least, "max": self.most} if self.count else {}
        return {
            "count": self.count,
            "total": self.total,
            "mean": self.mean,
            "deviation": self.deviation,
            **percentiles,
            **ends,
        }


@dataclass
class Region:
    """What is known of one region, by its path.

    Attributes:
        ms: its times. own_ms: their sum, without that of the regions inside it. tokens: that it worked on.
        peak_bytes: the most that was allocated while it ran, on a GPU; None elsewhere.
    """

    ms: RunningStatistics = field(default_factory=RunningStatistics)
    own_ms: float = 0.0
    tokens: int = 0
    peak_bytes: int | None = None

    @property
    def tokens_per_s(self) -> float | None:
        return 1e3 * self.tokens / self.ms.total if self.tokens and self.ms.total else None


class Clock:
    """Marks in time on a CPU. What a profiler asks of a clock, and no more."""

    def mark(self) -> Any:
        return time.perf_counter_ns()

    def ready(self, mark: Any) -> bool:
        """Whether the mark has been passed, so that reading it waits for nothing."""
        return True

    def ms(self, start: Any, end: Any) -> float:
        """From one mark to another; waits for the later one."""
        return (end - start) / 1e6

    def forget_peak(self) -> None:
        """Begin anew to look for the most that is allocated."""

    def peak_bytes(self) -> int | None:
        """The most that was allocated since; None where nobody counts."""
        return None


class DeviceClock(Clock):
    """Marks in the stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def ready(self, mark: Any) -> bool:
        return mark.query()

    def ms(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        # As torch.cuda.max_memory_allocated, which first flattens and sorts all statistics, and takes five times as long.
        told = torch.cuda.memory_stats_as_nested_dict(self.device)
        return told["allocated_bytes"]["all"]["peak"] if told else 0


class AttentionProfiler:
    """Times regions of a program, which may lie inside one another and run on several threads.

    Args:
        config: None for that of the configuration in force (``FlashAttentionConfig.profiling``).
        device: whose clock is read; None for the GPU if there is one.
        clock: another clock.

    Attributes:
        enabled: whether anything is measured. While it is False, a region costs a look at this flag. It may be changed at any time; a
            region that has begun is measured to its end.

    Raises:
        TypeError: ``config`` is not a :class:`flashlib.config.ProfilingConfig`.
    """

    def __init__(
        self,
        config: ProfilingConfig | None = None,
        *,
        device: torch.device | str | None = None,
        clock: Clock | None = None,
    ) -> None:
        if config is not None and not isinstance(config, ProfilingConfig):
            raise TypeError(f"config must be a ProfilingConfig; got {type(config).__name__}")
        self.config = config or current_config().profiling
        self.enabled = self.config.enabled
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._clock = clock or (DeviceClock(device) if device.type == "cuda" else Clock())
        self._lock, self._local = threading.RLock(), threading.local()
        self.reset()

    def reset(self) -> None:
        """Forget everything measured so far."""
        with self._lock:
            self._regions: dict[str, Region] = {}
            self._pending: deque[_Running] = deque()
            self._events: deque[_Running] = deque(maxlen=self.config.trace_events)
            self._origin: Any = None

    def profile(self, name: str, *, tokens: int = 0) -> contextlib.AbstractContextManager:
        """A region: ``with profiler.profile("name"):``, or a decorator, ``@profiler.profile("name")``.

        Args:
            name: of the region; inside another one it is called ``"outer/name"``.
            tokens: that it works on each time.
        """
        return _Region(self, name, tokens) if self.enabled else _Off(self, name, tokens)

    def regions(self) -> dict[str, Region]:
        """Everything measured so far, by path. Waits for the device."""
        with self._lock:
            self._read(wait=True)
            return dict(self._regions)

    def to_dict(self) -> dict[str, dict]:
        """The same in plain numbers: milliseconds, bytes, tokens."""
        return {
            path: {
                **{f"{name}_ms" if name != "count" else name: value for name, value in region.ms.to_dict().items()},
                "own_ms": region.own_ms,
                "tokens": region.tokens,
                "tokens_per_s": region.tokens_per_s,
                "peak_bytes": region.peak_bytes,
            }
            for path, region in self.regions().items()
        }

    def export_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict` into a file, names as they are, whatever their script."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def export_trace(self, path: str | Path) -> None:
        """Write the last regions, as many as ``config.trace_events``, for Perfetto (ui.perfetto.dev) or chrome://tracing.

        Raises:
            ValueError: no region is kept, because ``trace_events`` is 0.
        """
        if not self.config.trace_events:
            raise ValueError(
                "no region was kept for a trace: profiling.trace_events is 0; set it to how many should be"
            )
        with self._lock:
            self._read(wait=True)
            events = [
                {
                    "name": run.path.rpartition("/")[2], "cat": "attention", "ph": "X", "pid": 1, "tid": run.thread,
                    "ts": 1e3 * self._clock.ms(self._origin, run.start), "dur": 1e3 * run.ms, "args": {"path": run.path, "tokens": run.tokens},
                }
                for run in self._events
            ]  # fmt: skip
        whole = {"traceEvents": events, "displayTimeUnit": "ms"}
        Path(path).write_text(json.dumps(whole, ensure_ascii=False) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """A line for each region."""
        rows = []
        for path, region in self.regions().items():
            times = region.ms
            percentiles = (times.percentile(share) for share in (0.5, 0.9, 0.99))
            peak = None if region.peak_bytes is None else format_bytes(region.peak_bytes)
            rows.append((path, times.count, times.total, *percentiles, region.tokens_per_s, peak))
        return table(rows, ["region", "calls", "total ms", "P50 ms", "P90 ms", "P99 ms", "tokens/s", "peak memory"])

    # What regions do

    def _begin(self, name: str, tokens: int) -> _Running:
        stack = self._stack()
        outer = stack[-1] if stack else None
        run = _Running(f"{outer.path}/{name}" if outer else name, tokens, outer, threading.get_ident())
        if self.config.memory:
            if outer is not None:
                self._note_peak(outer)
            self._clock.forget_peak()
        run.start = self._clock.mark()
        stack.append(run)
        return run

    def _end(self, run: _Running) -> None:
        run.end = self._clock.mark()
        self._stack().remove(run)
        if self.config.memory:
            self._note_peak(run)
            if run.outer is not None and run.peak is not None:
                run.outer.peak = max(run.outer.peak or 0, run.peak)
        with self._lock:
            if self._origin is None:
                self._origin = run.start
            self._pending.append(run)
            self._read(wait=False)

    def _stack(self) -> list[_Running]:
        try:
            return self._local.stack
        except AttributeError:
            self._local.stack = []
            return self._local.stack

    def _note_peak(self, run: _Running) -> None:
        peak = self._clock.peak_bytes()
        if peak is not None:
            run.peak = max(run.peak or 0, peak)

    def _read(self, *, wait: bool) -> None:
        """Count regions that are over, in the order in which they ended; those whose time is known, or with ``wait`` all."""
        while self._pending and (wait or len(self._pending) > PENDING or self._clock.ready(self._pending[0].end)):
            run = self._pending.popleft()
            run.ms = self._clock.ms(run.start, run.end)
            region = self._regions.setdefault(run.path, Region())
            region.ms.add(run.ms)
            region.own_ms += run.ms - run.inner_ms
            region.tokens += run.tokens
            if run.peak is not None:
                region.peak_bytes = max(region.peak_bytes or 0, run.peak)
            if run.outer is not None:
                run.outer.inner_ms += run.ms
                run.outer = None  # or a chain of all regions would stay alive
            if self.config.trace_events:
                self._events.append(run)


@dataclass(eq=False)
class _Running:
    """One run of a region."""

    path: str
    tokens: int
    outer: _Running | None
    thread: int
    start: Any = None
    end: Any = None
    ms: float = 0.0
    inner_ms: float = 0.0
    peak: int | None = None


class _Region:
    """What :meth:`AttentionProfiler.profile` gives: enter it, or decorate a function with it."""

    __slots__ = ("_name", "_profiler", "_tokens")

    def __init__(self, profiler: AttentionProfiler, name: str, tokens: int) -> None:
        self._profiler, self._name, self._tokens = profiler, name, tokens

    def __enter__(self) -> None:
        self._profiler._begin(self._name, self._tokens)

    def __exit__(self, *exception) -> None:
        self._profiler._end(self._profiler._stack()[-1])  # this thread's; others may have entered the same object

    def __call__(self, function: Callable) -> Callable:
        profiler, name, tokens = self._profiler, self._name, self._tokens

        @functools.wraps(function)
        def measured(*args, **kwargs):
            if not profiler.enabled:
                return function(*args, **kwargs)
            run = profiler._begin(name, tokens)
            try:
                return function(*args, **kwargs)
            finally:
                profiler._end(run)

        return measured


class _Off(_Region):
    """The same while nothing is measured. As a decorator it measures once the profiler is switched on."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception) -> None:
        pass


@dataclass(frozen=True)
class PhaseTimes:
    """Of all steps of one phase of a model: how many, their tokens, and where their milliseconds went.

    Attributes:
        steps, tokens: how many.
        total_ms: the model's forward passes. attention_ms: the attention functions in them, without projections. rest_ms: the rest.
        step_ms: the times of single steps.
        layer_ms: of each layer, and of the attention function in it.
    """

    steps: int
    tokens: int
    total_ms: float
    attention_ms: float
    step_ms: RunningStatistics
    layer_ms: tuple[tuple[float, float], ...]

    @property
    def rest_ms(self) -> float:
        return self.total_ms - self.attention_ms

    @property
    def attention_share(self) -> float:
        return self.attention_ms / self.total_ms if self.total_ms else 0.0


class ModelProfile:
    """What :func:`profile` has seen of a model."""

    def __init__(self, profiler: AttentionProfiler) -> None:
        self.profiler = profiler

    def phases(self) -> dict[str, PhaseTimes]:
        """``"prefill"`` and ``"decode"``, as far as there were any."""
        regions, found = self.profiler.regions(), {}
        for phase in PHASES:
            if phase not in regions:
                continue
            whole, layers = regions[phase], list[tuple[float, float]]()
            while (path := f"{phase}/layer {len(layers)}") in regions:
                attention = regions.get(f"{path}/attention")
                layers.append((regions[path].ms.total, attention.ms.total if attention else 0.0))
            found[phase] = PhaseTimes(
                whole.ms.count, whole.tokens, whole.ms.total, sum(attention for _, attention in layers), whole.ms, tuple(layers)
            )  # fmt: skip
        return found

    def table(self) -> Table:
        """A line for each phase, and for each of its layers."""
        rows: list[tuple] = []
        for phase, times in self.phases().items():
            p50, p99 = (times.step_ms.percentile(share) for share in (0.5, 0.99))
            rate = 1e3 * times.tokens / times.total_ms if times.total_ms else None
            rows.append((phase, times.steps, times.tokens, times.total_ms, times.attention_ms, f"{times.attention_share:.0%}", p50, p99, rate))  # fmt: skip
            for number, (whole, attention) in enumerate(times.layer_ms):
                share = f"{attention / whole:.0%}" if whole else ""
                rows.append((f"  layer {number}", None, None, whole, attention, share, None, None, None))
        return table(rows, ["phase", "steps", "tokens", "ms", "attention ms", "share", "P50 ms", "P99 ms", "tokens/s"])


PHASES = ("prefill", "decode")


@contextlib.contextmanager
def profile(model: nn.Module, profiler: AttentionProfiler | None = None) -> Iterator[ModelProfile]:
    """Measure every forward pass of a transformers model inside the block, by phase and layer, and attention apart from the rest.

    A pass over more than one token of each sequence counts as prefill, one over a single token as decoding. Attention is the
    function that the model's attention implementation names: what :func:`flashlib.interop.transformers.set_attention` puts there, or
    transformers' own ``sdpa``. It is wrapped for the time of the block; nothing of the model stays changed.

    Args:
        model: a transformers model whose decoder layers are a list called ``layers``.
        profiler: None for a new one.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: it has no list of layers, or its attention implementation is ``eager``, which is no function that can be wrapped.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    layers: Any = next((module.layers for module in model.modules() if isinstance(getattr(module, "layers", None), torch.nn.ModuleList)), None)  # fmt: skip
    if layers is None:
        raise ValueError(f"model must have a list of decoder layers called layers; {type(model).__name__} has none")
    name = model.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attention implementation {name!r} is no function that can be wrapped; call set_attention(model) first"
        )
    profiler = profiler or AttentionProfiler(device=model.device)
    original, hooks = ALL_ATTENTION_FUNCTIONS[name], list[Any]()
    watched: Any = profiler.profile("attention")
    AttentionInterface.register(name, watched(original))
    try:
        hooks += _watch(model, profiler, _phase)
        for number, layer in enumerate(layers):
            hooks += _watch(layer, profiler, partial(_layer, number))
        yield ModelProfile(profiler)
    finally:
        AttentionInterface.register(name, original)
        for hook in hooks:
            hook.remove()


def _layer(number: int, args: tuple, kwargs: dict) -> tuple[str, int]:
    return f"layer {number}", 0


def _watch(module: nn.Module, profiler: AttentionProfiler, naming: Callable[[tuple, dict], tuple[str, int]]) -> list:
    """Hooks that make a module's forward a region, however it ends."""
    running: list[_Running | None] = []

    def before(_module, args, kwargs):
        running.append(profiler._begin(*naming(args, kwargs)) if profiler.enabled else None)

    def after(_module, _args, _output):
        run = running.pop()
        if run is not None:
            profiler._end(run)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]


def _phase(args: tuple, kwargs: dict) -> tuple[str, int]:
    """The phase of a forward pass, and its tokens, from the shape of its input."""
    given = next((x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if isinstance(x, torch.Tensor)), None)  # fmt: skip
    batch, length = given.shape[:2] if given is not None else (1, 1)
    return PHASES[length == 1], batch * length
