"""Predictions: asked, recorded, settled, experimented with, scored; with a reader and without."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashlib.course import predict, predictions, scoreboard
from flashlib.course.predictions import record_path, start_over
from flashlib.course.questions import Question, question, questions_of

NUMBER = Question("01-score-bytes", "How large?", 100, unit="MB", reason="N^2 entries.")
CHOICE = Question("03-order", "Which?", "keys outside", choices=("rows outside", "keys outside"))
KNOWN = {NUMBER.id: NUMBER, CHOICE.id: CHOICE}


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Questions of these tests, beside the real ones, which nobody asks here."""
    known = dict(KNOWN)
    monkeypatch.setattr(predictions, "question", lambda id: known[id])
    monkeypatch.setattr(predictions, "_drafts", {})
    return known


def test_without_a_reader_the_default_stands_in_and_nothing_is_written(nobody, capsys):
    p = predict(NUMBER.id)
    assert "Predict: How large?" in capsys.readouterr().out
    assert str(p).endswith("No reader in this run; the default answer stands in: 100 MB.")
    verdict = p.settle(604.2)
    assert str(verdict) == (
        "The default was 100 MB; it is 604 MB. Off by a factor of 6.04; a factor of 2 would have been right.\nN^2 entries."
    )
    assert verdict.correct is False
    assert not nobody.exists()


def test_output_without_a_reader_is_the_same_every_time(nobody):
    def output():
        p = predict(CHOICE.id)
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
def test_numbers_are_right_within_a_factor(nobody, asked, predicted, actual, within, correct, says):
    asked["01-n"] = Question("01-n", "How many?", predicted, within=within)
    verdict = predict("01-n").settle(actual)
    assert verdict.correct is correct
    assert str(verdict).endswith(says)


def test_choices_are_right_if_equal(nobody):
    assert predict(CHOICE.id).settle("keys outside").correct is True
    verdict = predict(CHOICE.id).settle("rows outside")
    assert verdict.correct is False
    assert str(verdict) == "The default was keys outside; it is rows outside. Not so."


@pytest.mark.parametrize("actual", [torch.tensor(90.0), np.float32(90), np.int64(90), torch.tensor([90]), 90])
def test_computed_values_come_as_they_are(nobody, actual):
    assert predict(NUMBER.id).settle(actual).correct is True


def test_the_reader_answers_and_is_scored(reader):
    p = predict(NUMBER.id)
    assert p.answer is None and str(p).endswith("Not answered yet.")
    p.widget.control.value = "1,200"
    p.widget.buttons[""].click()
    assert p.answer == 1200 and "1,200 MB" in p.widget.message.value
    p.widget.control.value = "0.5 GB"  # changed before the answer is out: fine
    p.widget.buttons[""].click()
    verdict = p.settle(604.2)
    assert verdict.correct is True and "You predicted 500 MB; it is 604 MB." in str(verdict)
    assert p.widget.buttons[""].disabled and p.widget.control.disabled
    assert "it is 604 MB" in p.widget.message.value, "one place says where things stand"
    entry = json.loads((reader / "predictions.json").read_text())[NUMBER.id]
    assert (entry["predicted"], entry["actual"], entry["correct"]) == (500, 604.2, True)


def test_a_choice_is_recorded_by_one_click(reader):
    p = predict(CHOICE.id)
    assert [button.description for button in p.widget.buttons.values()] == ["A", "B"]
    p.widget.buttons["rows outside"].click()
    assert p.answer == "rows outside"
    p.widget.buttons["keys outside"].click()
    p.widget.buttons["rows outside"].click()
    assert p.settle("rows outside").correct is True


@pytest.mark.parametrize(
    "written, says",
    [
        ("many", "Not a number: &#x27;many&#x27;"),
        ("", "Not a number"),
        ("1e999", "must be finite"),
        ("1,5", "two ways"),
        ("12 ms", "&#x27;ms&#x27; is not understood here. Write the number in MB"),
    ],
)
def test_an_answer_that_is_not_understood_is_explained(reader, written, says):
    p = predict(NUMBER.id)
    p.widget.control.value = written
    p.widget.buttons[""].click()
    assert p.answer is None and says in p.widget.message.value


@pytest.mark.parametrize(
    "unit, written, number",
    [
        ("MB", "151 MB", 151),
        ("MB", "0.151 GB", 151),
        ("MB", "151", 151),
        ("GiB", "16384 MiB", 16),
        ("%", "40 percent", 40),
        ("%", "40%", 40),
        ("", "12,000", 12000),
        ("", "12k", 12000),
        ("", "3 x", 3),
        ("", "1.5e3 tokens", 1500),
        ("", "~2_000", 2000),
        ("ms", "2 s", 2000),
    ],
)
def test_units_are_understood(unit, written, number):
    assert Question("01-n", "How many tokens?", 1, unit=unit).read(written) == pytest.approx(number)


def test_shift_enter_in_the_box_keeps_what_was_typed(reader):
    predict(NUMBER.id).widget.control.value = "300"  # and then the cell that asks is run again
    p = predict(NUMBER.id)
    assert p.answer == 300 and "Recorded: 300 MB" in p.widget.message.value
    p.widget.control.value = "400"
    assert predict(NUMBER.id).answer == 300, "what was recorded stays until another answer is recorded"


def test_nothing_is_told_before_it_is_predicted(reader):
    p = predict(NUMBER.id)
    verdict = p.settle(604.2)
    for shown in (str(verdict), verdict._repr_html_(), p.widget.message.value):
        assert "604" not in shown and "N^2" not in shown
    assert "not answered" in str(scoreboard("01"))
    p.widget.control.value = "500"
    p.widget.buttons[""].click()
    assert "You predicted 500 MB; it is 604 MB." in p.widget.message.value and "N^2" in p.widget.message.value
    assert scoreboard("01").rows[0][-1] == "right"
    assert "You predicted 500 MB" in str(p.settle(604.2))


def test_a_later_session_goes_on_where_the_earlier_ended(reader, asked):
    predict(NUMBER.id).record(300)
    p = predict(NUMBER.id)
    assert p.answer == 300 and p.verdict is None
    p.settle(604)
    later = predict(NUMBER.id)
    assert later.widget.control.disabled and "it is 604 MB" in later.widget.message.value
    with pytest.raises(RuntimeError, match="the first answer counts"):
        later.record(600)
    start_over("01")
    assert predict(NUMBER.id).answer is None
    predict(NUMBER.id).record(300)
    asked[NUMBER.id] = replace(NUMBER, text="How large is it now?")
    assert predict(NUMBER.id).answer is None, "another question under the same id"


def test_an_experiment_stands_beside_the_first_result(reader):
    p = predict(NUMBER.id)
    p.record(300)
    first = p.settle(604)
    assert p.settle(604) == first, "the same cell run again"
    other = str(p.settle(700))
    assert "it is 604 MB" in other and "In this run it is 700 MB" in other
    assert p.settle(604) == first and p.verdict == first
    assert json.loads((reader / "predictions.json").read_text())[NUMBER.id]["actual"] == 604
    with pytest.raises(RuntimeError, match="the first answer counts"):
        p.record(600)


def test_a_reason_takes_its_figures_from_the_cell(nobody, asked):
    asked["01-n"] = Question("01-n", "How many?", 1, reason="{programs:,} programs fit.")
    assert str(predict("01-n").settle(1, programs=1280)).endswith("1,280 programs fit.")


def test_scoreboard_by_chapter(reader, asked):
    assert "No prediction has been settled yet" in str(scoreboard())
    for id, answer, actual in [("01-a", 10, 10), ("01-b", 10, 1000), ("02-a", None, 5)]:
        asked[id] = Question(id, "How many?", 1)
        p = predict(id)
        if answer is not None:
            p.record(answer)
        p.settle(actual)
    asked["02-b"] = Question("02-b", "Not settled", 1)
    predict("02-b").record(3)
    board = scoreboard()
    assert board.rows == (("01", "2", "2", "1"), ("02", "1", "0", "0"), ("all", "3", "2", "1"))
    assert [row[-1] for row in scoreboard("01").rows] == ["right", "not so"]
    with pytest.raises(ValueError, match=r"no prediction of chapter '07' .* \['01', '02'\]"):
        scoreboard("07")


def test_without_a_reader_the_scoreboard_is_this_session(nobody):
    predict(NUMBER.id).settle(100)
    assert scoreboard().rows[-1] == ("all", "1", "1", "1")


def test_an_unreadable_record_is_not_overwritten(reader):
    reader.mkdir()
    for content in ("{half", "[]"):
        record_path().write_text(content)
        with pytest.raises(ValueError, match=r"predictions\.json, cannot be read"):
            predict(NUMBER.id)
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
        ({"text": " "}, ValueError, "text must ask something"),
        ({"default": "many"}, TypeError, "default of '01-score-bytes' must be a number, got str: 'many'"),
        ({"default": True}, TypeError, "must be a number, got bool"),
        ({"default": float("nan")}, ValueError, "must be finite"),
        ({"within": 0.5}, ValueError, "within must be a factor of at least 1, got 0.5"),
        ({"choices": ("one",), "default": "one"}, ValueError, "at least two different answers"),
        (
            {"choices": ("a", "b"), "default": "c"},
            ValueError,
            r"default of '01-score-bytes' must be one of \['a', 'b'\], got 'c'",
        ),
        ({"choices": "ab", "default": "a"}, TypeError, "choices must be a tuple of strings"),
        ({"choices": (1, 2), "default": 1}, TypeError, "choices must be a tuple of strings"),
    ],
)
def test_bad_questions_are_refused(change, error, says):
    with pytest.raises(error, match=says):
        replace(NUMBER, **change)


def test_an_unknown_question_is_named():
    with pytest.raises(ValueError, match=r"no question '01-nothing'; chapter 01 asks \['01-last-token'"):
        question("01-nothing")
    with pytest.raises(ValueError, match="chapter '77' asks nothing"):
        question("77-nothing")
    assert questions_of("77") == {} and next(iter(questions_of("02"))) == "02-exp-overflow"


@pytest.mark.parametrize(
    "kind, actual, error, says",
    [
        (NUMBER, "604", TypeError, "actual of '01-score-bytes' must be a number, got str"),
        (NUMBER, float("inf"), ValueError, "must be finite"),
        (NUMBER, None, TypeError, "got NoneType"),
        (CHOICE, "neither", ValueError, "actual of '03-order' must be one of"),
        (CHOICE, 3, ValueError, "must be one of"),
    ],
)
def test_bad_values_are_refused(nobody, kind, actual, error, says):
    with pytest.raises(error, match=says):
        predict(kind.id).settle(actual)


def test_html_is_escaped(nobody, asked):
    asked["01-a"] = Question("01-a", "Is <b> & 1 < 2?", 1, reason="<i>")
    p = predict("01-a")
    assert "&lt;b&gt; &amp; 1 &lt; 2" in p._repr_html_()
    assert "&lt;i&gt;" in p.settle(1)._repr_html_()
