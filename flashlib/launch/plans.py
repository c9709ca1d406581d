"""Plans: launches worked out once for each class of problem, and then only given their addresses.

Two calls are of one class if they agree in everything but addresses and numbers in memory: shapes, strides, dtypes, device, and the options. For such
calls grids, tiles, strides and every parameter but the addresses are the same. So the launches are made once, from forms
(:mod:`flashlib.launch.forms`), and turned into packets (:mod:`flashlib.launch.packets`); a call allocates its results, and starts the packets.
Of classes that differ in numbers alone, the third is planned by a recipe (:mod:`flashlib.launch.recipes`), in a fifth of the time.

What launches need in between (what one kernel leaves for the next) belongs to a thread and a stream: two threads on one stream must not share it.
Without a plan (no C compiler, a profiler that listens to each launch, tiles that must be searched for) the same launches are made anew for each call.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashlib.launch import packets
from flashlib.launch.counters import counters_of
from flashlib.launch.forms import Form, Memory, NotPlannable
from flashlib.launch.recipes import Recipe, record
from flashlib.launch.start import TRITON_INSTALLED, Launch, interpreting

__all__ = ["Plan", "keep", "kept_plan", "launches_are_watched", "plan_by_recipe", "plan_for", "plannable"]

MOST_PLANS = 1024  # kept; the oldest goes first
MOST_KINDS, MOST_RECIPES = 256, 16  # kinds of problem of which recipes are kept, and recipes of each
UNREAD_BYTES = 1 << 20  # results that nobody asked for, if they take no more, are written where nobody looks
HEAD_TENSOR_DIMS = 4  # [B, H, S, D]
KEPT_BYTES = 1 << 20  # scratch memory, if it takes no more, is kept for the next call
SCRATCH_STEP = 256  # bytes; what every piece of scratch memory begins at a multiple of


# Asked of PyTorch itself: its public functions of the same purpose take several times as long, and some make an object.
PLANNED = "cuda"  # devices whose launches are planned
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_capturing = torch._C._cuda_isCurrentStreamCapturing


class Plan:
    """Launches of one class of problem, on one device.

    Args:
        results: shape, strides and dtype of what a call returns, in order. others: bytes of all but the first.
        scratch: bytes that launches need in between. counts: counters.
        started: the packets. names: of their kernels.
    """

    def __init__(
        self, device: torch.device, results: list[tuple], others: int, asks_for_more: bool, scratch: int, counts: int,
        started: tuple, names: list[str],
    ):  # fmt: skip
        self.device, self.index, self.others_are_small = device, device.index, others <= UNREAD_BYTES
        self.results = tuple([(*form, device) for form in results])
        self.asks_for_more, self.scratch, self.counts = asks_for_more, scratch, counts
        self.packets, self.names = started, names
        self.start = packets.needed().run

    def with_first(self, shape: tuple[int, ...]) -> Plan:
        """The same plan, whose first result is a contiguous tensor of another ``shape``, which lies in memory as that of this one does."""
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        other = copy.copy(self)
        other.results = ((shape, strides, *self.results[0][2:]), *self.results[1:])
        return other

    def run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Start the kernels on the current stream, and return the results.

        Args:
            inputs: tensors of the forms that the plan was made for, on its device, which is the current one.
        """
        return self.start_on(_raw_stream(self.index), inputs, len(self.results), 0)

    def run_first(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Start the kernels, and return the first result. The others are not wanted: where they are small, all calls write them to one place."""
        if not self.others_are_small or _capturing():  # what a graph writes whenever it is replayed must be its own
            return self.run(inputs)[0]
        stream = _raw_stream(self.index)
        return self.start_on(stream, inputs, 1, _memory_of(self.device, stream).unread.address)[0]

    def start_on(self, stream: int, inputs: tuple[Tensor, ...], wanted: int, unread: int) -> list[Tensor]:
        """Start the kernels, and return so many results; the others are written to the address ``unread``."""
        if not self.asks_for_more:
            return self.start(self.packets, self.results, stream, inputs, wanted, unread, 0, 0)
        # Held until the packets are started: what the allocator gives out afterwards, this stream uses afterwards.
        scratch = _scratch(self.device, stream, self.scratch) if self.scratch else None
        counts = _counters(self.device, stream, self.counts) if self.counts else 0
        address = 0 if scratch is None else scratch.address
        return self.start(self.packets, self.results, stream, inputs, wanted, unread, address, counts)


def parts(memory: Memory, inputs: int, launches: Sequence[Launch], results: Sequence[Form]) -> tuple:
    """What a :class:`Plan` is made from, but for its device.

    Args:
        memory: the places that the launches were made from; its first ``inputs`` come with each call.
        results: what a call returns, in order.
    """
    places = packets.Places({source: (source, 0) for source in range(inputs)})
    for index, form in enumerate(results, start=inputs):
        places[form.source] = (index, -form.offset)
    rest = [form for form in memory.made if form.source not in places]
    at_scratch, at_counters = inputs + len(results), inputs + len(results) + 1
    scratch = counts = 0
    for form in rest:
        if form.is_counters:
            places[form.source] = (at_counters, 4 * counts)
            counts += -(-form.numel() // 4) * 4
        else:
            places[form.source] = (at_scratch, scratch)
            scratch += -(-form.bytes // SCRATCH_STEP) * SCRATCH_STEP
    launches = [launch for launch in launches if 0 not in launch.grid]
    return (
        [(form.shape, form.stride(), form.dtype) for form in results],
        sum(form.bytes for form in results[1:]),
        bool(rest), scratch, counts,
        tuple([packets.packet(launch, places) for launch in launches]),
        [launch.name for launch in launches],
    )  # fmt: skip


class _Piece:
    """A tensor and its address, which takes as long to ask for as the rest of what is done with it."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.address, self.length = tensor, tensor.data_ptr(), len(tensor)


class _StreamMemory:
    """What calls on one stream use one after the other: it is freed in the stream's order, like all that is allocated on it."""

    def __init__(self, device: torch.device):
        self.unread = _Piece(torch.empty(UNREAD_BYTES, dtype=torch.uint8, device=device))
        self.counters = _Piece(torch.empty(0, dtype=torch.int32, device=device))


class _ThreadMemory(threading.local):
    """Scratch memory by device and stream."""

    def __init__(self) -> None:
        self.scratch: dict[tuple[torch.device, int], _Piece] = {}


_memories: dict[tuple[torch.device, int], _StreamMemory] = {}
_own = _ThreadMemory()


def _scratch(device: torch.device, stream: int, size: int) -> _Piece:
    """So many bytes for the launches of one call. Little is kept for the next, unless a graph is captured, whose memory must be its own."""
    if size > KEPT_BYTES or _capturing():
        return _Piece(torch.empty(size, dtype=torch.uint8, device=device))
    piece = _own.scratch.get((device, stream))
    if piece is None or piece.length < size:
        piece = _own.scratch[device, stream] = _Piece(torch.empty(size, dtype=torch.uint8, device=device))
    return piece


def _memory_of(device: torch.device, stream: int) -> _StreamMemory:
    memory = _memories.get((device, stream))
    if memory is None:
        memory = _memories[device, stream] = _StreamMemory(device)
    return memory


def _counters(device: torch.device, stream: int, count: int) -> int:
    """The address of so many zeros, for the next launch on a stream."""
    if _capturing():
        return counters_of(device).take_on(stream, count).data_ptr()
    memory = _memory_of(device, stream)
    if memory.counters.length < count:
        memory.counters = _Piece(counters_of(device).take_on(stream, count))
    return memory.counters.address


_keeping = threading.Lock()


def keep(store: dict, key: Any, value: Any, most: int) -> None:
    """``store[key] = value``, without those that have been there longest if there are ``most`` already."""
    with _keeping:
        while len(store) >= most:
            store.pop(next(iter(store)))
        store[key] = value


@dataclass
class _Kept:
    """Plans by class, and None for a class that has none. Bounded."""

    plans: dict[tuple | None, Plan | None] = field(default_factory=dict)

    def put(self, key: tuple, plan: Plan | None) -> None:
        keep(self.plans, key, plan, MOST_PLANS)


_kept = _Kept()
_recipes: dict[tuple, list[Recipe] | None] = {}  # by kind of problem; None where there can be none


def form_of(x: Tensor) -> tuple:
    """All of a tensor that a launch depends on, but for its device and that it begins at a multiple of 16 bytes."""
    return x.shape, x.stride(), x.dtype


def plannable(device: torch.device) -> bool:
    """Whether launches on ``device`` go by plans now."""
    return (
        device.type == PLANNED
        and device.index == _current_device()
        and plans_are_possible()
        and not launches_are_watched()
    )


@cache
def plans_are_possible() -> bool:
    """Whether this machine can plan: Triton, a C compiler at the first use, and kernels that are compiled."""
    return TRITON_INSTALLED and not interpreting() and packets.library() is not None


def launches_are_watched() -> bool:
    """Whether somebody, such as Triton's profiler, wants to be told of every launch by Triton's launcher."""
    runtime = _triton_runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@cache
def _triton_runtime():
    from triton import knobs

    return knobs.runtime


def kept_plan(build: Callable, tensors: Sequence[Tensor], options) -> Plan | None:
    """The plan of a class of problem if there is one already; arguments as of :func:`plan_for`."""
    return _kept.plans.get(_key(build, tensors, options)) if plannable(tensors[0].device) else None


def plan_for(build: Callable, tensors: Sequence[Tensor], options) -> Plan | None:
    """The plan of a class of problem; None if it has none.

    Args:
        build: makes the launches, ``build(*tensors, options) -> (launches, results)``, from tensors or their forms.
        tensors: the problem's, such that ``build`` need not copy them. options: has ``tensors()``, ``key()``, and ``with_tensors(list)``,
            which gives the same with others.
    """
    device = tensors[0].device
    key = _key(build, tensors, options) if plannable(device) else None
    if key is None:
        return None
    plan = _kept.plans.get(key)
    if plan is None and key not in _kept.plans:
        kind, numbers = _kind(build, tensors, options.tensors(), options, device)
        plan, is_final = _by_recipe(kind, numbers, device), True
        if plan is None:
            plan, is_final = _made(build, tensors, options, device)
            if plan is not None:
                _learn(kind, numbers, build, tensors, options, device)
        if is_final:
            _kept.put(key, plan)
    return plan


def _key(build: Callable, tensors: Sequence[Tensor], options) -> tuple | None:
    """What a plan is known by; None if a tensor does not begin at a multiple of 16 bytes."""
    described = packets.needed().describe((*tensors, *options.tensors()), 0)
    return None if described is None else (build, options.key(), described)


def _made(build: Callable, tensors: Sequence[Tensor], options, device: torch.device) -> tuple[Plan | None, bool]:
    """A plan, or None; and whether that holds for good."""
    more = options.tensors()
    try:
        return Plan(
            device, *_parts(build, [form_of(x) for x in tensors], [form_of(x) for x in more], options, device)
        ), True
    except NotPlannable as why_not:
        return None, why_not.is_final


def _parts(build: Callable, tensors: Sequence[tuple], more: Sequence[tuple], options, device: torch.device) -> tuple:
    """What a plan is made from; of tensors :func:`form_of`."""
    memory = Memory(device)
    forms = [memory.input(*form) for form in tensors]
    others = [memory.input(*form) for form in more]
    launches, results = build(*forms, options.with_tensors(others))
    return parts(memory, len(forms) + len(others), launches, results)


def _kind(
    build: Callable, tensors: Sequence[Tensor], more: Sequence[Tensor], options, device: torch.device
) -> tuple[tuple, list]:
    """What a class has in common with others whose launches follow from their numbers in the same way, and its numbers."""
    numbers = [*options.numbers_by_name().values()]
    kind = [build, device, *options.kind(), *map(type, numbers)]
    for x in (*tensors, *more):
        shape, strides = x.shape, x.stride()
        if len(shape) == HEAD_TENSOR_DIMS:
            batch, heads, length, width = shape
            *steps, step = strides
            kind += x.dtype, width, step
            numbers += batch, heads, length, *steps
        else:
            kind += x.dtype, len(shape), strides[-1:]
            numbers += shape
            numbers += strides[:-1]
    return tuple(kind), numbers


def _free_sizes(dims: int) -> int:
    """How many sizes of a tensor are numbers of its class: all but the head_dim, by which kernels are chosen."""
    return dims if dims < HEAD_TENSOR_DIMS else dims - 1


def plan_by_recipe(build: Callable, tensors: Sequence[Tensor], options) -> Plan | None:
    """:func:`plan_for` of tensors on the current device that begin at multiples of 16 bytes, if a recipe is good for them. It is not kept."""
    device = tensors[0].device
    return _by_recipe(*_kind(build, tensors, options.tensors(), options, device), device)


def _by_recipe(kind: tuple, numbers: list, device: torch.device) -> Plan | None:
    """The plan of a class that one of its kind's recipes is good for."""
    for recipe in _recipes.get(kind) or ():
        found = recipe(*numbers)
        if found is not None:
            return Plan(device, *found)
    return None


def _learn(
    kind: tuple, numbers: list, build: Callable, tensors: Sequence[Tensor], options, device: torch.device
) -> None:
    """Write a recipe from a class that none was good for, if it is not the first of its kind: many programs know but one."""
    if kind not in _recipes:
        keep(_recipes, kind, [], MOST_KINDS)
        return
    known = _recipes[kind]
    if known is None or len(known) >= MOST_RECIPES:
        return
    more = options.tensors()
    named = options.numbers_by_name()

    def make(symbols: Sequence[Any]) -> tuple:
        each = iter(symbols)
        others = options.with_numbers({name: next(each) for name in named})
        forms = []
        for x in (*tensors, *more):
            free = _free_sizes(x.dim())
            shape = (*[next(each) for _ in range(free)], *x.shape[free:])
            strides = (*[next(each) for _ in range(x.dim() - 1)], *x.stride()[-1:])
            forms.append((shape, strides, x.dtype))
        return _parts(build, forms[: len(tensors)], forms[len(tensors) :], others, device)

    try:
        known.append(record(make, numbers))
    except (TypeError, NotPlannable):  # its code does with numbers what symbols cannot
        _recipes[kind] = None
