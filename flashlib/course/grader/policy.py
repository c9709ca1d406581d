"""What an instructor adds to the grader's verdicts: weights, deadlines, penalties for lateness, and marks given by hand.

A small YAML file, in which everything may be left out:

    exercises:
      ex01: {weight: 1, due: 2026-01-10 23:59}
      ex02: {weight: 2, due: 2026-01-17 23:59}
    late: {grace_hours: 2, per_day: 0.1, at_most: 0.5}    # shares of the points earned; each day begun counts
    extensions:
      Ada Lovelace: {ex01: 2026-01-12 23:59}
    overrides:                                            # kept, however often the class is graded
      Ada Lovelace: {ex02: {points: 20, why: she explained it at the board}}

Times without a zone are this machine's. Names are those of the table.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flashlib.course.grader.engine import Submission
from flashlib.course.grader.exercise import exercise_names
from flashlib.course.grader.report import Report
from flashlib.course.grader.text import one_line

DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Override:
    """Points given by hand, in place of those of the checks and of any penalty."""

    points: float
    why: str


@dataclass(frozen=True)
class Mark:
    """What one exercise counts for one student.

    Attributes:
        points: after penalty or override.
        penalty: the share of the earned points that was taken off, 0 to 1.
        note: why it is not what the checks gave, or "".
    """

    points: float
    penalty: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Policy:
    """Weights, deadlines (seconds since 1970), penalties and overrides; by default every exercise counts by its points."""

    weights: Mapping[str, float] = field(default_factory=dict)
    due: Mapping[str, float] = field(default_factory=dict)
    grace_hours: float = 0.0
    per_day: float = 0.0
    at_most: float = 1.0
    extensions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Override]] = field(default_factory=dict)

    def mark(self, student: str, submission: Submission, report: Report) -> Mark:
        """What the report counts."""
        override = self.overrides.get(student, {}).get(report.exercise)
        if override is not None:
            return Mark(override.points, note=f"{override.points:g} points given by hand: {override.why}")
        days = self.days_late(student, submission, report.exercise)
        penalty = min(self.at_most, days * self.per_day)
        note = f"{days} day{'s' if days > 1 else ''} late: {penalty:.0%} off" if penalty else ""
        return Mark(report.earned * (1 - penalty), penalty, note)

    def days_late(self, student: str, submission: Submission, exercise: str) -> int:
        """Days begun after the deadline. What is marked as late, without a time that says how much, is one day late."""
        due = self.extensions.get(student, {}).get(exercise, self.due.get(exercise))
        if due is None:
            return 0
        late = submission.time - due - 3600 * self.grace_hours if submission.time else 0.0
        days = math.ceil(late / DAY) if late > 0 else 0
        extended = exercise in self.extensions.get(student, {})
        return max(days, 1) if submission.late and not extended else days

    def percent(self, marks: Sequence[Mark], reports: Sequence[Report]) -> float:
        """The whole, from 0 to 100: the mean of the shares of the points, by weight (by points, where no weight is given)."""
        weights = [self.weights.get(report.exercise, report.points) for report in reports]
        shares = [mark.points / report.points for mark, report in zip(marks, reports, strict=True)]
        total = sum(weights)
        return 100 * sum(w * s for w, s in zip(weights, shares, strict=True)) / total if total else 0.0


def read_policy(file: Path) -> Policy:
    """Read the YAML file that this module's docstring shows.

    Raises:
        ValueError: it cannot be read, or holds what is not known here; the message names the entry.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the policy {file} cannot be read: {error}") from error
    top = _mapping(content, str(file), {"exercises", "late", "extensions", "overrides"})
    late = _mapping(top.get("late", {}), "late", {"grace_hours", "per_day", "at_most"})
    exercises = _by_exercise(top.get("exercises", {}), "exercises")
    each = {name: _mapping(value, f"exercises.{name}", {"weight", "due"}) for name, value in exercises.items()}
    extensions = _mapping(top.get("extensions", {}), "extensions")
    overrides = _mapping(top.get("overrides", {}), "overrides")
    return Policy(
        weights={n: _number(v["weight"], f"exercises.{n}.weight") for n, v in each.items() if "weight" in v},
        due={n: _time(v["due"], f"exercises.{n}.due") for n, v in each.items() if "due" in v},
        grace_hours=_number(late.get("grace_hours", 0), "late.grace_hours"),
        per_day=_number(late.get("per_day", 0), "late.per_day", 1),
        at_most=_number(late.get("at_most", 1), "late.at_most", 1),
        extensions={
            student: {n: _time(v, f"extensions.{student}.{n}") for n, v in _by_exercise(value, student).items()}
            for student, value in extensions.items()
        },
        overrides={
            student: {n: _override(v, f"overrides.{student}.{n}") for n, v in _by_exercise(value, student).items()}
            for student, value in overrides.items()
        },
    )


def _mapping(value: Any, where: str, known: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold names and values, got {value!r}")
    result = {str(name): content for name, content in value.items()}
    if known is not None and (odd := sorted(set(result) - known)):
        raise ValueError(f"{where} knows {', '.join(sorted(known))}, not {', '.join(odd)}")
    return result


def _by_exercise(value: Any, where: str) -> dict[str, Any]:
    return _mapping(value, where, set(exercise_names()))


def _number(value: Any, where: str, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{where} should be a number from 0 to {most:g}, got {value!r}")
    return float(value)


def _time(value: Any, where: str) -> float:
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"{where} should be a time such as 2026-01-10 23:59, got {value!r}") from error
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    if isinstance(value, datetime.date):  # the end of that day
        return datetime.datetime.combine(value, datetime.time(23, 59, 59)).timestamp()
    raise ValueError(f"{where} should be a time such as 2026-01-10 23:59, got {value!r}")


def _override(value: Any, where: str) -> Override:
    entry = _mapping(value, where, {"points", "why"})
    if "points" not in entry:
        raise ValueError(f"{where} should hold points, got {value!r}")
    return Override(_number(entry["points"], f"{where}.points"), one_line(str(entry.get("why", "no reason given"))))
