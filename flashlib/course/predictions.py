"""Predict before you run: a question is asked, the answer recorded, and later settled by a value that was computed.

A result that you have guessed at first stays; one that you only read does not. So each measurement of the course has a
question before it:

    p = predict("How many MB is the score matrix?", id="01-score-bytes", unit="MB", default=100, within=2)
    ...
    p.settle(scores.nbytes / 1e6, because="N^2 entries for each head.")

With a reader in front of it, `predict` shows a control and writes the answer to the reader's record, a JSON file in the
user's data directory (`FLASHLIB_DATA` names another). With nobody in front of it (`FLASHLIB_NONINTERACTIVE=1`, or no
notebook), it takes the default, says so, and writes nothing; what it prints is then the same in every run.
"""

from __future__ import annotations

import html
import json
import math
import numbers
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlib.course.display import Table, format_number, show, table, widgets_run

_ID = re.compile(r"(\d\d)-[a-z0-9]+(-[a-z0-9]+)*")
_RIGHT, _WRONG, _NEUTRAL = "#009E73", "#D55E00", "#0072B2"
_settled_here: dict[str, dict[str, Any]] = {}  # what a session without a reader has settled; never written to disk


@dataclass(frozen=True)
class Question:
    """What is asked, and how an answer is judged.

    A number is right within a *factor*: 50 to 200 is right for 100 with `within=2`. A choice is right if it is equal.
    """

    id: str
    text: str
    default: float | str
    unit: str = ""
    within: float = 2.0
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise ValueError(f"id must look like '01-score-bytes' (chapter, then words), got {self.id!r}")
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"question must be a text that asks something, got {self.text!r}")
        if self.choices is not None and len(set(self.choices)) < 2:
            raise ValueError(f"choices must offer at least two different answers, got {list(self.choices)}")
        if not _is_number(self.within) or self.within < 1:
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
        if not _is_number(value):
            raise TypeError(f"{name} of {self.id!r} must be a number, got {type(value).__name__}: {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} of {self.id!r} must be finite, got {value!r}")
        return float(value)

    def judge(self, predicted: float | str, actual: float | str) -> bool:
        if self.choices is not None:
            return predicted == actual
        if predicted == actual:
            return True
        return predicted * actual > 0 and max(predicted / actual, actual / predicted) <= self.within

    def show(self, value: float | str) -> str:
        """`value` as the reader sees it: rounded, with its unit."""
        return value if self.choices is not None else f"{format_number(value)} {self.unit}".strip()


@dataclass(frozen=True)
class Verdict:
    """A settled prediction. `correct` is None if there was no prediction. Prints as text, shows as HTML."""

    question: Question
    predicted: float | str | None
    by_default: bool
    actual: float | str
    because: str

    @property
    def correct(self) -> bool | None:
        return None if self.predicted is None else self.question.judge(self.predicted, self.actual)

    def __str__(self) -> str:
        return "\n".join(filter(None, [self._headline(), self.because]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        color = {True: _RIGHT, False: _WRONG, None: _NEUTRAL}[self.correct]
        return _box(color, f"<b>{html.escape(self._headline())}</b>", html.escape(self.because))

    def _headline(self) -> str:
        shown = self.question.show(self.actual)
        if self.predicted is None:
            return f"No prediction recorded. It is {shown}."
        who = "The default was" if self.by_default else "You predicted"
        return f"{who} {self.question.show(self.predicted)}; it is {shown}. {self._judgement()}"

    def _judgement(self) -> str:
        if self.question.choices is not None:
            return "Right." if self.correct else "Not so."
        within = self.question.within
        limit = f"a factor of {format_number(within)}" if within > 1 else "only the value itself"
        if self.correct:
            return "Right." if self.predicted == self.actual else f"Right, within {limit}."
        if self.predicted * self.actual <= 0:
            return "Not so."
        ratio = max(self.predicted / self.actual, self.actual / self.predicted)
        return f"Off by a factor of {format_number(ratio)}; {limit} would have been right."


class Prediction:
    """A question that has been asked. `settle` it once the answer has been computed.

    Attributes:
        question: the `Question`.
        answer: what was predicted so far, or None.
        widget: the control shown to the reader, or None where there is no reader.
    """

    def __init__(self, question: Question, *, interactive: bool) -> None:
        self.question = question
        self.by_default = not interactive
        self.verdict: Verdict | None = None
        self.answer = _recorded_answer(question) if interactive else question.default
        self.widget = _AnswerControl(self) if interactive else None

    def record(self, answer: float | str) -> None:
        """Take the reader's answer and write it to the record, as the control's button does.

        Raises:
            TypeError, ValueError: the answer is not of the question's kind.
            RuntimeError: the prediction is settled; it is too late to change it.
        """
        if self.verdict is not None:
            raise RuntimeError(f"{self.question.id!r} is settled; run the cell that asks it to answer again")
        self.answer = self.question.validate(answer, "answer")
        self.by_default = False
        _write(self.question, predicted=self.answer, actual=None, correct=None)

    def settle(self, actual: float | str, *, because: str = "") -> Verdict:
        """Compare the prediction with `actual` and score it.

        Args:
            actual: the value, computed or measured by the notebook; never typed in, so that a prediction, and the
                course, can be wrong. A number (Python, NumPy or a one-element tensor) or one of the choices.
            because: one or two sentences on why it is so, shown with the verdict.

        Raises:
            TypeError, ValueError: `actual` is not of the question's kind.
            RuntimeError: it was settled before with another value.
        """
        actual = self.question.validate(_python_value(actual), "actual")
        if self.verdict is not None and self.verdict.actual != actual:
            raise RuntimeError(
                f"{self.question.id!r} is settled already, with {self.question.show(self.verdict.actual)}; now came "
                f"{self.question.show(actual)}. Run the cell that asks it to settle it anew."
            )
        self.verdict = Verdict(self.question, self.answer, self.by_default, actual, because)
        _write(self.question, predicted=self.answer, actual=actual, correct=self.verdict.correct)
        if self.widget is not None:
            self.widget.lock()
        return self.verdict

    def __str__(self) -> str:
        return f"Predict: {self.question.text}\n{self._status()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _box(_NEUTRAL, f"<b>Predict:</b> {html.escape(self.question.text)}", html.escape(self._status()))

    def _status(self) -> str:
        offered = f"Choices: {' · '.join(self.question.choices)}. " if self.question.choices else ""
        if self.by_default:
            return f"{offered}No reader in this run; the default answer stands in: {self.question.show(self.answer)}."
        if self.answer is None:
            return f"{offered}Not answered yet."
        return f"{offered}Your prediction: {self.question.show(self.answer)}."


def predict(
    question: str,
    *,
    id: str,
    default: float | str,
    unit: str = "",
    within: float = 2.0,
    choices: Sequence[str] | None = None,
) -> Prediction:
    """Ask for a prediction, show the control for it, and return the `Prediction` to settle later.

    Args:
        question: one question, with one answer: a number, or one of `choices`.
        id: names the prediction in the reader's record: two digits of the chapter, then words, `"01-score-bytes"`.
        default: the answer that stands in where there is nobody to ask. A typical guess beats the right answer.
        unit: unit of a number, shown after it (`"MB"`).
        within: a number is right within this factor of the actual value.
        choices: the answers on offer, if the answer is not a number.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    if choices is not None and (isinstance(choices, str) or not all(isinstance(c, str) for c in choices)):
        raise TypeError(f"choices must be a sequence of strings, got {choices!r}")
    asked = Question(id, question, default, unit, within, tuple(choices) if choices is not None else None)
    prediction = Prediction(asked, interactive=widgets_run())
    show(prediction if prediction.widget is None else prediction.widget.box)
    return prediction


def scoreboard(chapter: str | None = None) -> Table:
    """The score per chapter, or each prediction of one `chapter` (`"01"`).

    It reads the reader's record; without a reader, what this session has settled.

    Raises:
        ValueError: nothing is recorded for `chapter`.
    """
    entries = {id: entry for id, entry in sorted(_entries().items()) if entry["actual"] is not None}
    if chapter is not None:
        return _chapter_scores(chapter, entries)
    rows = []
    for name in sorted({id[:2] for id in entries}):
        scores = [entry["correct"] for id, entry in entries.items() if id[:2] == name]
        rows.append((name, len(scores), len(scores) - scores.count(None), scores.count(True)))
    if rows:
        rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    notes = [] if rows else ["No prediction has been settled yet."]
    return table(rows, ["chapter", "settled", "answered", "right"], notes=notes)


def record_path() -> Path:
    """The reader's record: `predictions.json` in `FLASHLIB_DATA`, or else in the user's data directory."""
    import platformdirs

    return Path(os.environ.get("FLASHLIB_DATA") or platformdirs.user_data_dir("flashlib")) / "predictions.json"


class _AnswerControl:
    """The question with a number box or radio buttons, and a button that records the answer."""

    def __init__(self, prediction: Prediction) -> None:
        import ipywidgets as widgets

        self._prediction = prediction
        question = prediction.question
        if question.choices is not None:
            self.control = widgets.RadioButtons(
                options=question.choices, value=prediction.answer, layout={"width": "max-content"}
            )
        else:
            shown = "" if prediction.answer is None else f"{prediction.answer:g}"
            self.control = widgets.Text(value=shown, placeholder="a number", layout={"width": "12em"})
        self.button = widgets.Button(description="Record", button_style="primary")
        self.button.on_click(lambda _: self._record())
        self.message = widgets.Label(value=prediction._status() if prediction.answer is not None else "")
        text = widgets.HTML(_box(_NEUTRAL, f"<b>Predict:</b> {html.escape(question.text)}"))
        row = [self.control, widgets.Label(question.unit), self.button, self.message]
        self.box = widgets.VBox([text, widgets.HBox(row)])

    def lock(self) -> None:
        """No more answers: the value is out."""
        self.control.disabled = self.button.disabled = True

    def _record(self) -> None:
        try:
            self._prediction.record(self._value())
        except (TypeError, ValueError) as problem:
            self.message.value = str(problem)
        else:
            self.message.value = self._prediction._status()

    def _value(self) -> float | str:
        if self._prediction.question.choices is not None:
            if self.control.value is None:
                raise ValueError("Choose one first.")
            return self.control.value
        try:
            return float(self.control.value.replace(",", "").replace("_", ""))
        except ValueError:
            raise ValueError(f"Not a number: {self.control.value!r}. Write it like 250 or 2.5e6.") from None


def _chapter_scores(chapter: str, entries: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for id, entry in entries.items():
        if id[:2] == chapter:
            score = {True: "right", False: "not so", None: "not answered"}[entry["correct"]]
            rows.append((entry["question"], entry["predicted"], entry["actual"], score))
    if not rows:
        known = sorted({id[:2] for id in entries})
        raise ValueError(f"no prediction of chapter {chapter!r} has been settled; chapters with some: {known}")
    return table(rows, ["question", "predicted", "actual", "score"])


def _entries() -> dict[str, dict[str, Any]]:
    if not widgets_run():
        return _settled_here
    path = record_path()
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"holds a {type(entries).__name__}, not an object")
    except ValueError as problem:
        raise ValueError(
            f"the record of predictions, {path}, cannot be read ({problem}); move it away to start anew"
        ) from None
    return entries


def _recorded_answer(question: Question) -> float | str | None:
    """What the reader answered to this very question in an earlier session."""
    entry = _entries().get(question.id)
    return entry["predicted"] if entry and entry["question"] == question.text else None


def _write(question: Question, **outcome: Any) -> None:
    entries = _entries()
    entries[question.id] = {"question": question.text, **outcome}
    if not widgets_run():
        return
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
    draft.replace(path)  # all or nothing: a kernel killed half-way leaves the old record


def _box(color: str, *paragraphs: str) -> str:
    body = "".join(f'<div style="margin:2px 0">{paragraph}</div>' for paragraph in paragraphs if paragraph)
    return f'<div style="border-left:4px solid {color};padding:4px 12px;margin:6px 0">{body}</div>'


def _python_value(value: Any) -> Any:
    """A one-element array or tensor, or a NumPy scalar, as the Python value it holds."""
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
