"""A question of a chapter: what is asked, how an answer is judged, and why the answer is what it is."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from typing import Any

from flashlib.course.display import format_number

__all__ = ["Question", "is_number"]

_ID = re.compile(r"(\d\d)-[a-z0-9]+(-[a-z0-9]+)*")

# What a reader may write behind a number, in units of the first of its kind.
_BYTES = {"B": 1, **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("kMGT")}, **{f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}}  # fmt: skip
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_PERCENT = {"%": 1.0, "percent": 1.0}
_COUNTS = {"": 1, "k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "billion": 1e9, "x": 1, "times": 1}
_KINDS = (_BYTES, _SECONDS, _PERCENT)
_WRITTEN = re.compile(r"~?\s*([-+]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*)")
_GROUPS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Question:
    """What is asked, and how an answer is judged.

    A number is right within a *factor*: 50 to 200 is right for 100 with `within=2`. A choice is right if it is equal.

    Attributes:
        id: names the question in the reader's record: two digits of the chapter, then words, `"01-score-bytes"`.
        text: one question, with one answer: a number, or one of `choices`.
        default: the answer that stands in where there is nobody to ask. A typical guess beats the right answer.
        unit: of a number, shown after it (`"MB"`).
        within: a number is right within this factor of the actual value.
        choices: the answers on offer, if the answer is not a number.
        reason: why it is so, in a sentence or two; shown when the question is settled, and not before. Names in braces
            stand for figures that the settling cell brings.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """

    id: str
    text: str
    default: float | str
    unit: str = ""
    within: float = 2.0
    choices: tuple[str, ...] | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise ValueError(f"id must look like '01-score-bytes' (chapter, then words), got {self.id!r}")
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"text must ask something, got {self.text!r}")
        if self.choices is not None:
            if not isinstance(self.choices, tuple) or not all(isinstance(choice, str) for choice in self.choices):
                raise TypeError(f"choices must be a tuple of strings, got {self.choices!r}")
            if len(set(self.choices)) < 2:
                raise ValueError(f"choices must offer at least two different answers, got {list(self.choices)}")
        if not is_number(self.within) or self.within < 1:
            raise ValueError(f"within must be a factor of at least 1, got {self.within!r}")
        self.validate(self.default, "default")

    @property
    def chapter(self) -> str:
        return self.id[:2]

    def validate(self, value: Any, name: str) -> float | str:
        """`value` as this question's kind of answer.

        Raises:
            TypeError: a number was expected and something else came.
            ValueError: the number is not finite, or the choice is not among the choices.
        """
        if self.choices is not None:
            if value not in self.choices:
                raise ValueError(f"{name} of {self.id!r} must be one of {list(self.choices)}, got {value!r}")
            return value
        if not is_number(value):
            raise TypeError(f"{name} of {self.id!r} must be a number, got {type(value).__name__}: {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} of {self.id!r} must be finite, got {value!r}")
        return float(value)

    def read(self, written: str) -> float:
        """The number that a reader wrote, in this question's unit: `"1,200"`, `"2.5e6"`, `"151 MB"`, `"0.15 GB"`, `"40k"`.

        Raises:
            ValueError: it is no number, or its unit does not go with the question's; the message is for the reader.
        """
        found = _WRITTEN.fullmatch(written.strip())
        if not found:
            raise ValueError(f"Not a number: {written!r}. Write it like 250 or 2.5e6.")
        number, unit = found.groups()
        if "," in number and not _GROUPS.fullmatch(number):
            raise ValueError(f"{number!r} can be read in two ways. Write a point before the decimals, as in 1.5.")
        return float(number.replace(",", "").replace("_", "")) * self._factor(unit.strip().rstrip("."))

    def _factor(self, unit: str) -> float:
        if unit == self.unit:
            return 1.0
        for kind in _KINDS:
            if self.unit in kind and unit in kind:
                return kind[unit] / kind[self.unit]
        if unit.lower() in _COUNTS:
            return _COUNTS[unit.lower()]
        if not self.unit and unit.lower() in self.text.lower():  # "12,000 tokens" where tokens were asked for
            return 1.0
        wanted = f"in {self.unit}" if self.unit else "without a unit"
        raise ValueError(f"{unit!r} is not understood here. Write the number {wanted}.")

    def judge(self, predicted: float | str, actual: float | str) -> bool:
        if self.choices is not None:
            return predicted == actual
        if predicted == actual:
            return True
        return predicted * actual > 0 and max(predicted / actual, actual / predicted) <= self.within

    def show(self, value: float | str) -> str:
        """`value` as the reader sees it: rounded, with its unit."""
        return value if self.choices is not None else f"{format_number(value)} {self.unit}".strip()

    def because(self, figures: dict[str, Any]) -> str:
        """The reason, with the figures that its names stand for."""
        return self.reason.format(**figures) if figures else self.reason


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
