"""Grade one submission: in a process of its own, every property answered for."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flashlib.course.grader.exercise import Exercise, Property
from flashlib.course.grader.findings import Failure, Finding, Result
from flashlib.course.grader.report import Report
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.confine import Protections
from flashlib.course.grader.sandbox.conversation import Child
from flashlib.course.grader.sandbox.outcome import SandboxError, StudentError
from flashlib.course.grader.sandbox.session import REPOSITORY, Sandbox
from flashlib.course.grader.trial import BrokenCheck, Process, Trial

SOURCE_LIMIT = 256 * 1024  # bytes
# These cost a process, and perhaps the whole time limit. After so many the rest is not tried.
COSTLY = {"timeout", "process-ended", "memory-limit", "output-flood", "disk-flood", "too-many-threads", "tampered"}
STRIKES = 3
GRADER_ERROR = "grader-error"
UNUSABLE = "unusable-answer"


@dataclass(frozen=True)
class Submission:
    """One student's file, read before any student's code runs.

    Attributes:
        student: whose.
        source: the bytes of the file; None if it could not be read.
        problem: why not.
        beside: modules of his own that the file imports, by file name.
        path: where it was found.
        time: of its last change, in seconds since 1970; 0 if unknown.
        late: whether it was handed in as late.
        note: what the instructor should know, such as that the file has another name than asked for.
    """

    student: str
    source: bytes | None
    problem: Finding | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)
    path: str = ""
    time: float = 0.0
    late: bool = False
    note: str = ""

    @property
    def digest(self) -> str:
        """The same for two submissions that get the same marks."""
        digest = hashlib.sha256(repr((self.source, sorted(self.beside.items()))).encode())
        if self.problem is not None:
            digest.update(f"{self.problem.diagnosis}: {self.problem.says}".encode())
        return digest.hexdigest()


def sandbox_for(
    exercise: Exercise, *, hidden: tuple[Path, ...] = (), kernel_fences: bool = True, must_fence: bool = False
) -> Sandbox:
    """A sandbox with what the exercise needs loaded. Solutions, exercises and tests are out of its children's sight."""
    private = tuple(REPOSITORY / name for name in ("solutions", "exercises", "tests"))
    return Sandbox(
        preload=exercise.preload,
        environment=dict(exercise.environment),
        hidden=(*private, *hidden),
        kernel_fences=kernel_fences,
        must_fence=must_fence,
    )


def grade(
    exercise: Exercise,
    submission: Submission,
    sandbox: Sandbox,
    *,
    seed: int | None = None,
    hints: int = 1,
    results: Results | None = None,
    checks: Collection[str] | None = None,
) -> Report:
    """Check every property of `exercise`.

    Args:
        seed: of the inputs; fresh if None.
        hints: how many hints the report shows for each failed property.
        results: what was computed for other submissions, and need not be again if they had the same seed.
        checks: names of the properties to check; all if None.

    Returns:
        A report with one result for each property that was checked. Where a check itself is broken, its property is failed with the
        diagnosis `GRADER_ERROR`.

    Raises:
        SandboxError: the sandbox itself does not work.
    """
    seed = secrets.randbits(32) if seed is None else seed
    run = _Run(exercise, submission, sandbox, seed, Results() if results is None else results)
    began, cpu = time.monotonic(), time.thread_time()
    try:
        with _one_thread:
            chosen = [prop for prop in exercise.properties if checks is None or prop.name in checks]
            outcomes = tuple(run.result(prop) for prop in chosen)
    finally:
        run.process.end()
        run.compiler.end()
    return Report(
        exercise=exercise.name,
        title=exercise.title,
        submission=submission.student,
        results=outcomes,
        seed=run.seed,
        seconds=time.monotonic() - began,
        protections=run.protections,
        hints=hints,
        note=submission.note,
        cpu_seconds=time.thread_time() - cpu + run.process.cpu_seconds + run.compiler.cpu_seconds,
    )


def not_graded(exercise: Exercise, submission: Submission, error: BaseException) -> Report:
    """Where the grader itself failed: each property failed with the diagnosis `GRADER_ERROR`, and why."""
    finding = Finding(GRADER_ERROR, f"The grader failed, not your code: {type(error).__name__}: {error}")
    results = tuple(Result(prop.name, prop.title, prop.points, finding) for prop in exercise.properties)
    return Report(exercise.name, exercise.title, submission.student, results, 0, 0.0, note=submission.note)


class _OneThread:
    """Compute oracles on one thread: the inputs are small, and other jobs want the other cores. Several jobs may enter it."""

    def __init__(self) -> None:
        self._lock, self._inside, self._threads = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self._inside += 1

    def __exit__(self, *exc) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.set_num_threads(self._threads)


_one_thread = _OneThread()


class _Run:
    """One submission on its way through the properties."""

    def __init__(
        self, exercise: Exercise, submission: Submission, sandbox: Sandbox, seed: int, results: Results
    ) -> None:
        self.exercise, self.submission, self.sandbox, self.seed = exercise, submission, sandbox, seed
        self.results = results
        self.limits = exercise.limits
        self.protections = Protections()
        self.hopeless = submission.problem  # a finding that holds for every property from here on
        self.strikes = 0
        self.process = Process(lambda metered: self._start_child(self.sandbox, metered))
        self.compiler = Process(lambda metered: self._start_child(self.sandbox.for_compiling(), metered))
        self.deadline = time.monotonic() + self.limits.total_seconds

    def result(self, prop: Property) -> Result:
        finding = self.hopeless or self._out_of_time()
        if finding is not None:
            return Result(prop.name, prop.title, prop.points, finding)
        trial = Trial(prop.name, self.seed, self.process, self.results, self.compiler)
        finding = self._try(prop, trial)
        return Result(prop.name, prop.title, prop.points, finding, trial.own_word, trial.apart)

    def _out_of_time(self) -> Finding | None:
        if time.monotonic() < self.deadline:
            return None
        allowed = self.limits.total_seconds
        return Finding("not-run", f"Not tried: the {allowed:g} s for the whole submission were used up.")

    def _try(self, prop: Property, trial: Trial) -> Finding | None:
        finding = None
        try:
            prop.run(trial)
        except Failure as failure:
            finding = failure.finding
        except SandboxError:
            raise
        except Exception as error:
            finding = self._broken(error, trial)
        printed = self.process.take_printed() + self.compiler.take_printed()
        if finding is None or finding is self.hopeless:
            return finding
        if finding.diagnosis in COSTLY:
            self._strike(finding)
        return replace(finding, hints=finding.hints + prop.hints, printed=printed)

    def _broken(self, error: Exception, trial: Trial) -> Finding:
        """The check did not get through. Nobody gets points for that, but everybody is told why.

        If nothing odd had come from the submission, the check is at fault. Else it met with a value that its author did not
        think of: what came is shown, and the instructor finds the diagnosis among those that he should look at.
        """
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}, in {where.name}"
        told = f"({type(error).__name__}: {error}; {place})"
        if isinstance(error, BrokenCheck) or not trial.answered:
            says = f"This check is broken; it is not your fault. Please report it. {told}"
            return Finding(GRADER_ERROR, says, traceback=f"{place}\n    {where.line}")
        says = (
            f"The check could not go on with what your code returned. If you think that it is right, report it. {told}"
        )
        return Finding(UNUSABLE, says, trial.tried, got=trial.answered)

    def _strike(self, finding: Finding) -> None:
        self.process.end()
        self.compiler.end()
        self.strikes += 1
        if self.strikes == STRIKES:
            says = f"Not tried: the process had to be stopped {STRIKES} times before (last: {finding.diagnosis})."
            self.hopeless = Finding("not-run", says)

    def _start_child(self, sandbox: Sandbox, metered: bool) -> Child:
        source, forbidden = self.submission.source, dict(self.exercise.forbidden)
        files = {**self.submission.beside, self.exercise.file: source}
        child = sandbox.open_child(files, self.exercise.file, self.limits, forbidden, metered=metered)
        try:
            self.protections = child.load()
        except StudentError as error:
            child.end()
            self.hopeless = Finding(
                error.group or error.kind,
                f"Your file could not be loaded. {error.message}",
                tried=f"import of {self.exercise.file}",
                traceback=error.traceback,
                printed=child.take_printed(),
            )
            raise Failure(self.hopeless) from error
        except BaseException:
            child.end()
            raise
        return child
