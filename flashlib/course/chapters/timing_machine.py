"""A machine with the habits of real ones, and a clock that nobody but us turns: what chapter 16 times, and exercise 15 is graded on.

On a real machine all habits come at once and differ from run to run. Here each can be had alone, and the truth is known.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["HABITS", "WAYS", "Machine", "careful", "measured"]

LAUNCH_MS, FLUSH_MS, COMPILE_MS = 0.01, 5.0, 300.0
WARM_UPS, CACHED = 2, 0.4


@dataclass
class Machine:
    """A device and a clock. What it does not do is off, so that each of its habits can be asked for alone.

    Attributes:
        costs: milliseconds of each call. early: launches come back before the work is done. compiles: the first runs of a name are slow.
        caches: the same call again is quicker. drift: by which share everything is slower after a second. varies: factors of the runs of a
            name, one after the other, again and again.
    """

    costs: Mapping[str, float]
    early: bool = False
    compiles: bool = False
    caches: bool = False
    drift: float = 0.0
    varies: Sequence[float] = (1.0,)
    now: float = 0.0
    done_at: float = 0.0
    hot: str | None = None
    runs: Counter = field(default_factory=Counter)

    def answer(self, request: Sequence) -> float | None:
        """Do what is asked.

        Raises:
            ValueError: it is no request.
        """
        match list(request) if isinstance(request, (tuple, list)) else request:
            case ["clock"]:
                return self.now
            case ["wait"]:
                self.now = max(self.now, self.done_at)
            case ["flush"]:
                self._work(FLUSH_MS)
                self.hot = None
            case ["run", str(name)] if name in self.costs:
                self._run(name)
            case _:
                raise ValueError(request)
        return None

    def _run(self, name: str) -> None:
        ms = self.costs[name] * self.varies[self.runs[name] % len(self.varies)]
        if self.caches and self.hot == name:
            ms *= CACHED
        if self.compiles and self.runs[name] < WARM_UPS:
            ms += COMPILE_MS
        self.runs[name] += 1
        self.hot = name
        self._work(ms)

    def _work(self, ms: float) -> None:
        self.now += LAUNCH_MS
        ms *= 1 + self.drift * self.now / 1e3
        self.done_at = max(self.now, self.done_at) + ms
        if not self.early:
            self.now = self.done_at

    # What a program does on it

    def run(self, name: str) -> None:
        """Launch a call."""
        self.answer(("run", name))

    def wait(self) -> None:
        """Until the device has done everything."""
        self.answer(("wait",))

    def flush(self) -> None:
        """Launch what empties the cache."""
        self.answer(("flush",))


def _one(machine: Machine, name: str, *, waits: bool = True, cold: bool = True) -> float:
    if cold:
        machine.flush()
    if waits:
        machine.wait()
    started = machine.now
    machine.run(name)
    if waits:
        machine.wait()
    return machine.now - started


def _timed(
    machine: Machine, rounds: int, *, waits: bool = True, warm_up: bool = True, cold: bool = True, turns: bool = True,
    summary: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:  # fmt: skip
    names = list(machine.costs)
    for name in names * WARM_UPS if warm_up else []:
        machine.run(name)
    machine.wait()
    order = names * rounds if turns else [name for name in names for _ in range(rounds)]
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in order:
        times[name].append(_one(machine, name, waits=waits, cold=cold))
    return {name: summary(taken) for name, taken in times.items()}


def careful(machine: Machine, rounds: int = 9) -> dict[str, float]:
    """Milliseconds by name: warmed up, cold, waited for, in turns, the median."""
    return _timed(machine, rounds)


def without(**mistake) -> Callable[[Machine, int], dict[str, float]]:
    return lambda machine, rounds=9: _timed(machine, rounds, **mistake)


# Habits of machines, by name, as arguments of Machine.
HABITS: dict[str, dict] = {
    "launches come back early": {"early": True},
    "first runs compile": {"compiles": True},
    "a cache": {"caches": True},
    "slows down": {"drift": 1.0},
    "disturbed runs": {"varies": (1.0, 1.1, 0.9, 1.0, 30.0)},
}
# Ways to time, by name: each but the last makes one mistake.
WAYS: dict[str, Callable[[Machine, int], dict[str, float]]] = {
    "launches only": without(waits=False),
    "first runs too": without(warm_up=False, summary=statistics.fmean),
    "warm cache": without(cold=False, turns=False),
    "one after the other": without(turns=False),
    "mean": without(summary=statistics.fmean),
    "careful": careful,
}


def measured(way: str, costs: Mapping[str, float], rounds: int = 9, **habits) -> dict[str, float]:
    """What a way of timing says of a fresh machine with these habits.

    Raises:
        ValueError: there is no such way.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}; got {way!r}")
    return WAYS[way](Machine(costs, **habits), rounds)
