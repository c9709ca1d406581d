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


def _measured(name):
    yield ("flush",)
    yield ("wait",)
    before = yield ("clock",)
    yield ("run", name)
    yield ("wait",)
    after = yield ("clock",)
    return after - before


def benchmark(names, rounds):
    samples = {name: [] for name in names}
    for number in range(rounds + 3):
        for name in names:
            taken = yield from _measured(name)
            if number >= 3:
                samples[name].append(taken)
    for name in names:
        samples[name].sort()
    return {name: samples[name][len(samples[name]) // 2] for name in names}


def choose(names, calls):
    served, seen, racing = 0, {name: [] for name in names}, list(names)
    while len(racing) > 1 and len(seen[racing[0]]) < 5:
        for name in racing:
            seen[name].append((yield name))
            served += 1
        if len(seen[racing[0]]) >= 4:
            middle = {name: sorted(seen[name][1:])[len(seen[name][1:]) // 2] for name in racing}
            racing = [name for name in racing if middle[name] <= 1.2 * min(middle.values())]
    winner = min(racing, key=lambda name: sorted(seen[name][1:])[len(seen[name][1:]) // 2])
    while served < calls:
        yield winner
        served += 1
    return winner
