# Exercise 15: Timing and choosing
# difficulty 3/5 · importance 4/5 · about 60 minutes
# Chapter: notebooks/16_profiling_and_choosing.ipynb
#
# Check your work with `flashlib grade ex15`, or in a notebook with `check("ex15")`.

"""Timing calls on a machine that does all that real ones do, and choosing among them while they are being used.

Both are generators. What they yield is a request to somebody who has the machine; what comes back from the yield is the answer.
"""


class Session:
    """Given. How a generator of this file is driven from outside: its first request, and then the next for each answer."""

    def __init__(self, function: str, *arguments) -> None:
        self._steps = {"benchmark": benchmark, "choose": choose}[function](*arguments)

    def send(self, answer=None) -> list:
        """``["request", what it yields]``, or ``["done", what it returns]``."""
        try:
            return ["request", self._steps.send(answer)]
        except StopIteration as end:
            return ["done", end.value]


def broken(names: list[str], rounds: int):
    """Given, and wrong: it runs, and hardly any of its numbers means anything. What is wrong with it is yours to find."""
    found = {}
    for name in names:
        times = []
        for _ in range(rounds):
            started = yield ("clock",)
            yield ("run", name)
            stopped = yield ("clock",)
            times.append(stopped - started)
        found[name] = sum(times) / len(times)
    return found


def percentiles(samples: list[int]) -> tuple[int, int, int]:
    """P50, P90 and P99 of some samples: each the least sample such that at least this share of all samples is no larger than it.

    Args:
        samples: at least one, in any order.
    """
    raise NotImplementedError("write percentiles here")


def benchmark(names: list[str], rounds: int):
    """A generator that times calls, each by itself: yields requests, and returns ``{name: milliseconds}``, each the median of ``rounds`` timed runs.

    The requests, as tuples:

    * ``("run", name)``: launch a call. The answer, None, comes at once; the device works on, one thing after another.
    * ``("wait",)``: until the device has done everything. None.
    * ``("clock",)``: milliseconds since some moment.
    * ``("flush",)``: launch what empties the device's cache. None, at once. It takes the device a while as well.

    The machine: The first two runs of a name are slower, as something is compiled. What a call reads lies in the cache afterwards, and the
    same call is quicker for it; wanted is the time of a call that finds the cache empty. The longer the machine works, the slower all of it
    becomes, and no call may have an advantage of that: names are timed in turns. Runs vary, and some are disturbed and take many times as
    long. No name is run more than ``rounds + 5`` times.
    """
    raise NotImplementedError("write benchmark here")


def choose(names: list[str], calls: int):
    """A generator that serves ``calls`` calls by one of some candidates each: yields the name of who runs next, gets its milliseconds, and
    returns the name that it settled on.

    All candidates do the same, and each run is somebody's call, so that time spent on trying counts. The first run of each is slower than the
    others. Now and then a run is disturbed and takes many times as long: no single run may decide. In the end at least half of the calls were
    run by one that is within a tenth of the fastest, every candidate had its chance, and none was tried more than 6 times beside that.

    Args:
        names: of the candidates. calls: at least 20 for each of them.
    """
    raise NotImplementedError("write choose here")
