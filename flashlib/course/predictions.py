"""Predict before you run: a question is asked, the answer recorded, and later settled by a value that was computed.

A result that you have guessed at first stays; one that you only read does not. So each measurement of the course has a
question before it:

    p = predict("01-largest-tensor")
    ...
    p.settle(meter.largest.bytes / 1e6)

What is asked, and why the answer is what it is, stands in `flashlib.course.questions`: in the notebook it would be read too early.

With a reader in front of it, `predict` shows a control and writes the answer to the reader's record, a JSON file in the
user's data directory (`FLASHLIB_DATA` names another). With nobody in front of it (`FLASHLIB_NONINTERACTIVE=1`, or no
notebook), it takes the default, says so, and writes nothing; what it prints is then the same in every run.

The first answer counts, and so does the first value that settles it. A cell that is changed and run again is an experiment, and what it
gives is shown beside them.
"""

from __future__ import annotations

import html
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlib.course.display import Table, format_number, show, table, widgets_run
from flashlib.course.questions import Question, question

_LATE_SECONDS = 2.0
_RIGHT, _WRONG, _NEUTRAL = "#009E73", "#D55E00", "#0072B2"
_settled_here: dict[str, dict[str, Any]] = {}  # what a session without a reader has settled; never written to disk
_drafts: dict[str, str] = {}  # what a reader has typed and not recorded: Shift+Enter in the box runs the cell that asks


@dataclass(frozen=True)
class Verdict:
    """A settled prediction. Prints as text, shows as HTML.

    Attributes:
        question: what was asked. predicted: the first answer, or None. by_default: nobody was there to ask.
        actual: the first value that settled it. because: the reason. now: the value of an experiment, or None.
    """

    question: Question
    predicted: float | str | None
    by_default: bool
    actual: float | str
    because: str
    now: float | str | None = None

    @property
    def correct(self) -> bool | None:
        """None if there was no prediction."""
        return None if self.predicted is None else self.question.judge(self.predicted, self.actual)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if self._withheld:
            return _box(_NEUTRAL, *map(html.escape, self._lines()))
        color = {True: _RIGHT, False: _WRONG, None: _NEUTRAL}[self.correct]
        first, *rest = map(html.escape, self._lines())
        return _box(color, f"<b>{first}</b>", *rest)

    @property
    def _withheld(self) -> bool:
        """Whether a reader is there who has not answered yet."""
        return self.predicted is None and widgets_run()

    def _lines(self) -> list[str]:
        if self._withheld:
            return ["Computed. Make your prediction in the cell that asks, and the answer appears there."]
        beside = ""
        if self.now is not None:
            beside = (
                f"In this run it is {self.question.show(self.now)}. Your first prediction and the first result stay."
            )
        return list(filter(None, [self._headline(), self.because, beside]))

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
        verdict: the `Verdict` once it is settled, or None.
        widget: the control shown to the reader, or None where there is no reader.
    """

    def __init__(self, asked: Question, *, interactive: bool) -> None:
        self.question = asked
        self.by_default = not interactive
        self.verdict: Verdict | None = None
        self.answer = asked.default
        if interactive:
            self._resume()
        self.widget = _AnswerControl(self) if interactive else None

    def _resume(self) -> None:
        """Go on where this cell, or an earlier session, left the very same question."""
        entry = _entries().get(self.question.id, {})
        same = entry.get("question") == self.question.text
        self.answer = entry["predicted"] if same else None
        if self.answer is not None and entry["actual"] is not None:
            self.verdict = Verdict(self.question, self.answer, False, entry["actual"], entry.get("because", ""))
        elif self.answer is None and self.question.id in _drafts:
            with suppress(ValueError):  # what is no number, the control refuses when it is to be recorded
                self.record(self.question.read(_drafts.pop(self.question.id)))

    def record(self, answer: float | str) -> None:
        """Take the reader's answer and write it to the record, as the control does.

        Raises:
            TypeError, ValueError: the answer is not of the question's kind.
            RuntimeError: it was answered and settled before; it is too late to change it.
        """
        if self.verdict is not None and self.verdict.predicted is not None:
            raise RuntimeError(f"{self.question.id!r} is settled, and the first answer counts")
        self.answer = self.question.validate(answer, "answer")
        self.by_default = False
        settled = self.verdict
        if settled is not None:  # computed before it was answered, and withheld until now
            self.verdict = Verdict(self.question, self.answer, False, settled.actual, settled.because)
        self._keep()

    def settle(self, actual: float | str, **figures: Any) -> Verdict:
        """Compare the prediction with `actual` and score it. Run again with another value, it shows that value beside the first.

        Args:
            actual: the value, computed or measured by the notebook; never typed in, so that a prediction, and the
                course, can be wrong. A number (Python, NumPy or a one-element tensor) or one of the choices.
            **figures: what the names in the question's reason stand for.

        Raises:
            TypeError, ValueError: `actual` is not of the question's kind.
        """
        actual = self.question.validate(_python_value(actual), "actual")
        if self.verdict is None:
            self.verdict = Verdict(self.question, self.answer, self.by_default, actual, self.question.because(figures))
            self._keep()
            if self.widget is not None:
                self.widget.refresh()
        first = self.verdict
        if first.actual == actual:
            return first
        return Verdict(first.question, first.predicted, first.by_default, first.actual, first.because, now=actual)

    def _keep(self) -> None:
        settled = {"actual": None, "correct": None}
        if self.verdict is not None:
            settled = {"actual": self.verdict.actual, "correct": self.verdict.correct, "because": self.verdict.because}
        _write(self.question, predicted=self.answer, **settled)

    def __str__(self) -> str:
        return f"Predict: {self.question.text}\n{self._status()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _asked(self.question, self._status())

    def _status(self) -> str:
        if self.by_default:
            stands_in = f"No reader in this run; the default answer stands in: {self.question.show(self.answer)}."
            return f"{_offered(self.question)}{stands_in}"
        if self.answer is None:
            return "Not answered yet."
        return f"Recorded: {self.question.show(self.answer)}. Now compute it: run the cells below."


def predict(id: str) -> Prediction:
    """Ask for a prediction, show the control for it, and return the `Prediction` to settle later.

    Args:
        id: of one of the questions in `flashlib.course.questions`.

    Raises:
        ValueError: there is no such question.
    """
    prediction = Prediction(question(id), interactive=widgets_run())
    show(prediction if prediction.widget is None else prediction.widget.box)
    return prediction


def as_asked(id: str) -> dict[str, str]:
    """What a question looks like before anybody runs it, by MIME type: the output that a chapter is handed out with."""
    asked = question(id)
    hint = f"{_offered(asked)}Run this cell to answer."
    return {"text/html": _asked(asked, hint), "text/plain": f"Predict: {asked.text}\n{hint}"}


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


def start_over(chapter: str) -> None:
    """Forget the answers to a chapter's questions (`"01"`), so that they can be given anew."""
    _save({id: entry for id, entry in _entries().items() if id[:2] != chapter})
    for id in [id for id in _drafts if id[:2] == chapter]:
        del _drafts[id]


def record_path() -> Path:
    """The reader's record: `predictions.json` in `FLASHLIB_DATA`, or else in the user's data directory."""
    import platformdirs

    return Path(os.environ.get("FLASHLIB_DATA") or platformdirs.user_data_dir("flashlib")) / "predictions.json"


class _AnswerControl:
    """The question, a box for a number or a button for each choice, and below it the one place where everything is answered."""

    def __init__(self, prediction: Prediction) -> None:
        import ipywidgets as widgets

        self._prediction, asked = prediction, prediction.question
        self._entered_at = float("-inf")
        self.message = widgets.HTML()
        if asked.choices is not None:
            self.buttons = {choice: _button(chr(ord("A") + i), choice) for i, choice in enumerate(asked.choices)}
            for choice, button in self.buttons.items():
                button.on_click(lambda _, choice=choice: self._record(choice))
            texts = [
                widgets.HTML(f'<div style="line-height:1.4;padding:5px 0">{html.escape(c)}</div>')
                for c in asked.choices
            ]
            pairs = zip(self.buttons.values(), texts, strict=True)
            row = widgets.VBox(
                [widgets.HBox([button, text], layout={"align_items": "flex-start"}) for button, text in pairs]
            )
        else:
            shown = "" if prediction.answer is None else f"{prediction.answer:g}"
            wide = {"width": "26em", "max_width": "100%"}
            style = {"description_width": "initial"}
            self.control = widgets.Text(
                shown, description="Your prediction", placeholder="a number", style=style, layout=wide
            )
            self.control.observe(self._typed, names="value")
            self.control.on_msg(lambda _, content, __: self._entered(content))
            self.buttons = {"": _button("Record", "Record this prediction", "auto")}
            self.buttons[""].on_click(lambda _: self._record_number())
            row = widgets.HBox(
                [self.control, widgets.Label(asked.unit), self.buttons[""]], layout={"flex_flow": "row wrap"}
            )
        self.box = widgets.VBox([widgets.HTML(_asked(asked)), row, self.message])
        self.refresh()

    def refresh(self) -> None:
        """Show where things stand. Once an answer is settled, there are no more answers: the value is out."""
        prediction = self._prediction
        answered = prediction.verdict is not None and prediction.answer is not None
        for choice, button in self.buttons.items():
            button.disabled = answered
            button.button_style = "primary" if choice in ("", prediction.answer) else ""
        if prediction.question.choices is None:
            self.control.disabled = answered
        if answered:
            self.message.value = prediction.verdict._repr_html_()
        elif prediction.answer is not None:
            self._say(prediction._status())

    def _say(self, text: str) -> None:
        self.message.value = f'<div role="status" style="line-height:1.4">{html.escape(text)}</div>'

    def _typed(self, change: dict[str, Any]) -> None:
        _drafts[self._prediction.question.id] = change["new"]
        if time.monotonic() - self._entered_at < _LATE_SECONDS:
            self._record_number()

    def _entered(self, content: dict[str, Any]) -> None:
        """Enter was pressed. It may overtake the last characters that were typed, while the kernel is busy with those before."""
        if content.get("event") == "submit":
            self._entered_at = time.monotonic()
            self._record_number()

    def _record_number(self) -> None:
        try:
            number = self._prediction.question.read(self.control.value)
        except ValueError as problem:
            self._say(str(problem))
        else:
            self._record(number)

    def _record(self, answer: float | str) -> None:
        _drafts.pop(self._prediction.question.id, None)
        try:
            self._prediction.record(answer)
        except (TypeError, ValueError, RuntimeError) as problem:
            self._say(str(problem))
        else:
            self.refresh()


def _button(text: str, tooltip: str, width: str = "3em"):
    import ipywidgets as widgets

    return widgets.Button(description=text, tooltip=tooltip, layout={"width": width, "flex": "0 0 auto"})


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
        return dict(_settled_here)
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


def _write(asked: Question, **outcome: Any) -> None:
    _save(_entries() | {asked.id: {"question": asked.text, **outcome}})


def _save(entries: dict[str, dict[str, Any]]) -> None:
    if not widgets_run():
        _settled_here.clear()
        _settled_here.update(entries)
        return
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
    draft.replace(path)  # all or nothing: a kernel killed half-way leaves the old record


def _offered(asked: Question) -> str:
    return f"Choices: {' · '.join(asked.choices)}. " if asked.choices else ""


def _asked(asked: Question, below: str = "") -> str:
    return _box(_NEUTRAL, f"<b>Predict:</b> {html.escape(asked.text)}", html.escape(below))


def _box(color: str, *paragraphs: str) -> str:
    body = "".join(f'<div style="margin:2px 0">{paragraph}</div>' for paragraph in paragraphs if paragraph)
    return f'<div style="border-left:4px solid {color};padding:4px 12px;margin:6px 0">{body}</div>'


def _python_value(value: Any) -> Any:
    """A one-element array or tensor, or a NumPy scalar, as the Python value it holds."""
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value
