"""How long work takes at least, and about how long it will take: three roofs, and the power cap.

A kernel cannot be faster than the memory brings its bytes, than the tensor cores form its products, or than the special function
units form its exponentials; and a GPU that would draw more than its power cap lowers its clock until it does not. The first three
are data sheet figures. The fourth is what a large matrix product reaches, which does nothing but multiply.

An estimate is more than the highest roof (:func:`launch_time`):

* In attention the exponentials of a tile wait for its products, and the next products for them. Kernels overlap the two, and
  have other instructions to issue besides; the estimate takes both for equal, and **adds up products and exponentials** of a
  tile, each at its data sheet's rate.
* Programs run in waves. They are put on multiprocessors in the order in which they start, each as soon as one is free; a program
  costs what its tiles cost, and :data:`PROGRAM_TILES` more in which it fills and drains its pipeline; twice as many where two
  programs share a multiprocessor, whose tiles are half as large.
* A kernel costs :data:`KERNEL_SECONDS` beside its programs.
* A decoding program alone on its multiprocessor takes :data:`LONE_STEP_SECONDS` for a tile of several queries.

The last of these was set by one recorded run, which is left out of the verdict; nothing else was fitted.
:mod:`flashlib.cost.verdict` holds the estimates against recorded runs.

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model" (CACM 52, 4).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flashlib.cost.counts import Problem, Work, compulsory, fa2
from flashlib.cost.devices import Device
from flashlib.cost.launches import SPLIT_COST, Launch, backward_launches, decode_launches, forward_launches

__all__ = ["ROOFS", "Estimate", "attention_time", "launch_time", "matmul_time", "roofs", "tiles_time", "total"]

RECORDED, RECORDED_HEADS = (
    ("hopper_forward", "hopper_dkdv", "decode_split"),
    {64, 128},
)  # kernels and head_dims of those runs
ROOFS = ("memory", "products", "exponentials", "power")
PROGRAM_TILES = SPLIT_COST  # what flashlib.inference.decode has a split cost beside its tiles
KERNEL_SECONDS = (
    2e-6  # in a CUDA graph, from the last program of the kernel before it to the first of its own; a round figure
)
# A decoding program that has a multiprocessor to itself takes so long for a tile of more rows than the least, however fast the memory is: its
# two products and the softmax between them wait for one another, and nobody else fills the time.
LEAST_ROWS, LONE_STEP_SECONDS = 16, 1.5e-6
SIMULATED = 20_000  # programs; of more, these many are put on multiprocessors and the rest taken to run like them
# By how much an estimate may be off. The first is for what recorded runs have shown (flashlib.cost.verdict): attention on a device whose
# ceilings were measured, by kernels that are in the records. The second is a guess, for everything else.
UNCERTAIN_MEASURED, UNCERTAIN_ASSUMED = 0.20, 0.40


@dataclass(frozen=True)
class Estimate:
    """Seconds of some work, and why.

    Attributes:
        seconds: the estimate.
        roofs: the seconds that each roof allows, :data:`ROOFS`.
        bounds: the seconds of the estimate, by what they wait for: ``"memory"``, ``"power"``, ``"tiles"`` (products and exponentials of
            tiles, one after the other) or ``"latency"`` (the start of kernels and of programs).
        uncertainty: the share by which it may be off.
        work: what is done. memory: bytes that cross memory.
    """

    seconds: float = 0.0
    roofs: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(ROOFS, 0.0))
    bounds: Mapping[str, float] = field(default_factory=dict)
    uncertainty: float = 0.0
    work: Work = field(default_factory=Work)
    memory: float = 0.0

    @property
    def bound(self) -> str:
        """What most of the time is waited for."""
        return max(self.bounds, key=self.bounds.__getitem__, default="latency")

    def __add__(self, more: Estimate) -> Estimate:
        if not isinstance(more, Estimate):
            return NotImplemented
        return Estimate(
            self.seconds + more.seconds,
            {name: self.roofs[name] + more.roofs[name] for name in ROOFS},
            {name: self.bounds.get(name, 0.0) + more.bounds.get(name, 0.0) for name in {**self.bounds, **more.bounds}},
            # Of a sum whose parts are all off in the same direction.
            (self.seconds * self.uncertainty + more.seconds * more.uncertainty) / ((self.seconds + more.seconds) or 1),
            self.work + more.work,
            self.memory + more.memory,
        )

    def __mul__(self, times: float) -> Estimate:
        roofs, bounds = ({name: each * times for name, each in of.items()} for of in (self.roofs, self.bounds))
        return Estimate(self.seconds * times, roofs, bounds, self.uncertainty, self.work * times, self.memory * times)


def total(estimates: Iterable[Estimate]) -> Estimate:
    """One after the other."""
    return sum(estimates, start=Estimate())


def roofs(work: Work, memory: float, dtype: str, device: Device) -> dict[str, float]:
    """Seconds that each roof allows: ``memory`` bytes at the rate of a large read, products and exponentials at the data sheet's,
    and products at the rate of a large matrix product, which the power cap sets."""
    return {
        "memory": memory / device.read_bytes_per_s,
        "products": work.products / device.peak(dtype),
        "exponentials": work.exponentials / device.exponentials_per_s,
        "power": work.products / device.sustained(dtype),
    }


def launch_time(launch: Launch, dtype: str, device: Device) -> Estimate:
    """One kernel."""
    of = roofs(launch.work, launch.memory, dtype, device)
    per_unit = launch.tile.products / device.peak(dtype) + launch.tile.exponentials / device.exponentials_per_s
    tile = device.units * per_unit
    if "kv" in launch.tile.read:  # decoding: a program waits for its keys
        started = device.units * launch.tile.read["kv"] / device.read_bytes_per_s
        waiting = PROGRAM_TILES * started
        limits = {"memory": of["memory"] + waiting, "tiles": launch.tiles * per_unit + waiting, "power": of["power"]}
        if launch.rows > LEAST_ROWS and launch.program_count <= device.units:
            longest = max(tiles for programs, _ in launch.parts for tiles, _ in programs)
            limits["tiles"] = max(limits["tiles"], (longest + PROGRAM_TILES) * LONE_STEP_SECONDS)
    else:
        busy, waiting = _makespan(launch, device.units) * tile, 0.0
        limits = {"memory": of["memory"], "tiles": busy, "power": of["power"]}
    return _longest(limits, KERNEL_SECONDS, waiting, of, launch.work, launch.memory)


def matmul_time(work: Work, dtype: str, device: Device, *, kernels: int = 1) -> Estimate:
    """Matrix products outside of attention: as fast as memory brings the weights, or as a large product is."""
    of = roofs(work, work.bytes, dtype, device)
    limits = {"memory": of["memory"], "power": of["power"], "tiles": of["exponentials"]}
    return _longest(limits, kernels * KERNEL_SECONDS, 0.0, of, work, work.bytes)


def tiles_time(work: Work, memory: float, dtype: str, device: Device) -> Estimate:
    """Attention of which nothing is known but its schedule: tiles on all units alike, each its products and then its exponentials."""
    of = roofs(work, memory, dtype, device)
    limits = {"memory": of["memory"], "power": of["power"], "tiles": of["products"] + of["exponentials"]}
    return _longest(limits, KERNEL_SECONDS, 0.0, of, work, memory)


def _longest(
    limits: Mapping[str, float],
    start: float,
    waiting: float,
    of: dict[str, float],
    work: Work,
    memory: float,
) -> Estimate:
    """The estimate that the longest of the limits gives; ``start`` comes on top of it, and ``waiting`` is part of it."""
    longest = max(limits, key=limits.__getitem__)
    seconds = limits[longest] + start
    bounds = (
        {longest: seconds - start - waiting, "latency": start + waiting}
        if limits[longest] > waiting
        else {"latency": seconds}
    )
    return Estimate(seconds, of, bounds, UNCERTAIN_ASSUMED, work, memory)


def attention_time(problem: Problem, device: Device, *, direction: str = "forward", **decoding) -> Estimate:
    """Attention by our kernels on a GPU; on a CPU, by FlashAttention-2's schedule with tiles of 64, on all cores.

    Args:
        direction: ``"forward"``, ``"backward"``, or ``"decode"`` for :func:`flashlib.inference.decode_attention`.
        decoding: as in :func:`flashlib.cost.decode_launches`.

    Raises:
        ValueError: there is no such direction, or our kernels do not run the problem there.
    """
    makes = {"forward": forward_launches, "backward": backward_launches, "decode": decode_launches}
    if direction not in makes:
        raise ValueError(f"direction must be one of {', '.join(makes)}; got {direction!r}")
    if device.kind == "cpu":
        if direction == "backward":
            raise ValueError("direction backward is not estimated on a CPU")
        memory = sum(sum(moved.values()) for moved in compulsory(problem))
        return tiles_time(fa2(problem, 64, 64), memory, problem.dtype, device)
    launches = makes[direction](problem, device, **decoding)
    found = total(launch_time(launch, problem.dtype, device) for launch in launches)
    recorded = {problem.head_dim, problem.v_head_dim} <= RECORDED_HEADS and any(x.kernel in RECORDED for x in launches)
    return replace(found, uncertainty=UNCERTAIN_MEASURED) if device.measured and recorded else found


def _makespan(launch: Launch, units: int) -> float:
    """When the last program ends, in the time of a tile, if each starts as soon as a unit is free."""
    free, done, every = [0.0] * units, 0, launch.program_count
    starting = PROGRAM_TILES * (2 if launch.paired else 1)
    for programs, times in launch.parts:
        for _ in range(times):
            for tiles, count in programs:
                for _ in range(count):
                    heapq.heapreplace(free, free[0] + tiles + starting)
                done += count
            if done >= SIMULATED:
                break
        if done >= SIMULATED:
            break
    if done >= every:
        return max(free)
    # The rest keeps all units busy; what is left over at the end is what was left over here.
    whole = (launch.tiles + starting * every) / units
    return whole + max(free) - sum(free) / units
