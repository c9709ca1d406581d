"""Grade the grader: wrong solutions must be rejected with the right diagnosis, right ones must pass.

`python -m flashlib.course.grader.matrix` grades everything under `tests/grader/wrong/` and `tests/grader/right/`, the
solutions and the stubs, and writes the outcome to `exercises/KILL_MATRIX.md`.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashlib.course.grader.engine import Submission, grade, sandbox_for
from flashlib.course.grader.exercise import Exercise, exercise_names, load_exercise
from flashlib.course.grader.report import Report
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.session import REPOSITORY, Sandbox

WRONG, RIGHT = REPOSITORY / "tests/grader/wrong", REPOSITORY / "tests/grader/right"
MATRIX = REPOSITORY / "exercises/KILL_MATRIX.md"
ONE_IN = 4  # wrong solutions that meet checks which need not reject them
INTRODUCTION = """\
# The kill matrix

A grader that accepts wrong work teaches wrong things, so this one is itself graded. Each row is a solution that people
really write. A wrong one must lose points, and every check that it fails must name the mistake it was written for. The
right ones, written differently from our own solution, must get full marks, and the empty exercise must get none.

Made by `python -m flashlib.course.grader.matrix`; a test repeats it with fresh inputs and compares. The files are under
`tests/grader/wrong/` and `tests/grader/right/`.
"""


@dataclass(frozen=True)
class Row:
    """One file, what it should get, and what it got."""

    name: str
    expected: tuple[str, ...]
    report: Report

    @property
    def problem(self) -> str:
        """What is not as it should be, or ""."""
        found = self.report.diagnoses
        if set(found) == set(self.expected):
            return ""
        failed = {r.name: r.finding.diagnosis for r in self.report.results if r.finding}
        return f"{self.name}: expected {self.expected or 'full marks'}, got {failed or 'full marks'} (seed {self.report.seed})"


def expected_diagnoses(file: Path) -> tuple[str, ...]:
    """The slugs in the first line, `# diagnosis: a, b`.

    Raises:
        ValueError: the file has no such line.
    """
    first = file.read_text().partition("\n")[0]
    found = re.fullmatch(r"# diagnosis: ([a-z0-9-]+(?:, [a-z0-9-]+)*)", first)
    if not found:
        raise ValueError(f"{file} must begin with a line `# diagnosis: slug`, got {first!r}")
    return tuple(found[1].split(", "))


def cases(exercise: Exercise) -> list[tuple[str, Path, tuple[str, ...]]]:
    """Name, file and expected diagnoses of all that is to be graded."""
    wrong = [(file.stem, file, expected_diagnoses(file)) for file in sorted((WRONG / exercise.name).glob("*.py"))]
    right = [(f"right/{file.stem}", file, ()) for file in sorted((RIGHT / exercise.name).glob("*.py"))]
    stub = ("stub", REPOSITORY / "exercises" / exercise.file, ("not-implemented",))
    return [*wrong, *right, ("solution", REPOSITORY / "solutions" / exercise.file, ()), stub]


def grade_file(
    exercise: Exercise,
    file: Path,
    sandbox: Sandbox,
    seed: int | None = None,
    results: Results | None = None,
    checks: Collection[str] | None = None,
) -> Report:
    """Grade one file as a submission of its own name."""
    submission = Submission(file.stem, file.read_bytes())
    return grade(exercise, submission, sandbox, seed=seed, results=results, checks=checks)


def rows(exercise: Exercise, sandbox: Sandbox, *, named: Mapping[str, Collection[str]] | None = None) -> list[Row]:
    """Grade every case of one exercise on fresh inputs.

    All share them, so that exact answers, and those of all known mistakes, are computed once. Other inputs are another run's.

    Args:
        named: for wrong solutions, the checks that a promise names with them. If given, a check that takes a process of its own, which
            is most of the time, grades the wrong solutions that it is to reject, and one in `ONE_IN` of the others, drawn anew.
    """
    shared = secrets.randbits(32), Results()
    right = {name: file for name, file, expected in cases(exercise) if not expected}
    reports = {name: grade_file(exercise, file, sandbox, *shared) for name, file in right.items()}
    apart = {result.name for report in reports.values() for result in report.results if result.apart}
    for name, file, expected in cases(exercise):
        if name not in reports:
            if named is None or secrets.randbelow(ONE_IN) == 0:
                reports[name] = grade_file(exercise, file, sandbox, *shared)
            else:
                to_reject_it = apart & set(named.get(name, ()))
                reports[name] = _grade_wrong(exercise, file, expected, sandbox, shared, apart, to_reject_it)
    return [Row(name, expected, reports[name]) for name, _, expected in cases(exercise)]


def _grade_wrong(exercise, file, expected, sandbox, shared, apart: set[str], to_reject_it: set[str]) -> Report:
    """The checks but those that are `apart`; then those of them that are to reject it, or all of them if a diagnosis is still missing."""
    every = [prop.name for prop in exercise.properties]
    report = grade_file(exercise, file, sandbox, *shared, checks=set(every) - apart)
    more = to_reject_it if set(expected) <= set(report.diagnoses) else apart
    if not more:
        return report
    rest = grade_file(exercise, file, sandbox, *shared, checks=more)
    results = sorted(report.results + rest.results, key=lambda result: every.index(result.name))
    return replace(report, results=tuple(results), cpu_seconds=report.cpu_seconds + rest.cpu_seconds)


def as_markdown(exercise: Exercise, graded: Sequence[Row]) -> str:
    """The exercise's section of the matrix. It holds nothing that depends on the inputs drawn."""
    lines = [f"## {exercise.name}: {exercise.title}", "", "| submission | outcome | diagnosis |", "|---|---|---|"]
    for row in graded:
        outcome = "full marks" if row.report.passed else "rejected"
        lines.append(f"| {row.name} | {outcome} | {', '.join(row.expected)} |")
    return "\n".join(lines) + "\n"


def sections(text: str) -> dict[str, str]:
    """The sections of a published matrix, by exercise."""
    parts = re.split(r"(?m)^(?=## ex\d\d: )", text)
    return {part[3:7]: part.rstrip() + "\n" for part in parts[1:]}


def main(arguments: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m flashlib.course.grader.matrix", description=__doc__)
    parser.add_argument("exercises", nargs="*", help="such as ex01; all if none is named")
    parser.add_argument(
        "--seeds", type=int, default=1, help="how many times to grade everything, on fresh inputs each time"
    )
    options = parser.parse_args(arguments)
    made: dict[str, str] = {}
    problems: list[str] = []
    for name in options.exercises or exercise_names():
        exercise = load_exercise(name)
        with sandbox_for(exercise) as sandbox:
            for _ in range(options.seeds):
                graded = rows(exercise, sandbox)
                problems += [row.problem for row in graded if row.problem]
        made[name] = as_markdown(exercise, graded)
        print(made[name])
    published = {**(sections(MATRIX.read_text()) if MATRIX.exists() else {}), **made}
    MATRIX.write_text("\n".join([INTRODUCTION, *(published[name] for name in sorted(published))]))
    for problem in problems:
        print("PROBLEM", problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
