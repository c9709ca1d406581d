"""Grade one submission: every property in a process of its own, every one answered for."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path

from flashlib.course.grader.exercise import Exercise, Property
from flashlib.course.grader.report import Failure, Finding, Report, Result
from flashlib.course.grader.sandbox.confine import Protections
from flashlib.course.grader.sandbox.session import REPOSITORY, Child, Limits, Sandbox, SandboxError, StudentError
from flashlib.course.grader.trial import Trial

SOURCE_LIMIT = 256 * 1024  # bytes
# These cost a process, and perhaps the whole time limit. After so many the rest is not tried.
COSTLY = {"timeout", "process-ended", "memory", "memory-limit", "output-flood", "disk-flood", "tampered"}
STRIKES = 3


@dataclass(frozen=True)
class Submission:
    """One student's file, read before any student's code runs.

    Attributes:
        student: whose.
        source: the bytes of the file; None if it could not be read.
        problem: why not.
    """

    student: str
    source: bytes | None
    problem: Finding | None = None


class GraderError(RuntimeError):
    """The grader, not the submission, is at fault: a check raised something that is no finding."""


def sandbox_for(exercise: Exercise, *, hidden: tuple[Path, ...] = (), kernel_fences: bool = True) -> Sandbox:
    """A sandbox with what the exercise needs loaded. Solutions, exercises and tests are out of its children's sight."""
    private = tuple(REPOSITORY / name for name in ("solutions", "exercises", "tests"))
    return Sandbox(
        preload=exercise.preload,
        environment=dict(exercise.environment),
        hidden=(*private, *hidden),
        kernel_fences=kernel_fences,
    )


def grade(
    exercise: Exercise,
    submission: Submission,
    sandbox: Sandbox,
    *,
    seed: int | None = None,
    hints: int = 1,
    limits: Limits | None = None,
) -> Report:
    """Check every property of `exercise`.

    Args:
        seed: of the inputs; fresh if None.
        hints: how many hints the report shows for each failed property.
        limits: in place of the exercise's own.

    Returns:
        A report with one result for each property.

    Raises:
        SandboxError: the sandbox itself does not work.
        GraderError: a check is broken.
    """
    run = _Run(exercise, submission, sandbox, limits or exercise.limits, secrets.randbits(32) if seed is None else seed)
    began = time.monotonic()
    results = tuple(run.result(prop) for prop in exercise.properties)
    return Report(
        exercise=exercise.name,
        title=exercise.title,
        submission=submission.student,
        results=results,
        seed=run.seed,
        seconds=time.monotonic() - began,
        protections=run.protections,
        hints=hints,
    )


class _Run:
    """One submission on its way through the properties."""

    def __init__(self, exercise: Exercise, submission: Submission, sandbox: Sandbox, limits: Limits, seed: int) -> None:
        self.exercise, self.submission, self.sandbox, self.limits, self.seed = (
            exercise,
            submission,
            sandbox,
            limits,
            seed,
        )
        self.protections = Protections()
        self.hopeless = submission.problem  # a finding that holds for every property from here on
        self.strikes = 0
        self.deadline = time.monotonic() + limits.total_seconds

    def result(self, prop: Property) -> Result:
        finding = self.hopeless or self._out_of_time() or self._try(prop)
        if finding is not None:
            finding = replace(finding, hints=finding.hints + prop.hints)
        return Result(prop.name, prop.title, prop.points, finding)

    def _out_of_time(self) -> Finding | None:
        if time.monotonic() < self.deadline:
            return None
        return Finding(
            "not-run", f"Not tried: the {self.limits.total_seconds:g} s for the whole submission were used up."
        )

    def _try(self, prop: Property) -> Finding | None:
        trial = Trial(prop.name, self.seed, self._start_child)
        finding = None
        try:
            prop.run(trial)
        except Failure as failure:
            finding = failure.finding
        except SandboxError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
            AssertionError,
        ) as error:
            raise GraderError(
                f"the check {self.exercise.name}/{prop.name} (seed {self.seed}) is broken: {error}"
            ) from error
        finally:
            trial.finish()
        if finding is None:
            return None
        self._count(finding)
        return replace(finding, printed=trial.printed)

    def _count(self, finding: Finding) -> None:
        self.strikes += finding.diagnosis in COSTLY
        if self.strikes >= STRIKES and self.hopeless is None:
            self.hopeless = Finding(
                "not-run",
                f"Not tried: the process had to be stopped {STRIKES} times before (last: {finding.diagnosis}).",
            )

    def _start_child(self) -> Child:
        child = self.sandbox.open_child(
            self.submission.source, self.exercise.file, self.limits, dict(self.exercise.forbidden)
        )
        try:
            self.protections = child.load()
        except StudentError as error:
            child.end()
            self.hopeless = Finding(
                error.group or error.kind,
                f"Your file could not be loaded. {error.message}",
                tried=f"import of {self.exercise.file}",
                traceback=error.traceback,
                printed=child.said,
            )
            raise Failure(self.hopeless) from error
        except BaseException:
            child.end()
            raise
        return child
