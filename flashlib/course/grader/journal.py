"""The journal of a class: every report, written down as soon as it is made, so that no interruption loses one.

A file of lines of JSON. The first says what is graded and by which checks, each other one is a report. A run that was
interrupted, at whatever moment, is gone on with from it; the last line may then be half written, and does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashlib.course.grader.engine import Submission
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.findings import Finding, Result
from flashlib.course.grader.report import Report
from flashlib.course.grader.sandbox.confine import Protections
from flashlib.course.grader.sandbox.session import PACKAGE

VERSION = 1
FINISHED = {"finished": True}  # the last line of a run that came to its end


@dataclass(frozen=True)
class Terms:
    """What two halves of one run must have in common.

    Attributes:
        seed: of all inputs.
        hints: shown for each check that fails.
        exercises: names, in order.
        limits: of each exercise.
        checks: digest of the grader's own source.
    """

    seed: int
    hints: int
    exercises: tuple[str, ...]
    limits: tuple[str, ...]
    checks: str

    @classmethod
    def of(cls, exercises: Sequence[Exercise], *, seed: int, hints: int) -> Terms:
        names = tuple(exercise.name for exercise in exercises)
        return cls(seed, hints, names, tuple(repr(each.limits) for each in exercises), _digest_of_checks())


def _digest_of_checks() -> str:
    digest = hashlib.sha256()
    for folder in ("course/exercises", "course/grader"):
        for file in sorted((PACKAGE / folder).rglob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


class Journal:
    """The open journal of a run. Reports may be added from several threads.

    Attributes:
        terms: of the run.
        known: reports by key of the student, name of the exercise, and digest of the submission.
    """

    def __init__(self, file: Path, terms: Terms, known: dict[tuple[str, str, str], Report], *, new: bool) -> None:
        self.file, self.terms, self.known = file, terms, known
        self._lock = threading.Lock()
        self._stream = file.open("a" if not new else "x", encoding="ascii")
        if new:
            self._write({"journal": VERSION, **asdict(terms)})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc) -> None:
        self._stream.close()

    def find(self, key: str, exercise: Exercise, submission: Submission) -> Report | None:
        """The report on this very submission, if there is one."""
        return self.known.get((key, exercise.name, submission.digest))

    def add(self, key: str, submission: Submission, report: Report) -> None:
        """Write a report down. It is on disk when this returns."""
        with self._lock:
            self.known[key, report.exercise, submission.digest] = report
            self._write({"key": key, "digest": submission.digest, "report": asdict(report)})

    def finish(self) -> None:
        """The run has come to its end."""
        with self._lock:
            self._write(FINISHED)

    def _write(self, entry: dict[str, Any]) -> None:
        self._stream.write(
            json.dumps(entry) + "\n"
        )  # in ASCII: a name that is no text can still be written, and read back
        self._stream.flush()
        os.fsync(self._stream.fileno())


def begin(file: Path, terms: Terms, *, fresh: bool = False) -> Journal:
    """A new journal. The one of a run that came to its end makes room: it goes to `<name>.old`.

    Args:
        fresh: that of a run that was interrupted does, too.

    Raises:
        ValueError: an interrupted run could be gone on with.
    """
    if file.exists():
        if not fresh and not _is_finished(file):
            raise ValueError(
                f"{file} is of a run that was interrupted: go on with --resume, or begin anew with --fresh"
            )
        file.replace(file.with_name(f"{file.name}.old"))
    return Journal(file, terms, {}, new=True)


def _is_finished(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 100))
        return stream.read().endswith(json.dumps(FINISHED).encode() + b"\n")


def read_terms(file: Path) -> Terms:
    """What a journal's run is about.

    Raises:
        ValueError: there is no journal that can be read.
    """
    try:
        with file.open(encoding="ascii") as stream:
            header = json.loads(stream.readline())
        if header.pop("journal") != VERSION:
            raise ValueError("of another version")
        return Terms(**{name: tuple(value) if isinstance(value, list) else value for name, value in header.items()})
    except FileNotFoundError as error:
        raise ValueError(f"there is no run to go on with: {file} does not exist") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no journal of a run that can be gone on with: {error}") from error


def go_on(file: Path, terms: Terms) -> Journal:
    """Open the journal of a run that was interrupted.

    Raises:
        ValueError: there is none, or it is of a run on other terms.
    """
    written = read_terms(file)
    for name in ("exercises", "limits", "hints", "seed", "checks"):
        if getattr(written, name) != getattr(terms, name):
            what = (
                f"{name}: {getattr(written, name)} then, {getattr(terms, name)} now"
                if name != "checks"
                else "the checks"
            )
            raise ValueError(
                f"the run of {file} cannot be gone on with, because something has changed ({what}). Begin anew."
            )
    known = {(entry["key"], report.exercise, entry["digest"]): report for entry, report in _entries(file)}
    _end_last_line(file)
    return Journal(file, written, known, new=False)


def _entries(file: Path) -> Iterator[tuple[dict[str, Any], Report]]:
    with file.open(encoding="ascii", errors="replace") as stream:
        next(stream)
        for line in stream:
            try:
                entry = json.loads(line)
                yield entry, report_from(entry["report"])
            except (ValueError, KeyError, TypeError):
                continue  # half a line, from a run that was killed


def _end_last_line(file: Path) -> None:
    with file.open("rb+") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")


def report_from(entry: dict[str, Any]) -> Report:
    """The report that `dataclasses.asdict` took apart."""

    def finding(found: dict[str, Any] | None) -> Finding | None:
        return None if found is None else Finding(**{**found, "hints": tuple(found["hints"])})

    results = tuple(Result(**{**each, "finding": finding(each["finding"])}) for each in entry["results"])
    return Report(**{**entry, "results": results, "protections": Protections(**entry["protections"])})
