"""The outcome of grading one submission, and how it is shown: as text, as HTML, as a page of feedback, and as the JSON that Gradescope reads.

Much of a report is a stranger's text: what his code printed, the messages of his exceptions. It was cleaned of control
characters when it came in, and HTML is made by a template engine that escapes everything.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from flashlib.course.grader.findings import Finding, Result
from flashlib.course.grader.sandbox.confine import Protections

if TYPE_CHECKING:
    from jinja2 import Environment

UNWRITTEN = "not-implemented"
INDENT = " " * 9
WIDTH = 110


@dataclass(frozen=True)
class Report:
    """One submission to one exercise.

    Attributes:
        exercise, title: which.
        submission: whose.
        results: one for each property, in order; none is ever left out.
        seed: replays the inputs.
        seconds: wall-clock time.
        protections: what fenced the code in.
        hints: how many to show for each failed property.
        note: what student and instructor should know of how the file was found.
        cpu_seconds: processor time, of the checks and of the processes that the file ran in.
    """

    exercise: str
    title: str
    submission: str
    results: tuple[Result, ...]
    seed: int
    seconds: float
    protections: Protections = field(default_factory=Protections)
    hints: int = 1
    note: str = ""
    cpu_seconds: float = 0.0

    @property
    def earned(self) -> int:
        return sum(result.earned for result in self.results)

    @property
    def points(self) -> int:
        return sum(result.points for result in self.results)

    @property
    def unverified(self) -> int:
        """Points earned on the student's process's own word."""
        return sum(result.earned for result in self.results if result.own_word)

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def diagnoses(self) -> tuple[str, ...]:
        """Each different diagnosis among the failed properties, in order of appearance."""
        return tuple(dict.fromkeys(result.finding.diagnosis for result in self.results if result.finding))

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html_fragment(self)


def about_the_run(report: Report) -> list[str]:
    """How to repeat the run, and what fenced it in. Nothing where a notebook's output must not differ between runs."""
    if os.environ.get("FLASHLIB_NONINTERACTIVE", "0") not in ("", "0") and not _depends_on_seed(report):
        return []
    lines = [f"Same inputs again: flashlib grade {report.exercise} --seed {report.seed}"]
    if report.protections.active:
        lines.append(f"Fence around the code: {'; '.join(report.protections.active)}.")
    return lines + [f"NOT fenced: {line}." for line in report.protections.missing]


def _depends_on_seed(report: Report) -> bool:
    return any(diagnosis != UNWRITTEN for diagnosis in report.diagnoses)


def more_hints(report: Report) -> bool:
    """Whether some failed check has hints that are not shown yet."""
    return any(status_of(r) == "FAILED" and len(r.finding.hints) > report.hints for r in report.results)


def grouped(report: Report) -> list[tuple[Result, bool]]:
    """Each result, and whether its finding repeats one above it, so that the explanation need not come twice."""
    told: set[tuple[str, str]] = set()
    rows = []
    for result in report.results:
        key = (result.finding.diagnosis, result.finding.says) if result.finding else None
        rows.append((result, key in told))
        if key:
            told.add(key)
    return rows


def status_of(result: Result) -> str:
    """`"passed"`, `"to do"` for what is not written yet, or `"FAILED"`. Only passed earns points."""
    if result.finding is None:
        return "passed"
    return "to do" if result.finding.diagnosis == UNWRITTEN else "FAILED"


# ----------------------------------------------------------------------------------------------------------------- text


def as_text(report: Report) -> str:
    """The report for a terminal."""
    lines = [f"{report.exercise} · {report.title}: {report.earned} of {report.points} points"]
    lines += [*([f"Note: {report.note}."] if report.note else []), ""]
    for result, repeated in grouped(report):
        lines.append(f"{status_of(result):6} {result.earned}/{result.points}  {result.title}")
        lines += _finding_lines(report, result.finding, repeated) if result.finding else []
    if more_hints(report):
        lines += ["", f"More hints: check({report.exercise!r}, hints={report.hints + 1}) or --hints {report.hints + 1}"]
    about = about_the_run(report)
    return "\n".join([*lines, *([""] if about else []), *about])


def _finding_lines(report: Report, finding: Finding, repeated: bool) -> list[str]:
    if finding.diagnosis == UNWRITTEN:
        return []
    lines = [f"{INDENT}{finding.diagnosis}, as above"] if repeated else _wrapped(f"{finding.diagnosis}: ", finding.says)
    for label, text in (("tried     ", finding.tried), ("got       ", finding.got), ("expected  ", finding.expected)):
        lines += _wrapped(label, text) if text else []
    if repeated:
        return lines
    if finding.traceback:
        lines += [INDENT + "in your code:", *(f"{INDENT}  {line}" for line in finding.traceback.splitlines())]
    if finding.printed.strip():
        lines += [INDENT + "it printed:", *(f"{INDENT}  {line}" for line in cut(finding.printed).splitlines())]
    for number, hint in enumerate(finding.hints[: report.hints], start=1):
        lines += _wrapped(f"hint {number}/{len(finding.hints)}  ", hint)
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=INDENT + label, subsequent_indent=INDENT + "  ") or [
        INDENT + label
    ]


def cut(text: str, limit: int = 1500) -> str:
    return text if len(text) <= limit else f"{text[:limit]}\n... (cut)"


# ----------------------------------------------------------------------------------------------------------------- HTML


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flashlib.course.grader"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals.update(
        about=about_the_run, more_hints=more_hints, grouped=grouped, status_of=status_of, cut=cut
    )
    return environment


def template(name: str):
    """One of the templates beside this module; whatever is put into it is escaped."""
    return _templates().get_template(name)


def as_html_fragment(report: Report) -> str:
    """The report for a notebook."""
    return _templates().get_template("fragment.html").render(reports=[report])


def as_page(student: str, reports: Sequence[Report]) -> str:
    """One student's feedback on all exercises, a whole HTML page that loads nothing and runs nothing."""
    return _templates().get_template("page.html").render(student=student, reports=reports)


# ----------------------------------------------------------------------------------------------------------------- JSON


def as_gradescope(reports: Sequence[Report]) -> dict[str, Any]:
    """The results.json of Gradescope's autograder (https://gradescope-autograders.readthedocs.io/en/latest/specs/)."""
    tests = []
    for report in reports:
        for number, (result, repeated) in enumerate(grouped(report), start=1):
            lines = _finding_lines(report, result.finding, repeated) if result.finding else []
            tests.append(
                {
                    "number": f"{report.exercise}.{number}",
                    "name": result.title,
                    "score": result.earned,
                    "max_score": result.points,
                    "status": "passed" if result.passed else "failed",
                    "output": "\n".join(line.strip() for line in lines) or status_of(result),
                    "output_format": "text",
                    "tags": [report.exercise, *([result.finding.diagnosis] if result.finding else [])],
                    "visibility": "visible",
                    "extra_data": {"check": result.name},
                }
            )
    return {
        "score": sum(report.earned for report in reports),
        "execution_time": round(sum(report.seconds for report in reports), 2),
        "output": "\n".join(line for report in reports for line in about_the_run(report)),
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "extra_data": {"seeds": {report.exercise: report.seed for report in reports}},
        "tests": tests,
    }
