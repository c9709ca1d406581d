"""Plans: launches worked out once for each class of problem, and then only given their addresses.

Two calls are of one class if they agree in everything but addresses and numbers in memory: shapes, strides, dtypes, device, and the options. For such
calls grids, tiles, strides and every parameter but the addresses are the same. So the launches are made once, from forms
(:mod:`flashlib.launch.forms`), and turned into packets (:mod:`flashlib.launch.packets`); a call allocates its results, and starts the packets.

What launches need in between (what one kernel leaves for the next) is one allocation per call: two threads on one stream must not share it.
Without a plan (no C compiler, a profiler that listens to each launch, tiles that must be searched for) the same launches are made anew for each call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flashlib.launch import packets
from flashlib.launch.counters import counters_of
from flashlib.launch.forms import Form, Memory, NotPlannable
from flashlib.launch.start import TRITON_INSTALLED, Launch, interpreting

__all__ = ["Plan", "launches_are_watched", "plan_for", "plannable"]

MOST_PLANS = 1024  # kept; the oldest goes first
MOST_UNREAD = 1 << 18  # numbers
SCRATCH_STEP = 256  # bytes; what every piece of scratch memory begins at a multiple of


class Plan:
    """Launches of one class of problem, on one device.

    Args:
        memory: the places that the launches were made from; its first ``inputs`` come with each call.
        results: what a call returns, in order.
    """

    def __init__(self, memory: Memory, inputs: int, launches: Sequence[Launch], results: Sequence[Form]):
        self.device = memory.device
        self.index = memory.device.index
        self.results = tuple(
            (form.shape, form.stride(), {"dtype": form.dtype, "device": self.device}) for form in results
        )
        places = packets.Places({source: (source, 0) for source in range(inputs)})
        for index, form in enumerate(results, start=inputs):
            places[form.source] = (index, -form.offset)
        rest = [form for form in memory.made if form.source not in places]
        self.asks_for_more = bool(rest)
        scratch, counters = inputs + len(results), inputs + len(results) + 1
        self.scratch = self.counts = 0
        for form in rest:
            if form.is_counters:
                places[form.source] = (counters, 4 * self.counts)
                self.counts += -(-form.numel() // 4) * 4
            else:
                places[form.source] = (scratch, self.scratch)
                self.scratch += -(-form.bytes // SCRATCH_STEP) * SCRATCH_STEP
        launches = [launch for launch in launches if 0 not in launch.grid]
        self.names = [launch.name for launch in launches]
        self.packets = tuple(packets.packet(launch, places) for launch in launches)
        self.start = packets.library().start

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Start the kernels on the current stream, and return the results.

        Args:
            inputs: tensors of the forms that the plan was made for, on its device, which is the current one.
        """
        results = [torch.empty_strided(shape, strides, **kind) for shape, strides, kind in self.results]
        self.start_on(torch._C._cuda_getCurrentRawStream(self.index), [*inputs, *results])
        return results

    def run_first(self, inputs: Sequence[Tensor]) -> Tensor:
        """Start the kernels, and return the first result. The others are not wanted; where they are small, all calls write them to one place."""
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        (shape, strides, kind), *others = self.results
        tensors = [*inputs, torch.empty_strided(shape, strides, **kind)]
        tensors += [self._unread(stream, result) for result in others]
        self.start_on(stream, tensors)
        return tensors[len(inputs)]

    def _unread(self, stream: int, result: tuple) -> Tensor:
        shape, strides, kind = result
        # What a graph writes whenever it is replayed must be its own. Long calls do not mind an allocation.
        if math.prod(shape) > MOST_UNREAD or torch._C._cuda_isCurrentStreamCapturing():
            return torch.empty_strided(shape, strides, **kind)
        place = _unread.get((self.index, stream))
        if place is None:
            place = _unread[self.index, stream] = torch.empty(8 * MOST_UNREAD, dtype=torch.uint8, device=self.device)
        return place

    def start_on(self, stream: int, tensors: Sequence[Tensor]) -> None:
        """Start the kernels: the inputs and the results are there."""
        addresses = [x.data_ptr() for x in tensors]
        if self.asks_for_more:
            # Held until the packets are started: what the allocator gives out afterwards, this stream uses afterwards.
            scratch = torch.empty(self.scratch, dtype=torch.uint8, device=self.device) if self.scratch else None
            addresses.append(0 if scratch is None else scratch.data_ptr())
            addresses.append(counters_of(self.device).take_on(stream, self.counts).data_ptr() if self.counts else 0)
        self.start(self.packets, stream, tuple(addresses))


@dataclass
class _Kept:
    """Plans by class, and None for a class that has none. Bounded."""

    plans: dict[tuple, Plan | None]
    lock: threading.Lock

    def put(self, key: tuple, plan: Plan | None) -> None:
        with self.lock:
            while len(self.plans) >= MOST_PLANS:
                self.plans.pop(next(iter(self.plans)))
            self.plans[key] = plan


_unread: dict[
    tuple[int, int], Tensor
] = {}  # by device and stream, so that its memory is freed and used again in the stream's order
_kept = _Kept({}, threading.Lock())


def form_of(x: Tensor) -> tuple:
    """All of a tensor that a launch depends on, but for its device and that it begins at a multiple of 16 bytes."""
    return x.shape, x.stride(), x.dtype


def plannable(device: torch.device) -> bool:
    """Whether launches on ``device`` go by plans now."""
    return (
        device.type == "cuda"
        and device.index == torch._C._cuda_getDevice()
        and plans_are_possible()
        and not launches_are_watched()
    )


@cache
def plans_are_possible() -> bool:
    """Whether this machine can plan: Triton, a C compiler at the first use, and kernels that are compiled."""
    return TRITON_INSTALLED and not interpreting() and packets.library() is not None


def launches_are_watched() -> bool:
    """Whether somebody, such as Triton's profiler, wants to be told of every launch by Triton's launcher."""
    return any(getattr(hooks, "calls", hooks) for hooks in _hooks())


def _hooks() -> tuple:
    from triton import knobs

    return knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook


def plan_for(build: Callable, tensors: Sequence[Tensor], options) -> Plan | None:
    """The plan of a class of problem; None if it has none.

    Args:
        build: makes the launches, ``build(*tensors, options) -> (launches, results)``, from tensors or their forms.
        tensors: the problem's. options: has ``tensors()``, ``key()``, and ``with_tensors(list)``, which gives the same with others.
    """
    device = tensors[0].device
    if not plannable(device):
        return None
    more = options.tensors()
    key = (build, device.index, *map(form_of, tensors), options.key(), *map(form_of, more))
    plan = _kept.plans.get(key, _kept)
    if plan is _kept:
        if any(x.data_ptr() % 16 for x in (*tensors, *more)):
            return None
        plan, is_final = _made(build, tensors, options, device)
        if is_final:
            _kept.put(key, plan)
    elif any(x.data_ptr() & 15 for x in (*tensors, *more)):
        return None
    return plan


def _made(build: Callable, tensors: Sequence[Tensor], options, device: torch.device) -> tuple[Plan | None, bool]:
    """A plan, or None; and whether that holds for good."""
    memory = Memory(device)
    forms = [memory.input(x) for x in tensors]
    more = [memory.input(x) for x in options.tensors()]
    try:
        launches, results = build(*forms, options.with_tensors(more))
        return Plan(memory, len(forms) + len(more), launches, results), True
    except NotPlannable as why_not:
        return None, why_not.is_final
