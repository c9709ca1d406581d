"""What the check of a property found, as data."""

from __future__ import annotations

from dataclasses import dataclass

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
        apart: it took a process of its own, to see from outside what that holds and reads, or what a compiler makes of a kernel.
    """

    name: str
    title: str
    points: int
    finding: Finding | None
    own_word: bool = False
    apart: bool = False

    @property
    def passed(self) -> bool:
        return self.finding is None

    @property
    def earned(self) -> int:
        return self.points if self.passed else 0
