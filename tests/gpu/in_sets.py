"""Random problems in many processes, each of which takes one set of problems after the other."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flashlib.launch.plans import Plan
from flashlib.launch.start import Launch
from flashlib.measure.records.record import Record, save_record

PROBLEMS_IN_A_SET = 10
SAVE_EVERY_S = 5


def run_in_sets(
    draw: Callable[[int], Any],
    one: Callable[[Any, int], dict],
    record_of: Callable[..., Record],
    *,
    count: int,
    seed: int,
    workers: int,
    out: Path,
    limit_s: float = float("inf"),
    cost: Callable[[Any], float] | None = None,
) -> Record:
    """Check ``count`` problems. The record is written every few seconds, so that a run that is killed keeps what it has done.

    A process that dies (an illegal access takes its process along) leaves the problem that it had begun as failed.

    Args:
        draw: gives the set of a seed. one: checks the problem of a set and a seed: a row with ``passed``, ``message``,
            ``of_budget``, ``kernels`` and ``seconds``. Both are module-level functions.
        record_of: makes the record of ``(rows, count, **extra)``. A row holds ``set`` and ``seed`` too.
        limit_s: seconds after which no set is begun.
        cost: about how long a set's kernels compile, in any unit: the longest come first, so that none is left for the end.
    """
    started, context = time.monotonic(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files, next_set = [Path(folder) / f"{worker}.jsonl" for worker in range(workers)], context.Value("i", 0)
        firsts = sorted(
            range(0, count, PROBLEMS_IN_A_SET), key=lambda first: -cost(draw(seed + first)) if cost else first
        )
        jobs = [(draw, one, seed, count, firsts, next_set, file, limit_s) for file in files]
        processes = [context.Process(target=_work, args=job) for job in jobs]
        for process in processes:
            process.start()
        while True:
            alive = any(process.is_alive() for process in processes)
            rows = [row for file in files if file.exists() for row in _read(file, finished=not alive)]
            spent = {
                what: round(sum(row["seconds"][n] for row in rows), 1) for n, what in enumerate(("kernels", "oracle"))
            }
            seconds = {"seconds": round(time.monotonic() - started, 1), "process_seconds": spent}
            record = record_of(rows, count, first_seed=seed, **seconds)
            save_record(record, out)
            if not alive:
                return record
            multiprocessing.connection.wait(
                [process.sentinel for process in processes if process.is_alive()], SAVE_EVERY_S
            )


def _work(draw, one, seed: int, count: int, firsts: list[int], next_set, file: Path, limit_s: float) -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    with file.open("w", encoding="utf-8") as lines:

        def write(row: dict) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        while time.monotonic() - started < limit_s:
            with next_set.get_lock():
                taken = next_set.value
                next_set.value += 1
            if taken >= len(firsts):
                return
            first = firsts[taken]
            drawn = draw(seed + first)
            for number in range(seed + first, seed + min(first + PROBLEMS_IN_A_SET, count)):
                known = {"set": seed + first, "seed": number}
                write({"begun": known})
                write({**known, **_outcome(one, drawn, number)})


def _outcome(one, drawn, seed: int) -> dict:
    try:
        return one(drawn, seed)
    except torch.AcceleratorError:
        raise  # this process has lost the device; the problem stands as begun
    except Exception as error:
        return _failed(f"{drawn}: {type(error).__name__}: {error}"[:600])


def _failed(message: str) -> dict:
    return {"passed": False, "message": message, "of_budget": {}, "kernels": {}, "seconds": [0.0, 0.0]}


def _read(file: Path, finished: bool) -> Iterator[dict]:
    begun = None
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # it is being written
        row = json.loads(line)
        if "begun" in row:
            begun = row["begun"]
        else:
            begun = None
            yield row
    if finished and begun is not None:
        yield {**begun, **_failed("the process died in it")}


def summary_of(rows: list[dict], asked: int, told: Callable[[int], dict[str, str]], results: Iterable[str]) -> dict:
    """All rows in one: what failed, the largest error as a fraction of its budget, and what was covered.

    Args:
        told: the features of the set of a seed, by name.
        results: names of what is checked.
    """
    kernels = sum((Counter(row["kernels"].keys()) for row in rows), Counter())
    return {
        **{"asked": asked, "run": len(rows)},
        "worst_of_budget": {
            name: max((row["of_budget"].get(name, 0.0) for row in rows if row["passed"]), default=0.0)
            for name in results
        },
        "failed": [{"seed": row["seed"], "message": row["message"]} for row in rows if not row["passed"]],
        "problems_with": coverage(told(row["set"]) | row.get("told", {}) for row in rows),
        "problems_that_ran": dict(sorted(kernels.items())),
    }


def coverage(told: Iterable[dict[str, str]]) -> dict[str, dict[str, int]]:
    """How many problems had which value of each feature."""
    counts: dict[str, Counter[str]] = {}
    for features in told:
        for name, value in features.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: dict(sorted(values.items())) for name, values in counts.items()}


def of_budget(*comparisons) -> dict[str, float]:
    """Each error of some :class:`flashlib.reference.Comparison` as a fraction of its budget."""
    return {
        name: _fraction(error, comparison.budget[name])
        for comparison in comparisons
        for name, error in comparison.error.items()
    }


def _fraction(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return round(error / budget, 4) if budget else float("inf")


@contextmanager
def started_kernels(counts: Counter[str]):
    """Counts the kernels that are started inside, by name."""
    start, start_plan = Launch.start, Plan.start_on

    def counted(launch: Launch) -> None:
        counts[launch.name] += 1
        start(launch)

    def counted_plan(plan: Plan, *arguments) -> list:
        counts.update(plan.names)
        return start_plan(plan, *arguments)

    with mock.patch.object(Launch, "start", counted), mock.patch.object(Plan, "start_on", counted_plan):
        yield


def now() -> float:
    """The time, once the device has done all it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def count_failures(name: str, check_all: Callable[[], Record]) -> int:
    """Run one check, print what came out, and say how many failures that was. A check that breaks off is one."""
    started = time.monotonic()
    try:
        record = check_all()
    except Exception:
        traceback.print_exc()
        return 1
    failures = 0
    for row in record.rows:
        failed = row.get("failed", row.get("differ", [] if row.get("passed", row.get("same")) else ["failed"]))
        failures += len(failed) + row.get("asked", 0) - row.get("run", 0)
        print(name, {**row, "failed": len(failed)}, flush=True)
        for failure in failed[:10]:
            print("  ", str(failure)[:600].replace("\\n", " "), flush=True)
    print(f"{name}: {failures} failures, {time.monotonic() - started:.0f} s", record.extra, flush=True)
    return failures


def run_program(text: str, name: str, default: int, check_all: Callable[[int, int, int, Path, float], Record]) -> int:
    """A program that checks random problems of one kind, and its exit status.

    Args:
        text: of ``--help``.
        name: what is checked, also the option that says how many; ``default`` if it is not given.
        check_all: takes count, seed, workers, the folder for the record, and seconds after which no set is begun.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(f"--{name}", dest="count", type=int, default=default)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no set is begun")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    arguments = options.count, options.seed, options.workers, options.out, options.limit
    failures = count_failures(name, lambda: check_all(*arguments))
    print(f"{failures} failures" if failures else "all passed")
    return 1 if failures else 0
