# diagnosis: warm-cache
import math


class Session:
    def __init__(self, function: str, *arguments) -> None:
        self._steps = {"benchmark": benchmark, "choose": choose}[function](*arguments)

    def send(self, answer=None) -> list:
        try:
            return ["request", self._steps.send(answer)]
        except StopIteration as end:
            return ["done", end.value]


def percentiles(samples: list[int]) -> tuple[int, int, int]:
    ordered = sorted(samples)
    return tuple(ordered[max(1, math.ceil(share * len(ordered) / 100)) - 1] for share in (50, 90, 99))


def benchmark(names: list[str], rounds: int):
    for name in names:
        for _ in range(2):
            yield ("run", name)
    yield ("flush",)
    times = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            yield ("wait",)
            started = yield ("clock",)
            yield ("run", name)
            yield ("wait",)
            times[name].append((yield ("clock",)) - started)
    return {name: sorted(taken)[(len(taken) - 1) // 2] for name, taken in times.items()}


def choose(names: list[str], calls: int):
    times = {name: [] for name in names}
    for turn in range(5):
        for name in names:
            ms = yield name
            if turn:
                times[name].append(ms)
    best = min(names, key=lambda name: sorted(times[name])[1])
    for _ in range(calls - 5 * len(names)):
        yield best
    return best
