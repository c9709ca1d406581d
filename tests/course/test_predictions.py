"""Predictions: asked, recorded, settled, scored; with a reader and without."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashlib.course import predict, scoreboard
from flashlib.course.predictions import record_path

NUMBER = {"id": "01-score-bytes", "unit": "MB", "default": 100}
CHOICE = {"id": "03-loop-order", "choices": ["rows outside", "keys outside"], "default": "keys outside"}


def test_without_a_reader_the_default_stands_in_and_nothing_is_written(nobody, capsys):
    p = predict("How large?", **NUMBER)
    assert "Predict: How large?" in capsys.readouterr().out
    assert str(p).endswith("No reader in this run; the default answer stands in: 100 MB.")
    verdict = p.settle(604.2, because="N^2 entries.")
    assert str(verdict) == (
        "The default was 100 MB; it is 604 MB. Off by a factor of 6.04; a factor of 2 would have been right.\nN^2 entries."
    )
    assert verdict.correct is False
    assert not nobody.exists()


def test_output_without_a_reader_is_the_same_every_time(nobody):
    def output():
        p = predict("Which?", **CHOICE)
        return str(p), p._repr_html_(), str(p.settle("rows outside")), p.verdict._repr_html_(), p.widget

    assert output() == output()
    assert output()[-1] is None


@pytest.mark.parametrize(
    "predicted, actual, within, correct, says",
    [
        (100, 150, 2, True, "Right, within a factor of 2."),
        (100, 50, 2, True, "Right, within a factor of 2."),
        (100, 49, 2, False, "Off by a factor of 2.04; a factor of 2 would have been right."),
        (100, 100, 2, True, "Right."),
        (8, 9, 1, False, "Off by a factor of 1.12; only the value itself would have been right."),
        (8, 8, 1, True, "Right."),
        (0, 0, 2, True, "Right."),
        (1, 0, 2, False, "Not so."),
        (-4, 4, 2, False, "Not so."),
        (-4, -5, 2, True, "Right, within a factor of 2."),
    ],
)
def test_numbers_are_right_within_a_factor(nobody, predicted, actual, within, correct, says):
    verdict = predict("How many?", id="01-n", default=predicted, within=within).settle(actual)
    assert verdict.correct is correct
    assert str(verdict).endswith(says)


def test_choices_are_right_if_equal(nobody):
    assert predict("Which?", **CHOICE).settle("keys outside").correct is True
    verdict = predict("Which?", **CHOICE).settle("rows outside")
    assert verdict.correct is False
    assert str(verdict) == "The default was keys outside; it is rows outside. Not so."


@pytest.mark.parametrize("actual", [torch.tensor(90.0), np.float32(90), np.int64(90), torch.tensor([90]), 90])
def test_computed_values_come_as_they_are(nobody, actual):
    assert predict("How many?", **NUMBER).settle(actual).correct is True


def test_the_reader_answers_and_is_scored(reader):
    p = predict("How large?", **NUMBER)
    assert p.answer is None and str(p).endswith("Not answered yet.")
    p.widget.control.value = "1,200"
    p.widget.button.click()
    assert p.answer == 1200 and "1,200 MB" in p.widget.message.value
    p.widget.control.value = "500"  # changed before the answer is out: fine
    p.widget.button.click()
    verdict = p.settle(604.2)
    assert verdict.correct is True and "You predicted 500 MB; it is 604 MB." in str(verdict)
    assert p.widget.button.disabled and p.widget.control.disabled
    entry = json.loads((reader / "predictions.json").read_text())["01-score-bytes"]
    assert (entry["predicted"], entry["actual"], entry["correct"]) == (500, 604.2, True)


def test_a_choice_is_recorded(reader):
    p = predict("Which?", **CHOICE)
    assert p.widget.control.value is None
    p.widget.button.click()
    assert p.answer is None and p.widget.message.value == "Choose one first."
    p.widget.control.value = "rows outside"
    p.widget.button.click()
    assert p.settle("rows outside").correct is True


def test_an_answer_that_is_no_number_is_explained(reader):
    p = predict("How large?", **NUMBER)
    p.widget.control.value = "many"
    p.widget.button.click()
    assert p.answer is None and "Not a number: 'many'" in p.widget.message.value
    p.widget.control.value = "inf"
    p.widget.button.click()
    assert p.answer is None and "must be finite" in p.widget.message.value


def test_unanswered_is_neither_right_nor_wrong(reader):
    verdict = predict("How large?", **NUMBER).settle(604)
    assert verdict.correct is None
    assert str(verdict) == "No prediction recorded. It is 604 MB."
    assert "not answered" in str(scoreboard("01"))


def test_a_later_session_remembers_the_answer_to_the_same_question(reader):
    predict("How large?", **NUMBER).record(300)
    assert predict("How large?", **NUMBER).answer == 300
    assert predict("How large is it now?", **NUMBER).answer is None, "another question under the same id"


def test_settled_is_settled(reader):
    p = predict("How large?", **NUMBER)
    p.record(300)
    first = p.settle(604)
    assert p.settle(604) == first, "the same cell run again"
    with pytest.raises(RuntimeError, match="'01-score-bytes' is settled already, with 604 MB; now came 700 MB"):
        p.settle(700)
    with pytest.raises(RuntimeError, match="is settled; run the cell that asks it to answer again"):
        p.record(600)


def test_scoreboard_by_chapter(reader):
    assert "No prediction has been settled yet" in str(scoreboard())
    for id, answer, actual in [("01-a", 10, 10), ("01-b", 10, 1000), ("02-a", None, 5)]:
        p = predict("How many?", id=id, default=1)
        if answer is not None:
            p.record(answer)
        p.settle(actual)
    predict("Not settled", id="02-b", default=1).record(3)
    board = scoreboard()
    assert board.rows == (("01", "2", "2", "1"), ("02", "1", "0", "0"), ("all", "3", "2", "1"))
    assert [row[-1] for row in scoreboard("01").rows] == ["right", "not so"]
    with pytest.raises(ValueError, match=r"no prediction of chapter '07' .* \['01', '02'\]"):
        scoreboard("07")


def test_without_a_reader_the_scoreboard_is_this_session(nobody):
    predict("How many?", id="01-a", default=1).settle(1)
    assert scoreboard().rows[-1] == ("all", "1", "1", "1")


def test_an_unreadable_record_is_not_overwritten(reader):
    reader.mkdir()
    for content in ("{half", "[]"):
        record_path().write_text(content)
        with pytest.raises(ValueError, match=r"predictions\.json, cannot be read"):
            predict("How large?", **NUMBER)
        assert record_path().read_text() == content


def test_the_record_lies_in_the_users_data_directory(monkeypatch):
    monkeypatch.delenv("FLASHLIB_DATA", raising=False)
    assert record_path().is_absolute() and record_path().name == "predictions.json"
    monkeypatch.setenv("FLASHLIB_DATA", "/somewhere")
    assert record_path() == Path("/somewhere/predictions.json")


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"id": "score"}, ValueError, "id must look like '01-score-bytes'"),
        ({"id": 3}, ValueError, "id must look like"),
        ({"default": "many"}, TypeError, "default of '01-score-bytes' must be a number, got str: 'many'"),
        ({"default": True}, TypeError, "must be a number, got bool"),
        ({"default": float("nan")}, ValueError, "must be finite"),
        ({"within": 0.5}, ValueError, "within must be a factor of at least 1, got 0.5"),
        ({"choices": ["one"], "default": "one"}, ValueError, "at least two different answers"),
        (
            {"choices": ["a", "b"], "default": "c"},
            ValueError,
            r"default of '01-score-bytes' must be one of \['a', 'b'\], got 'c'",
        ),
        ({"choices": "ab", "default": "a"}, TypeError, "choices must be a sequence of strings"),
        ({"choices": [1, 2], "default": 1}, TypeError, "choices must be a sequence of strings"),
    ],
)
def test_bad_questions_are_refused(nobody, change, error, says):
    with pytest.raises(error, match=says):
        predict("How large?", **{**NUMBER, **change})


def test_an_empty_question_is_refused(nobody):
    with pytest.raises(ValueError, match="question must be a text"):
        predict(" ", **NUMBER)


@pytest.mark.parametrize(
    "kind, actual, error, says",
    [
        (NUMBER, "604", TypeError, "actual of '01-score-bytes' must be a number, got str"),
        (NUMBER, float("inf"), ValueError, "must be finite"),
        (NUMBER, None, TypeError, "got NoneType"),
        (CHOICE, "neither", ValueError, "actual of '03-loop-order' must be one of"),
        (CHOICE, 3, ValueError, "must be one of"),
    ],
)
def test_bad_values_are_refused(nobody, kind, actual, error, says):
    with pytest.raises(error, match=says):
        predict("?", **kind).settle(actual)


def test_html_is_escaped(nobody):
    p = predict("Is <b> & 1 < 2?", id="01-a", default=1)
    assert "&lt;b&gt; &amp; 1 &lt; 2" in p._repr_html_()
    assert "&lt;i&gt;" in p.settle(1, because="<i>")._repr_html_()
