"""Grade a class: every submission an island. Nothing that one does or holds reaches another, the table, or the run itself."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from flashlib.course.grader.engine import GRADER_ERROR, Submission, grade, not_graded, sandbox_for
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.journal import Journal
from flashlib.course.grader.report import Report
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.leftovers import leftovers
from flashlib.course.grader.sandbox.outcome import SandboxError
from flashlib.course.grader.sandbox.session import Sandbox
from flashlib.course.grader.submissions import Student


@dataclass(frozen=True)
class Graded:
    """One student's reports, in the order of the exercises."""

    who: Student
    reports: tuple[Report, ...]

    @property
    def student(self) -> str:
        return self.who.name

    @property
    def earned(self) -> int:
        return sum(report.earned for report in self.reports)

    @property
    def points(self) -> int:
        return sum(report.points for report in self.reports)

    @property
    def diagnoses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(diagnosis for report in self.reports for diagnosis in report.diagnoses))


class Unfenced(ValueError):
    """This system lacks fences around the code of strangers, and nobody said that they may do without."""


class _Sandboxes:
    """A sandbox for each worker thread, for exercises that need the same loaded: what descends from it is that worker's."""

    def __init__(self, hidden: tuple[Path, ...], kernel_fences: bool, must_fence: bool) -> None:
        self._options = {"hidden": hidden, "kernel_fences": kernel_fences, "must_fence": must_fence}
        self._made: dict[tuple[object, ...], Sandbox] = {}
        self._lock = threading.Lock()
        self._closed = False

    def of(self, exercise: Exercise) -> Sandbox:
        key = threading.get_ident(), exercise.preload, tuple(exercise.environment.items())
        with self._lock:
            if self._closed:
                raise SandboxError("the run was stopped")
            if key not in self._made:
                self._made[key] = sandbox_for(exercise, **self._options)
            return self._made[key]

    def renew(self, exercise: Exercise) -> None:
        """Whatever state the worker's sandbox is in, the next submission gets another."""
        key = threading.get_ident(), exercise.preload, tuple(exercise.environment.items())
        with self._lock:
            sandbox = self._made.pop(key, None)
        if sandbox is not None:
            _quietly(sandbox.close)

    def close(self) -> None:
        with self._lock:
            self._closed, made = True, list(self._made.values())
        for sandbox in made:
            _quietly(sandbox.close)


def _quietly(close: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):  # it is given up either way; its zygote ends when its socket does
        close()


def grade_class(
    students: Sequence[Student],
    exercises: Sequence[Exercise],
    *,
    jobs: int = 1,
    hidden: tuple[Path, ...] = (),
    seed: int | None = None,
    hints: int = 1,
    kernel_fences: bool = True,
    allow_unfenced: bool = False,
    journal: Journal | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Graded]:
    """Grade every student in every exercise.

    Whatever one submission does, the others are graded: each failure, of whatever kind, is that submission's own, after a
    second try in a sandbox of its own. All get the same inputs, so that what is exact is computed once.

    Args:
        students: all their files, already read.
        jobs: submissions graded at the same time.
        hidden: folders that no submission may read: theirs, and that of the results.
        seed: of everyone's inputs; the journal's, or a fresh one, if None.
        hints: as in `engine.grade`.
        kernel_fences: as in `Sandbox`.
        allow_unfenced: grade even where this system cannot fence in what students hand in.
        journal: has the reports of an earlier part of the run, and gets each new one at once.
        done: called after each submission.

    Returns:
        The outcomes, in the order of `students`. Where the grader itself failed, each property is failed with the
        diagnosis `GRADER_ERROR`.

    Raises:
        Unfenced: a fence is missing, and `allow_unfenced` is not set. Nothing has run then.
        KeyboardInterrupt: what was graded by then is in the journal.
    """
    if seed is None:
        seed = journal.terms.seed if journal else fresh_seed()
    sandboxes = _Sandboxes(hidden, kernel_fences, must_fence=not allow_unfenced)
    stop = threading.Event()
    outcomes: dict[tuple[int, int], Report] = {}

    def work(who: int, what: int, results: Results) -> None:
        student, exercise = students[who], exercises[what]
        submission = student.submissions[exercise.name]
        report = None
        if not stop.is_set():
            report = _attempt(exercise, submission, sandboxes, stop, seed=seed, hints=hints, results=results)
        if report is None:
            return
        if journal is not None and GRADER_ERROR not in report.diagnoses:
            journal.add(student.key, submission, report)
        outcomes[who, what] = report

    with ThreadPoolExecutor(jobs) as pool:
        try:
            if exercises and not allow_unfenced:
                _insist_on_fences(sandboxes, exercises[0])
            for what, exercise in enumerate(exercises):
                results, started = Results(), []
                for who, student in enumerate(students):
                    known = journal.find(student.key, exercise, student.submissions[exercise.name]) if journal else None
                    if known is not None:
                        outcomes[who, what] = known
                        done()
                    else:
                        started.append(pool.submit(work, who, what, results))
                for future in started:
                    future.result()
                    done()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            sandboxes.close()
    return [
        Graded(student, tuple(outcomes[who, what] for what in range(len(exercises))))
        for who, student in enumerate(students)
    ]


def fresh_seed() -> int:
    """For a run that nobody gave one."""
    return secrets.randbits(32)


def _insist_on_fences(sandboxes: _Sandboxes, exercise: Exercise) -> None:
    missing = sandboxes.of(exercise).fences().missing
    if missing:
        raise Unfenced(
            f"this system cannot fence in what students hand in: {'; '.join(missing)}. Nothing was run. "
            "Grade on a Linux with Landlock and seccomp, or say --allow-unfenced, as an ordinary user on a machine that holds "
            "nothing of value."
        )


def _attempt(
    exercise: Exercise, submission: Submission, sandboxes: _Sandboxes, stop: threading.Event, **options
) -> Report | None:
    """A report, whatever happens. None if the run was stopped meanwhile."""
    error: BaseException | None = None
    for _ in range(2):  # the first time, the submission before may have broken the sandbox
        try:
            before = leftovers()
            report = grade(exercise, submission, sandboxes.of(exercise), **options)
            left = sorted(leftovers() - before) if report.protections.missing else []
            return replace(report, note="; ".join(filter(None, (report.note, *map(_left, left))))) if left else report
        except Exception as caught:  # of whatever kind: it is this submission's, and must not be another's
            if stop.is_set():
                return None
            error = caught
            sandboxes.renew(exercise)
    return not_graded(exercise, submission, error)


def _left(what: str) -> str:
    return f"while it was graded, and nothing fenced it in, there came and stayed: {what}"
