"""The outcome of grading one submission, as data. `render.py` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashlib.course.grader.sandbox.confine import Protections
from flashlib.course.grader.text import clean

TEXT_LIMIT = 12_000  # characters of anything in a report


@dataclass(frozen=True)
class Finding:
    """Why a property failed.

    Attributes:
        diagnosis: the misconception's slug, or a structural one: `"wrong-shape"`, `"timeout"`, ...
        says: what that looks like, to the student.
        tried: the call: function, shapes, dtypes.
        got, expected: what came and what should have come; may be "".
        hints: from a nudge to nearly the answer.
        traceback: the student's own frames, or "".
        printed: what the code printed during this check, cut to size.
    """

    diagnosis: str
    says: str
    tried: str = ""
    got: str = ""
    expected: str = ""
    hints: tuple[str, ...] = ()
    traceback: str = ""
    printed: str = ""

    def __post_init__(self) -> None:
        for name in ("diagnosis", "says", "tried", "got", "expected", "traceback", "printed"):
            object.__setattr__(self, name, clean(getattr(self, name), TEXT_LIMIT))


class Failure(Exception):
    """Raised inside a property's check: the property is not fulfilled."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.says)
        self.finding = finding


@dataclass(frozen=True)
class Result:
    """One property: its points if `finding` is None, and none otherwise.

    Attributes:
        own_word: it rests on what the student's process says of itself, such as a count of the bytes that it read. Code that
            reaches into its own process can make that up, so an instructor is told ("unverified").
    """

    name: str
    title: str
    points: int
    finding: Finding | None
    own_word: bool = False

    @property
    def passed(self) -> bool:
        return self.finding is None

    @property
    def earned(self) -> int:
        return self.points if self.passed else 0


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
        from flashlib.course.grader.render import as_text

        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from flashlib.course.grader.render import as_html_fragment

        return as_html_fragment(self)
