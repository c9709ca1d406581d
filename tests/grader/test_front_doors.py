"""`check` in a notebook, `flashlib grade` in a shell: what a learner and an instructor type first."""

import csv
import json
import re
from html import escape

import pytest
import typer
from typer.testing import CliRunner

from flashlib.course import check
from flashlib.course.grader.cli import grade as grade_command
from flashlib.course.grader.front_door import find
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.course.grader.submissions import read_submission

SOLUTION = REPOSITORY / "solutions/ex01_softmax.py"
WRONG = REPOSITORY / "tests/grader/wrong/ex01"

app = typer.Typer()
app.command()(grade_command)


@pytest.fixture
def shell(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_check_finds_the_exercise_above_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "exercises").mkdir()
    (tmp_path / "notebooks/deeper").mkdir(parents=True)
    (tmp_path / "exercises/ex01_softmax.py").write_bytes(SOLUTION.read_bytes())
    monkeypatch.chdir(tmp_path / "notebooks/deeper")
    assert find("ex01_softmax.py") == tmp_path / "exercises/ex01_softmax.py"
    assert check("ex01").passed
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="file="):
        check("ex01")


def test_hints_escalate_and_a_seed_replays():
    first = check("ex01", file=WRONG / "no_max_subtraction.py", hints=0)
    assert "hint" not in str(first).replace("--hints", "").replace("hints=", "").replace("More hints", "")
    second = check("ex01", file=WRONG / "no_max_subtraction.py", hints=2, seed=first.seed)
    assert "hint 1/2" in str(second) and "hint 2/2" in str(second)
    assert [r.finding and r.finding.got for r in first.results] == [r.finding and r.finding.got for r in second.results]
    assert f"--seed {first.seed}" in str(first)


@pytest.mark.parametrize("file", [SOLUTION, REPOSITORY / "exercises/ex01_softmax.py"], ids=["solved", "not begun"])
def test_output_that_depends_on_nothing_does_not_change_between_runs(monkeypatch, file):
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    first, second = check("ex01", file=file), check("ex01", file=file)
    assert str(first) == str(second) and first._repr_html_() == second._repr_html_()
    assert "seed" not in str(first)
    monkeypatch.delenv("FLASHLIB_NONINTERACTIVE")
    assert f"--seed {first.seed}" in str(first)


def test_functions_written_in_a_notebook():
    def my_softmax(x):
        m = x.double().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = torch.exp(x.double() - m)  # noqa: F821
        total = weights.sum(-1, keepdim=True)
        return (weights / torch.where(total == 0, 1.0, total)).to(x.dtype)  # noqa: F821

    report = check("ex01", functions={"softmax": my_softmax})
    earned = {result.name for result in report.results if result.passed}
    assert earned == {result.name for result in report.results if result.name.startswith("softmax")}
    with pytest.raises(ValueError, match="no source"):
        check("ex01", functions={"softmax": len})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exercise": "ex77"}, "there is no exercise 'ex77'"),
        ({"exercise": "ex01", "file": "/nowhere.py"}, "there is no file"),
        ({"exercise": "ex01", "hints": -1}, "hints must be 0 or more"),
        ({"exercise": "ex01", "file": "x.py", "functions": {}}, "not both"),
    ],
)
def test_wrong_use_of_check(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(**arguments)


def test_html_shows_the_same_as_the_text():
    report = check("ex01", file=WRONG / "causal_top_left.py")
    html = report._repr_html_()
    for result in report.results:
        assert escape(result.title) in html
    assert "causal-top-left" in html and "Hint 1 of 2" in html and f"--seed {report.seed}" in html


def test_grade_command_exit_status(shell):
    solved = shell("ex01", "--file", SOLUTION)
    assert solved.exit_code == 0 and "22 of 22 points" in solved.output
    wrong = shell("ex01", "--file", WRONG / "missing_scale.py", "--seed", 7, "--hints", 2)
    assert wrong.exit_code == 1 and "missing-scale" in wrong.output and "--seed 7" in wrong.output
    for arguments in (
        ["ex77"],
        [],
        ["ex01", "--submissions", "/tmp"],
        ["--submissions", "/nowhere"],
        ["ex01", "--file", "/no"],
    ):
        assert shell(*arguments).exit_code == 2, arguments


def test_grade_command_grades_a_class(shell, tmp_path):
    class_folder = tmp_path / "class"
    (class_folder / "Ada Lovelace").mkdir(parents=True)
    (class_folder / "Ada Lovelace/ex01_softmax.py").write_bytes(SOLUTION.read_bytes())
    (class_folder / "bob/homework").mkdir(parents=True)
    (class_folder / "bob/homework/ex01_my_try.py").write_bytes((WRONG / "scaled_by_d.py").read_bytes())
    (class_folder / "carol_ex01_softmax.py").write_bytes(SOLUTION.read_bytes())
    outcome = shell(
        "--submissions", class_folder, "--exercise", "ex01", "--out", tmp_path / "out/grades.csv", "--jobs", 2
    )
    assert outcome.exit_code == 0, outcome.output
    with (tmp_path / "out/grades.csv").open() as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert rows["Ada Lovelace"]["ex01"] == rows["carol"]["ex01"] == rows["bob"]["points"] == "22"
    assert rows["bob"]["diagnoses"] == "scaled-by-d" and int(rows["bob"]["total"]) < 22
    page = (tmp_path / "out/grades_feedback/bob/feedback.html").read_text()
    assert "scaled-by-d" in page and re.search(r"bob: \d+ of 22 points", page)
    results = json.loads((tmp_path / "out/grades_feedback/bob/results.json").read_text())
    assert results["score"] == int(rows["bob"]["total"]) and len(results["tests"]) == 15
    assert "Landlock" in outcome.output
    for name in ("Ada Lovelace", "bob", "carol"):
        assert name in outcome.output


def test_reading_never_follows_a_link(tmp_path):
    (tmp_path / "link.py").symlink_to(SOLUTION)
    assert read_submission("me", tmp_path / "link.py").problem.diagnosis == "not-a-file"
