"""Checks of ex15: a benchmark on a machine whose clock is turned here, and a choice on recorded times.

The student's generators only ask. The machine is on this side, so that a result rests on what was asked of it and in which order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flashlib.course.chapters.timing_machine import FLUSH_MS, Machine
from flashlib.course.grader.exercise import Exercise, Misconception
from flashlib.course.grader.trial import Trial
from flashlib.measure.records.record import load_record

exercise = Exercise(
    name="ex15",
    file="ex15_timing.py",
    title="Timing and choosing",
    chapter="16_profiling_and_choosing",
    difficulty=3,
    importance=4,
    minutes=60,
)

DISTURBED = 30.0
MOST_REQUESTS = 4000
NEAR = 0.05


def timed_on(t: Trial, machine: Machine, rounds: int) -> dict[str, float]:
    """What the student's benchmark returns on a machine."""
    names = list(machine.costs)
    session, answer = t.make("Session", "benchmark", names, rounds), None
    for _ in range(MOST_REQUESTS):
        said = session.call("send", answer)
        t.tried = f"benchmark({names}, rounds={rounds})"
        if not (isinstance(said, list) and len(said) == 2 and said[0] in ("request", "done")):
            t.fail("wrong-type", "Session was changed: its answers are not what they were.", got=str(said)[:80])
        if said[0] == "done":
            return result_of(t, said[1], names)
        try:
            answer = machine.answer(said[1])
        except ValueError:
            t.fail("wrong-request", "A request is one of the four that the docstring names.", got=repr(said[1])[:80])
    t.fail(
        "never-ends", f"After {MOST_REQUESTS:,} requests it still wanted more.", hint="How often does your loop run?"
    )
    raise AssertionError


def result_of(t: Trial, value, names: Sequence[str]) -> dict[str, float]:
    if not (isinstance(value, dict) and set(value) == set(names)):
        t.fail("wrong-type", "benchmark returns the milliseconds of each name, in a dict.", got=repr(value)[:80], expected=f"a dict of {', '.join(names)}")  # fmt: skip
    for ms in value.values():
        if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not math.isfinite(ms):
            t.fail("wrong-type", "A time is a number.", got=repr(ms)[:80])
    return value


def near(got: float, truth: float) -> bool:
    return abs(got / truth - 1) <= NEAR


def drawn_costs(t: Trial, count: int = 3) -> dict[str, float]:
    return {f"kernel {'abcdef'[n]}": t.integer(20, 90) / 10 for n in range(count)}


# --------------------------------------------------------------------------------------------------------- percentiles


def true_percentiles(samples: list[int]) -> tuple[int, int, int]:
    ordered = sorted(samples)
    return tuple(ordered[max(1, -(-share * len(ordered) // 100)) - 1] for share in (50, 90, 99))


def at(index: Callable[[int, int], int], *, ordered: bool = True) -> Callable[[list[int]], tuple[int, ...]]:
    def model(samples: list[int]) -> tuple[int, ...]:
        found = sorted(samples) if ordered else list(samples)
        return tuple(found[min(len(found) - 1, max(0, index(share, len(found))))] for share in (50, 90, 99))

    return model


def interpolated(samples: list[int]) -> tuple[float, ...]:
    ordered = sorted(samples)

    def between(share: int) -> float:
        place = share * (len(ordered) - 1) / 100
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return tuple(between(share) for share in (50, 90, 99))


PERCENTILE_MISTAKES = [
    Misconception(
        "one-place-too-far",
        "The sample behind the wanted one was taken. Of 100 samples P50 is the 50th, which has index 49.",
        "At which index is the least of all samples?",
        at(lambda share, count: share * count // 100),
    ),
    Misconception(
        "not-sorted",
        "The samples were taken as they came. Percentiles are places in their order.",
        "What is P50 of 9, 1, 5?",
        at(lambda share, count: -(-share * count // 100) - 1, ordered=False),
    ),
    Misconception(
        "rounded-down",
        "The place was rounded down, so that fewer samples than the share are no larger.",
        "Of three samples: how many must be at or below P50, so that it is at least half of them?",
        at(lambda share, count: share * count // 100 - 1),
    ),
    Misconception(
        "interpolated",
        "A value between two samples was returned. Asked for is a sample.",
        "Must P50 of 1 and 100 be one of the two?",
        interpolated,
    ),
]


@exercise.property(
    points=2,
    hints=[
        "Sort a copy. Then it is a question of the place.",
        "The least place p with p / n >= share, counted from 1.",
    ],
)
def percentiles_of_samples(t: Trial) -> None:
    """percentiles returns samples at the right places, for few and for many"""
    for count in (1, 2, 3, 10, 100, t.integer(101, 180)):
        samples = [t.integer(1, 10**6) for _ in range(count)]
        got = t.call("percentiles", samples)
        t.expect_equal(got, true_percentiles(samples), f"The answer for {count} samples", PERCENTILE_MISTAKES, samples)


# ----------------------------------------------------------------------------------------------------------- benchmark

LAUNCHES = Misconception(
    "launches-timed",
    "The time of launching was measured. A launch comes back at once, and the device works on.",
    "What does the clock say right behind a run? And once the device is done?",
)
FLUSH_TIMED = Misconception(
    "flush-timed",
    "The time of emptying the cache is in the result. It was still going on when the clock was read.",
    "Is the device idle when your measurement begins?",
)
WARM_UP = Misconception(
    "warm-up-counted",
    "Runs in which something was compiled were counted.",
    "Which runs of a name are slower, and for what should they be used?",
)
WARM_CACHE = Misconception(
    "warm-cache",
    "The calls found their own inputs in the cache, and were timed as quicker than they are in a program.",
    "What lies in the cache when a call has run a moment ago?",
)
ONE_BY_ONE = Misconception(
    "one-after-the-other",
    "All runs of one name came before all of the next. The machine became slower meanwhile, and the last name paid for it.",
    "In which order must runs come, so that a slow machine is slow for all?",
)
MEAN = Misconception(
    "mean-taken",
    "A mean was taken. A few disturbed runs, many times as long, move it far off.",
    "What of 1, 1, 1, 1, 30 describes a usual run?",
)
LEAST = Misconception(
    "least-taken",
    "The least time was taken. It is that of a lucky run, and what was asked for is the median.",
    "Where does a usual run stand in the order of all?",
)
MANY = Misconception(
    "too-many-runs",
    "A name was run more often than rounds + 5 times.",
    "How many runs does warming up need?",
)


@exercise.property(
    points=3,
    hints=["Let the device become idle before the first look at the clock, and again before the second.", "flush, wait, clock, run, wait, clock."],
)  # fmt: skip
def waiting_for_the_device(t: Trial) -> None:
    """benchmark measures the device's work, and nothing of what was launched before it"""
    costs = drawn_costs(t)
    got = timed_on(t, Machine(costs, early=True), 5)
    for name, cost in costs.items():
        if got[name] < 0.2 * cost:
            t.fail_as(LAUNCHES, got=f"{name}: {got[name]:.3g} ms", expected=f"{cost} ms")
        if not near(got[name], cost):
            t.fail_as(FLUSH_TIMED, got=f"{name}: {got[name]:.3g} ms", expected=f"{cost} ms")


@exercise.property(points=2, hints=["Run each name before it counts.", "Twice: the docstring says how many are slow."])
def warming_up(t: Trial) -> None:
    """benchmark leaves the runs out in which something is compiled"""
    costs = drawn_costs(t, 2)
    got = timed_on(t, Machine(costs, compiles=True), 3)
    for name, cost in costs.items():
        if not near(got[name], cost):
            t.fail_as(WARM_UP, got=f"{name}: {got[name]:.4g} ms", expected=f"{cost} ms")


@exercise.property(points=2, hints=["What does flush do, and when must it come?"])
def cold_caches(t: Trial) -> None:
    """benchmark times calls that find the cache empty"""
    costs = drawn_costs(t, 1)
    got = timed_on(t, Machine(costs, caches=True), 5)
    for name, cost in costs.items():
        if not near(got[name], cost):
            t.fail_as(WARM_CACHE, got=f"{name}: {got[name]:.3g} ms", expected=f"{cost} ms")


@exercise.property(points=2, hints=["One timed run of each name, and then the next round."])
def in_turns(t: Trial) -> None:
    """on a machine that slows down, the times of names are to each other as they are"""
    costs = drawn_costs(t)
    rounds, work = 15, sum(costs.values()) + len(costs) * FLUSH_MS
    got = timed_on(t, Machine(costs, drift=600 / (15 * work)), rounds)
    first, *others = costs
    for name in others:
        ratio, truth = got[name] / (got[first] or 1e-9), costs[name] / costs[first]
        if not near(ratio, truth):
            t.fail_as(ONE_BY_ONE, got=f"{name} / {first}: {ratio:.3f}", expected=f"{truth:.3f}")


@exercise.property(points=2, hints=["Sort the times of a name: which one has as many below as above?"])
def usual_runs(t: Trial) -> None:
    """benchmark returns the median of runs that vary, some of them by far"""
    costs, varies = drawn_costs(t, 2), [0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, DISTURBED, DISTURBED]
    order = [varies[int(n)] for n in t.permutation(len(varies))]
    machine = Machine(costs, varies=order)
    got = timed_on(t, machine, len(varies))
    usual = sorted(varies)[len(varies) // 2]
    enough_runs(t, machine, len(varies))
    for name, cost in costs.items():
        if near(got[name], usual * cost):
            continue
        told = {"got": f"{name}: {got[name]:.3g} ms", "expected": f"{usual * cost:.3g} ms"}
        if got[name] > 1.5 * cost:
            t.fail_as(MEAN, **told)
        if near(got[name], min(varies) * cost):
            t.fail_as(LEAST, **told)
        t.fail("wrong-values", "The result is no median of the timed runs.", **told)


@exercise.property(points=1, hints=["Each name: two runs to warm up, and one for each round."])
def not_too_many(t: Trial) -> None:
    """benchmark runs no name more than rounds + 5 times, and each at least rounds times"""
    machine, rounds = Machine(drawn_costs(t)), t.integer(3, 9)
    timed_on(t, machine, rounds)
    for name, count in machine.runs.items():
        if count > rounds + 5:
            t.fail_as(MANY, got=f"{count} runs of {name}", expected=f"at most {rounds + 5}")
    enough_runs(t, machine, rounds)


def enough_runs(t: Trial, machine: Machine, rounds: int) -> None:
    fewest = min(machine.runs[name] for name in machine.costs)
    if fewest < rounds:
        t.fail("too-few-runs", "A median of so many rounds needs as many runs.", got=f"{fewest}", expected=f"{rounds}")


# -------------------------------------------------------------------------------------------------------------- choose


@dataclass
class Table:
    """Recorded milliseconds of candidates, as runs: ``slow_first`` times as long at first, and disturbed in runs with these numbers."""

    ms: Mapping[str, float]
    slow_first: float = 3.0
    disturbed: Mapping[str, int] = field(default_factory=dict)
    runs: Counter = field(default_factory=Counter)

    def run(self, name: str) -> float:
        number = self.runs[name]
        self.runs[name] += 1
        factor = self.slow_first if number == 0 else DISTURBED if self.disturbed.get(name) == number else 1.0
        return factor * self.ms[name]

    @property
    def best(self) -> str:
        return min(self.ms, key=self.ms.__getitem__)


def recorded_cells(direction: str) -> list[dict[str, float]]:
    """Milliseconds by peer, for each cell of a recorded race in which two of them or more are clearly behind."""
    cells: dict[tuple, dict[str, float]] = {}
    for row in load_record(f"h200/training_{direction}").rows:
        if row["ms"]:
            key = tuple(row[name] for name in ("length", "head_dim", "mask"))
            cells.setdefault(key, {})[row["peer"]] = row["ms"]
    return [cell for cell in cells.values() if len(cell) >= 3 and len(near_the_best(cell)) <= len(cell) - 2]


def near_the_best(ms: Mapping[str, float]) -> set[str]:
    least = min(ms.values())
    return {name for name, taken in ms.items() if taken <= 1.1 * least}


def chosen_on(t: Trial, table: Table, calls: int) -> str:
    """Whom the student's choose settled on."""
    names = list(table.ms)
    session, answer = t.make("Session", "choose", names, calls), None
    for _ in range(calls + 1):
        said = session.call("send", answer)
        t.tried = f"choose({names}, calls={calls})"
        if not (isinstance(said, list) and len(said) == 2 and said[0] in ("request", "done")):
            t.fail("wrong-type", "Session was changed: its answers are not what they were.", got=str(said)[:80])
        kind, value = said
        if not (isinstance(value, str) and value in names):
            t.fail("wrong-request", "choose yields and returns names of candidates.", got=repr(value)[:80], expected=", ".join(names))  # fmt: skip
        if kind == "done":
            if (served := sum(table.runs.values())) != calls:
                t.fail("calls-not-served", "It ended before all calls were served.", got=f"{served}", expected=f"{calls}", hint="Who runs the calls that are left?")  # fmt: skip
            return value
        if sum(table.runs.values()) == calls:
            t.fail("calls-not-served", "It wanted more runs than there are calls.", expected=f"{calls}")
        answer = table.run(value)
    raise AssertionError("ends above")


def judge_choice(t: Trial, table: Table, calls: int, mistake: Misconception) -> None:
    """Hold a run of choose against what its docstring says; ``mistake`` is what a wrong winner means here."""
    returned = chosen_on(t, table, calls)
    least, counts = table.ms[table.best], table.runs
    settled = counts.most_common(1)[0][0]
    if set(counts) != set(table.ms):
        t.fail("never-explores", "A candidate was never tried.", got=", ".join(sorted(set(table.ms) - set(counts))), hint="How can it be known that one is slow?")  # fmt: skip
    if counts[settled] < calls / 2:
        t.fail(
            "never-settles",
            "No candidate ran half of the calls.",
            got=f"{settled}: {counts[settled]} of {calls}",
            hint="When is trying over?",
        )
    if settled not in near_the_best(table.ms):
        slowest = table.ms[settled] == max(table.ms.values())
        t.fail_as(
            SLOWER if slowest else mistake,
            got=f"{settled}, {table.ms[settled]:.3g} ms",
            expected=f"{table.best}, {least:.3g} ms",
        )
    if returned != settled:
        t.fail(
            "another-name-returned",
            "It returned another name than the one that it ran.",
            got=returned,
            expected=settled,
        )
    tried = {name: count for name, count in counts.items() if name != settled and count > 6}
    if tried:
        t.fail("tried-too-often", "A candidate that was not chosen ran more than 6 calls.", got=str(tried)[:80], expected="at most 6 each", hint="How many runs does it take to see that one is slower?")  # fmt: skip


SLOWER = Misconception(
    "slower-chosen", "It settled on one that is slower.", "Less time is better: which comparison do you make?"
)
FIRST_RUN = Misconception(
    "first-run-decides",
    "The first run of each decided, and it is slower than the others by what is compiled in it.",
    "Which runs say how long a call takes from then on?",
)
ONE_RUN = Misconception(
    "one-run-decides",
    "One disturbed run decided against the fastest.",
    "Of 1, 1, 30: by what do you judge, so that the 30 does not matter?",
)


@exercise.property(points=2, hints=["Try all, a few times each. Then stay with one."])
def choosing_on_records(t: Trial) -> None:
    """choose settles on one of the fastest, on recorded times, and tries the others a few times only"""
    cells = recorded_cells("forward")
    for _ in range(4):
        cell = cells[t.integer(0, len(cells) - 1)]
        judge_choice(t, Table(cell, slow_first=1.0), 20 * len(cell), SLOWER)


@exercise.property(points=2, hints=["Leave the first run of each out."])
def slow_first_runs(t: Trial) -> None:
    """a slow first run of the fastest does not decide"""
    for ms in ({"a": 5.0, "b": 4.0, "c": 9.0}, {"a": 2.0, "b": 3.0, "c": 2.6}):
        table = Table(ms)
        slow = {name: 40.0 if name == table.best else 1.0 for name in ms}
        table.run = lambda name, table=table, slow=slow: _first_slow(table, name, slow)
        judge_choice(t, table, 60, FIRST_RUN)


def _first_slow(table: Table, name: str, slow: Mapping[str, float]) -> float:
    number = table.runs[name]
    table.runs[name] += 1
    return table.ms[name] * (slow[name] if number == 0 else 1.0)


@exercise.property(points=2, hints=["Several runs of each, and of them the one in the middle."])
def disturbed_runs(t: Trial) -> None:
    """one disturbed run of the fastest does not decide, whichever it is"""
    cells = recorded_cells("backward")
    for number in (1, 2, 3):
        cell = cells[t.integer(0, len(cells) - 1)]
        disturbed = dict.fromkeys(near_the_best(cell), number)
        judge_choice(t, Table(cell, slow_first=1.0, disturbed=disturbed), 20 * len(cell), ONE_RUN)
