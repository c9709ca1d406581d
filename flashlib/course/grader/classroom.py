"""Grade a class: every submission in a folder, several at a time, each fenced off from the others and from the grader."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from flashlib.course.grader.engine import GRADER_ERROR, Submission, grade, sandbox_for
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.render import as_gradescope, as_page
from flashlib.course.grader.report import Finding, Report, Result
from flashlib.course.grader.sandbox.session import Sandbox, SandboxError
from flashlib.course.grader.submissions import Student


@dataclass(frozen=True)
class Graded:
    """One student's reports, in the order of the exercises."""

    student: str
    reports: tuple[Report, ...]

    @property
    def earned(self) -> int:
        return sum(report.earned for report in self.reports)

    @property
    def points(self) -> int:
        return sum(report.points for report in self.reports)

    @property
    def diagnoses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(diagnosis for report in self.reports for diagnosis in report.diagnoses))


class _Sandboxes:
    """A sandbox for each worker thread and exercise: what descends from a sandbox's zygote is that worker's."""

    def __init__(self, hidden: tuple[Path, ...], kernel_fences: bool) -> None:
        self._hidden, self._kernel_fences = hidden, kernel_fences
        self._made: dict[tuple[int, str], Sandbox] = {}
        self._lock = threading.Lock()

    def of(self, exercise: Exercise) -> Sandbox:
        key = (threading.get_ident(), exercise.name)
        with self._lock:
            if key not in self._made:
                self._made[key] = sandbox_for(exercise, hidden=self._hidden, kernel_fences=self._kernel_fences)
            return self._made[key]

    def close(self) -> None:
        for sandbox in self._made.values():
            sandbox.close()


def grade_class(
    students: Sequence[Student],
    exercises: Sequence[Exercise],
    *,
    jobs: int = 1,
    hidden: tuple[Path, ...] = (),
    seed: int | None = None,
    hints: int = 1,
    kernel_fences: bool = True,
    done: Callable[[], None] = lambda: None,
) -> list[Graded]:
    """Grade every student in every exercise.

    Args:
        students: all their files, already read.
        jobs: submissions graded at the same time.
        hidden: folders that no submission may read: theirs, and that of the results.
        seed, hints: as in `engine.grade`.
        kernel_fences: as in `Sandbox`.
        done: called after each submission.

    Returns:
        The outcomes, in the order of `students`. Where the grader itself failed, each property is failed with the
        diagnosis `GRADER_ERROR`.
    """
    sandboxes = _Sandboxes(hidden, kernel_fences)

    def work(submission: Submission, exercise: Exercise) -> Report:
        try:
            return grade(exercise, submission, sandboxes.of(exercise), seed=seed, hints=hints)
        except SandboxError:  # the first time, a submission may have broken the sandbox; it starts anew
            pass
        try:
            return grade(exercise, submission, sandboxes.of(exercise), seed=seed, hints=hints)
        except SandboxError as error:
            return _not_graded(exercise, submission, error)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = {
                (student.name, exercise.name): pool.submit(work, student.submissions[exercise.name], exercise)
                for student in students
                for exercise in exercises
            }
            for future in as_completed(futures.values()):
                future.result()
                done()
    finally:
        sandboxes.close()
    return [
        Graded(student.name, tuple(futures[student.name, exercise.name].result() for exercise in exercises))
        for student in students
    ]


def _not_graded(exercise: Exercise, submission: Submission, error: Exception) -> Report:
    finding = Finding(GRADER_ERROR, f"The grader failed, not your code: {error}")
    results = tuple(Result(prop.name, prop.title, prop.points, finding) for prop in exercise.properties)
    return Report(exercise.name, exercise.title, submission.student, results, seed=0, seconds=0.0)


def write_results(graded: Sequence[Graded], exercises: Sequence[Exercise], table: Path, feedback: Path) -> None:
    """A CSV with a row for each student; and for each a folder with `feedback.html` and `results.json`."""
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", *(exercise.name for exercise in exercises), "total", "points", "diagnoses"])
        for one in graded:
            earned = [report.earned for report in one.reports]
            writer.writerow([_cell(one.student), *earned, one.earned, one.points, " ".join(one.diagnoses)])
    taken: set[str] = set()
    for one in graded:
        folder = feedback / _folder_name(one.student, taken)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "feedback.html").write_text(as_page(one.student, one.reports), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(as_gradescope(one.reports), indent=2), encoding="utf-8")


def _cell(text: str) -> str:
    """A spreadsheet takes a cell that begins with one of these for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _folder_name(student: str, taken: set[str]) -> str:
    plain = re.sub(r"[^\w-]+", "_", student)[:80] or "_"
    name, number = plain, 2
    while name.lower() in taken:
        name, number = f"{plain}_{number}", number + 1
    taken.add(name.lower())
    return name
