"""Grade right solutions again and again, on fresh inputs: all must get full marks, whatever is drawn, in little time.

`python -m flashlib.course.grader.rounds` grades our own solution of each exercise and those under `tests/grader/right/`, which are
written in other styles. What came of it is recorded in `benchmarks/grader/`, with the processor time that a grading takes, and
shown in `exercises/SURVIVAL.md`.
"""

from __future__ import annotations

import argparse
import ast
import re
import secrets
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from flashlib.course.grader.engine import sandbox_for
from flashlib.course.grader.exercise import EXERCISES, Exercise, exercise_names, load_exercise
from flashlib.course.grader.matrix import RIGHT, WRONG, grade_file
from flashlib.course.grader.report import Report
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.measure.records.record import BENCHMARKS, Record, load_record, new_record, save_record, source_text

FOLDER = BENCHMARKS / "grader"
CLASS = "class_of_200"
PAGE = REPOSITORY / "exercises/SURVIVAL.md"
SECONDS = 5.0  # of processor time, that grading one submission to one exercise may take
BEGIN, END = "<!-- made by flashlib.course.grader.rounds -->", "<!-- end -->"


def right_files(exercise: Exercise) -> list[Path]:
    """Our own solution, and the others."""
    return [REPOSITORY / "solutions" / exercise.file, *sorted((RIGHT / exercise.name).glob("*.py"))]


def grade_rounds(exercise: Exercise, rounds: int) -> tuple[list[dict], list[str]]:
    """A row for each right solution, and what went wrong. The solutions of a round get the same inputs."""
    files, reports, problems = right_files(exercise), {}, []
    with sandbox_for(exercise) as sandbox:
        for _ in range(rounds):
            seed, results = secrets.randbits(32), Results()
            for file in files:
                report = grade_file(exercise, file, sandbox, seed, results)
                reports.setdefault(file.stem, []).append(report)
                if not report.passed:
                    problems.append(f"{exercise.name} {file.stem}, seed {seed}: {report.diagnoses}")
    return [_row(name, graded) for name, graded in reports.items()], problems


def _row(name: str, graded: Sequence[Report]) -> dict:
    # The first of a round computes what is exact, for all: its time is that of grading one submission alone.
    seconds = [report.cpu_seconds for report in graded]
    return {
        "solution": name,
        "rounds": len(graded),
        "full_marks": sum(report.passed for report in graded),
        "cpu_seconds_median": round(statistics.median(seconds), 2),
        "cpu_seconds_largest": round(max(seconds), 2),
        "unverified": sorted({result.name for report in graded for result in report.results if result.own_word}),
    }


def sources_of(name: str) -> list[str]:
    """The files that an exercise's checks stand in: its own, and what it shares with others."""
    found, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        found.add(module)
        for node in ast.walk(ast.parse(source_text(f"course/exercises/{module}.py"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(EXERCISES):
                shared = (
                    {each.name for each in node.names} if node.module == EXERCISES else {node.module.split(".")[-1]}
                )
                waiting += shared - found
    return sorted(f"course/exercises/{module}.py" for module in found)


def record_of(exercise: Exercise, rows: list[dict]) -> Record:
    sources = sources_of(exercise.name)
    notes = "Right solutions graded on fresh inputs; processor time of the checks and of the processes that the code ran in."
    return new_record(exercise.name, rows, sources, notes)


def record_of_class(row: dict) -> Record:
    notes = "A made-up class, mixed with what crashes and attacks, graded with two jobs, stopped at random and gone on with."
    return new_record(CLASS, [row], sources_of("ex01"), notes)


def as_sentence(record: Record) -> str:
    """What grading a class took."""
    row, stale = record.rows[0], " (STALE)" if record.stale else ""
    return (
        f"A class of {row['students']}, graded in ex01 with {row['jobs']} jobs, stopped {row['stops']} times at random and gone on with, took "
        f"{row['seconds']} s at a load of {row['load']} on {row['cores']} cores, at least {row['cpu_seconds']} s of processor time, and {row['mb']} MB "
        f"at most{stale}."
    )


def as_markdown(records: Sequence[Record]) -> str:
    """One line for each exercise. What was recorded before its checks last changed says so: STALE."""
    lines = [
        "| exercise | right solutions | rounds | full marks | CPU seconds of a grading, median (largest) | checks on the process's own word |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        graded = sum(row["rounds"] for row in record.rows)
        first = record.rows[0]
        largest = max(row["cpu_seconds_largest"] for row in record.rows)
        unverified = sorted({name for row in record.rows for name in row["unverified"]})
        lines.append(
            f"| {record.topic}{' (STALE)' if record.stale else ''} | {len(record.rows)} | {min(row['rounds'] for row in record.rows)} "
            f"| {sum(row['full_marks'] for row in record.rows)} of {graded} "
            f"| {first['cpu_seconds_median']:.1f} ({largest:.1f}) | {', '.join(unverified) or 'none'} |"
        )
    return "\n".join(lines)


def publish() -> str:
    """`exercises/SURVIVAL.md` with the recorded rounds in it, and how many of each kind there are."""
    records = [load_record(path.stem, FOLDER) for path in sorted(FOLDER.glob("ex*.json"))]
    classes = [load_record(path.stem, FOLDER) for path in FOLDER.glob(f"{CLASS}.json")]
    told = "\n\n".join([as_markdown(records), *map(as_sentence, classes)])
    text = PAGE.read_text()
    hostile = [file for file in (WRONG.parent / "hostile").iterdir() if file.suffix in (".py", ".txt")]
    for kind, count in (
        ("wrong solutions that people write", len(list(WRONG.glob("*/*.py")))),
        ("hostile submissions", len(hostile)),
    ):
        text = re.sub(rf"(?m)^\| {kind} \| \d*", f"| {kind} | {count}", text)
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{told}\n\n{END}",
        text,
        flags=re.S,
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashlib.course.grader.rounds", description=__doc__)
    parser.add_argument("exercises", nargs="*", help="such as ex01; all if none is named")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--publish", action="store_true", help="grade nothing: only show what was recorded")
    options = parser.parse_args(arguments)
    if options.publish:
        PAGE.write_text(publish())
        return 0
    problems: list[str] = []
    for name in options.exercises or exercise_names():
        exercise = load_exercise(name)
        rows, wrong = grade_rounds(exercise, options.rounds)
        problems += wrong
        save_record(record_of(exercise, rows), FOLDER)
        print(
            name, *(f"{row['solution']}: {row['full_marks']} of {row['rounds']}" for row in rows), sep="  ", flush=True
        )
        if (slow := max(row["cpu_seconds_median"] for row in rows)) > SECONDS:
            problems.append(f"{name}: {slow:g} s of processor time to grade it, of {SECONDS:g}")
    PAGE.write_text(publish())
    for problem in problems:
        print("PROBLEM", problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
