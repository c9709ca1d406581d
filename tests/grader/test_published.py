"""What is published about the grader is what was recorded, and says what it says it does."""

import pytest

from flashlib.course.grader import contracts, rounds
from flashlib.course.grader.exercise import exercise_names, load_exercise
from flashlib.measure.records.record import load_record


@pytest.mark.parametrize("name", exercise_names())
def test_right_solutions_got_full_marks_in_every_round_and_in_little_time(name):
    record = load_record(name, rounds.FOLDER)
    files = [file.stem for file in rounds.right_files(load_exercise(name))]
    assert [row["solution"] for row in record.rows] == files and len(files) >= 3
    for row in record.rows:
        assert row["full_marks"] == row["rounds"] >= 20, row
        assert row["cpu_seconds_median"] <= rounds.SECONDS, row


def test_the_recorded_rounds_are_published():
    assert rounds.PAGE.read_text() == rounds.publish(), "run python -m flashlib.course.grader.rounds --publish"


def test_a_right_solution_that_fails_is_a_problem_and_is_recorded(tmp_path, monkeypatch, capsys):
    wrong = load_exercise("ex14").file
    (tmp_path / wrong).write_text("def visible_pairs(q_len, kv_len, left, right):\n    return 0\n")
    monkeypatch.setattr(rounds, "right_files", lambda exercise: [tmp_path / wrong])
    monkeypatch.setattr(rounds, "FOLDER", tmp_path)
    monkeypatch.setattr(rounds, "PAGE", tmp_path / "page.md")
    rounds.PAGE.write_text(f"before\n{rounds.BEGIN}\n{rounds.END}\nafter\n")
    assert rounds.main(["ex14", "--rounds", "2"]) == 1
    assert "seed" in capsys.readouterr().err
    assert "| ex14 | 1 | 2 | 0 of 2 |" in rounds.PAGE.read_text()
    assert load_record("ex14", tmp_path).rows[0]["full_marks"] == 0


def test_every_sentence_is_in_the_table_with_a_check_or_a_reason():
    """That each check rejects what it is said to, the kill matrix tests."""
    table = contracts.read_table(contracts.TABLE.read_text())
    assert contracts.as_markdown(table) == contracts.TABLE.read_text()
    assert list(table) == exercise_names()
    for name, promises in table.items():
        assert [(one.place, one.says) for one in promises] == contracts.promised(name)
        assert all(one.wrong for one in promises), name
    held = sum(bool(one.checks) for promises in table.values() for one in promises)
    assert held > 0.7 * sum(map(len, table.values()))


def test_a_sentence_that_nobody_checks_and_a_check_that_rejects_nothing_are_noticed(sandbox_of, monkeypatch, tmp_path):
    from flashlib.course.grader.matrix import WRONG, Row, grade_file

    exercise = load_exercise("ex14")
    file = WRONG / "ex14/top_left.py"
    graded = [Row("top_left", ("top-left",), grade_file(exercise, file, sandbox_of(exercise)))]
    sentence = contracts.promised("ex14")[0]
    monkeypatch.setattr(contracts, "TABLE", tmp_path / "table.md")

    def problems_with(*promises):
        contracts.TABLE.write_text(contracts.as_markdown({"ex14": list(promises)}))
        return [each for each in contracts.problems("ex14", graded) if not each.startswith("not in the table")]

    assert problems_with(contracts.Promise(*sentence, ("pairs-of-a-band",), ("top_left",))) == []
    assert problems_with(contracts.Promise(*sentence, (), ("told",))) == []
    for checks, wrong, said in (
        (("bytes-of-a-decoding-step",), ("top_left",), "passes"),
        (("pairs-of-a-band", "bytes-of-a-decoding-step"), ("top_left",), "rejects none"),
        (("no-such-check",), ("top_left",), "there is no check"),
        (("pairs-of-a-band",), ("nothing_like_it",), "there is no wrong solution"),
        ((), ("because",), "no reason"),
        ((), (), "no reason"),
    ):
        assert any(said in each for each in problems_with(contracts.Promise(*sentence, checks, wrong))), said
    contracts.TABLE.write_text("")
    assert len(contracts.problems("ex14", graded)) == len(contracts.promised("ex14"))


def test_sentences_end_where_a_reader_would_say_so():
    text = """First, of 0 .. G - 1. Second (in brackets.) Third?

    Args:
        x: the value, e.g. 1.5. Not NaN.

    Returns:
        It. -inf is a number.
    """
    assert contracts.sentences(text)[:3] == ["First, of 0 .. G - 1.", "Second (in brackets.)", "Third?"]
    assert contracts.sentences(text)[-2:] == ["It.", "-inf is a number."]
