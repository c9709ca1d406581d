"""What an instructor needs of a class: a table, weights and deadlines, a report, who is alike, and autograders elsewhere."""

import csv
import json
import re
import secrets
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from flashlib.course.grader import classroom
from flashlib.course.grader.autograder import build, failed, grade_folder, main, problems_of
from flashlib.course.grader.classroom import Graded
from flashlib.course.grader.cli import grade as grade_command
from flashlib.course.grader.engine import Submission
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.findings import Finding, Result
from flashlib.course.grader.gradebook import class_report, write_results
from flashlib.course.grader.policy import DAY, Policy, read_policy
from flashlib.course.grader.report import Report, as_gradescope
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.course.grader.scan import suspicious
from flashlib.course.grader.similarity import alike
from flashlib.course.grader.submissions import Student

GOOD = (REPOSITORY / "solutions/ex01_softmax.py").read_bytes()
STUB = (REPOSITORY / "exercises/ex01_softmax.py").read_bytes()
RIGHT = REPOSITORY / "tests/grader/right"


def report_for(exercise, student: str, failing: int = 0, diagnosis: str = "no-max", own_word: bool = False) -> Report:
    results = tuple(
        Result(each.name, each.title, each.points, Finding(diagnosis, "says") if at < failing else None, own_word)
        for at, each in enumerate(exercise.properties)
    )
    return Report(exercise.name, exercise.title, student, results, 1, 1.25)


def graded(name: str, exercises, failing: int = 0, source: bytes = GOOD, time: float = 0.0, late=False, **options):
    submissions = {each.name: Submission(name, source, time=time, late=late) for each in exercises}
    reports = tuple(report_for(each, name, failing, **options) for each in exercises)
    return Graded(Student(name, name, submissions, listed={"id": "7"}), reports)


@pytest.fixture(scope="module")
def exercises():
    return [load_exercise("ex01"), load_exercise("ex02")]


def rows_of(table):
    with table.open(encoding="utf-8-sig", newline="") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


# --------------------------------------------------------------------------------------------------------------- table


def test_the_table_says_what_each_check_gave_and_how_each_exercise_went(tmp_path, exercises):
    class_ = [
        graded("Zoë 日本", exercises),
        graded("partial", exercises, 3),
        graded("nothing", exercises, 99),
        graded("absent", exercises, 99, diagnosis="missing-file"),
        graded("not begun", exercises, 99, diagnosis="not-implemented"),
        graded("odd", exercises, 1, diagnosis="grader-error"),
        graded("=1+1", exercises, 1, diagnosis="=cmd()"),
    ]
    assert write_results(class_, exercises, tmp_path / "grades.csv", tmp_path / "feedback") == []
    data = (tmp_path / "grades.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf") and "Zoë 日本".encode() in data
    rows = rows_of(tmp_path / "grades.csv")
    statuses = [row["ex01 status"] for row in rows.values()]
    assert statuses == [
        "full marks",
        "partial",
        "nothing right",
        "not handed in",
        "not begun",
        "to be looked at",
        "partial",
    ]
    for prop in exercises[0].properties:
        assert rows["Zoë 日本"][f"ex01: {prop.name} ({prop.points})"] == str(prop.points)
    first = exercises[0].properties[0]
    assert rows["partial"][f"ex01: {first.name} ({first.points})"] == "0"
    assert rows["partial"]["ex02 seconds"] == "1.25" and rows["partial"]["roster: id"] == "7"
    assert "look at it" in rows["odd"]["notes"] and rows["'=1+1"]["diagnoses"] == "'=cmd()"
    assert not list(tmp_path.glob("*.partial"))


def test_points_on_a_process_own_word_are_told_beside_what_its_source_reaches_for(tmp_path, exercises):
    reaching = b"import gc\nimport torch\nx = gc.get_objects()\n" + GOOD
    class_ = [
        graded("plain", exercises, own_word=True),
        graded("reaching", exercises, own_word=True, source=reaching),
        graded("verified", exercises, source=reaching),
    ]
    write_results(class_, exercises, tmp_path / "grades.csv", tmp_path / "feedback")
    rows = rows_of(tmp_path / "grades.csv")
    assert [row["unverified points"] for row in rows.values()] == [str(class_[0].points), str(class_[0].points), "0"]
    assert "line 1: import gc" in rows["reaching"]["notes"]
    assert not rows["plain"]["notes"] and not rows["verified"]["notes"]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import gc", "import gc"),
        ("from ctypes import CDLL", "from ctypes"),
        ("import torch\ntorch.library.Library._destroy", "_destroy"),
        ("f = lambda: 0\nf.__globals__", "__globals__"),
        ("getattr(x, name)", "getattr"),
        ("getattr(x, '__code__')", "getattr"),
        ("import sys\nsys._getframe()", "_getframe"),
        ("exec('1')", "exec"),
        ("import torch\ntorch.softmax = None", "torch.softmax = ..."),
        ("import numpy as np", "import numpy"),
        ("import torch\ntorch._refs.softmax", "_refs"),
        ("from torch._C import _nn", "_C"),
    ],
)
def test_the_scan_sees_what_reaches_into_the_process(code, found):
    assert any(found in line for line in suspicious(code.encode())), suspicious(code.encode())


def test_the_scan_leaves_right_solutions_alone_and_reads_anything():
    for file in [*RIGHT.rglob("*.py"), *(REPOSITORY / "solutions").glob("*.py")]:
        assert suspicious(file.read_bytes()) == [], file
    for source in (b"\xff\xfe", b"(" * 5000, b"x = 1\0", b"def f(:", b""):
        assert suspicious(source) == []


# -------------------------------------------------------------------------------------------------------------- policy

POLICY = """
exercises:
  ex01: {weight: 1, due: 2024-01-10 12:00}
  ex02: {weight: 3, due: "2024-01-10T12:00:00+00:00"}
late: {grace_hours: 2, per_day: 0.1, at_most: 0.35}
extensions:
  ann: {ex01: 2024-01-20 12:00}
overrides:
  bob: {ex01: {points: 5, why: "=spoke to him"}}
"""


def write_policy(folder, text=POLICY):
    (folder / "policy.yaml").write_text(text)
    return folder / "policy.yaml"


@pytest.mark.parametrize(
    ("hours", "share"), [(-1, 1.0), (0, 1.0), (1.9, 1.0), (2.1, 0.9), (25, 0.9), (26.5, 0.8), (51, 0.7), (1000, 0.65)]
)
def test_lateness_costs_what_the_policy_says(tmp_path, exercises, hours, share):
    policy = read_policy(write_policy(tmp_path))
    one = graded("carl", exercises, time=policy.due["ex02"] + 3600 * hours)
    mark = policy.mark("carl", one.who.submissions["ex02"], one.reports[1])
    assert mark.points == pytest.approx(one.reports[1].points * share)
    assert (mark.note == "") == (share == 1.0)


def test_extensions_overrides_and_late_marks(tmp_path, exercises):
    policy = read_policy(write_policy(tmp_path))
    late = policy.due["ex01"] + 5 * DAY
    ann, bob, dan = (graded(name, exercises, time=late) for name in ("ann", "bob", "dan"))
    assert policy.mark("ann", ann.who.submissions["ex01"], ann.reports[0]).penalty == 0
    assert policy.mark("ann", ann.who.submissions["ex02"], ann.reports[1]).penalty > 0
    assert policy.mark("bob", bob.who.submissions["ex01"], bob.reports[0]).points == 5
    assert policy.mark("dan", dan.who.submissions["ex01"], dan.reports[0]).penalty == pytest.approx(0.35)
    marked = graded("eve", exercises, late=True)
    assert policy.mark("eve", marked.who.submissions["ex01"], marked.reports[0]).penalty == pytest.approx(0.1)
    assert Policy().mark("eve", marked.who.submissions["ex01"], marked.reports[0]).penalty == 0


def test_weights_make_the_percentage(tmp_path, exercises):
    policy = read_policy(write_policy(tmp_path))
    one = graded("carl", exercises)
    marks = [
        replace(policy.mark("carl", one.who.submissions[r.exercise], r), points=p)
        for r, p in zip(one.reports, (0, 40), strict=True)
    ]
    assert policy.percent(marks, one.reports) == pytest.approx(100 * 3 / 4 * 40 / one.reports[1].points)
    by_points = Policy().percent([replace(mark, points=10) for mark in marks], one.reports)
    assert by_points == pytest.approx(100 * 20 / one.points)


def test_a_table_with_a_policy_shows_it(tmp_path, exercises):
    policy = read_policy(write_policy(tmp_path))
    write_results(
        [graded("bob", exercises), graded("zoe", exercises)], exercises, tmp_path / "g.csv", tmp_path / "f", policy
    )
    rows = rows_of(tmp_path / "g.csv")
    assert rows["bob"]["ex01 counts"] == "5.0" and rows["zoe"]["percent"] == "100.0"
    assert "given by hand" in rows["bob"]["notes"] and float(rows["bob"]["percent"]) < 100


@pytest.mark.parametrize(
    "text",
    [
        "exercises: {ex77: {weight: 1}}",
        "exercises: {ex01: {wieght: 1}}",
        "exercises: {ex01: {weight: -1}}",
        "exercises: {ex01: {weight: yes}}",
        "exercises: {ex01: {due: soon}}",
        "late: {per_day: 2}",
        "late: 5",
        "overrides: {ann: {ex01: {why: x}}}",
        "overrides: {ann: {ex01: 5}}",
        "extensions: {ann: {ex01: 5}}",
        "penalties: {}",
        "- a list",
        "{",
        "!!python/object/apply:os.system ['true']",
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(tmp_path, text):
    with pytest.raises(ValueError):
        read_policy(write_policy(tmp_path, text))


# ------------------------------------------------------------------------------------------------- report and likeness


def test_the_report_on_a_class_shows_scores_failures_mistakes_and_who_is_alike(exercises):
    class_ = [graded(f"s{at}", exercises, failing=at, diagnosis="<b>bold</b>") for at in range(8)]
    page = class_report(class_, exercises, Policy())
    assert "<script" not in page and "<b>bold" not in page and "&lt;b&gt;bold" in page
    for exercise in exercises:
        assert exercise.title in page and exercise.properties[0].title.replace("'", "&#39;") in page
    assert "8 students" in page and page.count("<rect") == 10
    assert re.search(r"<td>s0</td><td>s1</td><td>100 %</td>", page)
    assert class_report([], exercises, Policy())


def renamed(source: bytes) -> bytes:
    return re.sub(rb"\b(scores|weights|total|m|x)\b", rb"my_\1", source) + b"\n# my own work\n"


def test_copies_are_alike_and_work_of_ones_own_is_not():
    for name in ("ex01", "ex03", "ex05", "ex10"):
        exercise = load_exercise(name)
        given = (REPOSITORY / "exercises" / exercise.file).read_bytes()
        solution = (REPOSITORY / "solutions" / exercise.file).read_bytes()
        own = {file.stem: file.read_bytes() for file in (RIGHT / name).glob("*.py")}
        pairs = alike(
            {**own, "copied": renamed(solution), "original": solution, "broken": b"def (", "empty": given}, given
        )
        assert [(pair.first, pair.second) for pair in pairs] == [("copied", "original")], pairs


# --------------------------------------------------------------------------------------------- grading one student anew

app = typer.Typer()
app.command()(grade_command)


def in_shell(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_student_is_graded_anew_and_marks_by_hand_are_kept(tmp_path, monkeypatch):
    calls = []

    def quick(exercise, submission, sandbox, *, seed, hints, results):
        calls.append((submission.student, seed))
        return report_for(exercise, submission.student, failing=len(calls) % 3)

    monkeypatch.setattr(classroom, "grade", quick)
    monkeypatch.setattr(classroom, "_insist_on_fences", lambda *args: None)
    for name in ("ann", "bob", "carl"):
        (tmp_path / "class" / name).mkdir(parents=True)
        (tmp_path / "class" / name / "ex01_softmax.py").write_bytes(GOOD)
    policy = write_policy(tmp_path, "overrides: {bob: {ex01: {points: 3, why: spoken}}}")
    arguments = (
        "--submissions",
        tmp_path / "class",
        "--exercise",
        "ex01",
        "--out",
        tmp_path / "g.csv",
        "--policy",
        policy,
    )
    assert in_shell(*arguments).exit_code == 0
    before = rows_of(tmp_path / "g.csv")
    calls.clear()
    assert in_shell(*arguments, "--regrade", "ann", "--regrade", "bob").exit_code == 0
    after = rows_of(tmp_path / "g.csv")
    assert sorted(name for name, _ in calls) == ["ann", "bob"] and len({seed for _, seed in calls}) == 1
    assert after["carl"] == before["carl"] and after["bob"]["ex01 counts"] == "3.0"
    nobody = in_shell(*arguments, "--regrade", "dora")
    assert nobody.exit_code == 2 and "dora" in nobody.output


# ---------------------------------------------------------------------------------------------------------- Gradescope


def test_results_hold_to_the_published_fields(exercises):
    for failing, diagnosis in ((0, ""), (3, "no-max"), (99, "\x1b=\ud800")):
        reports = [report_for(each, "me", failing, diagnosis) for each in exercises]
        results = as_gradescope(reports)
        assert problems_of(results) == [] and json.dumps(results, allow_nan=False)
        assert results["score"] == sum(report.earned for report in reports)
    assert problems_of(failed(RuntimeError("\ud800"))) == []
    for broken, what in (
        ({"scores": 1}, "not a field"),
        ({"score": "1"}, "score is str"),
        ({"tests": [{"status": "ok"}]}, "status"),
        ({"score": 1, "visibility": "shown"}, "visibility"),
        ({"score": True}, "score is bool"),
        ({}, "neither"),
        ([], "not an object"),
    ):
        assert any(what in problem for problem in problems_of(broken)), broken


def test_the_zip_holds_what_an_autograder_needs(tmp_path):
    assert in_shell("--gradescope", tmp_path / "a.zip", "--exercise", "ex01", "--exercise", "ex02").exit_code == 0
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        archive.extractall(tmp_path / "source")
    assert modes["setup.sh"] & 0o111 and modes["run_autograder"] & 0o111
    assert not any(name.startswith(("solutions/", "tests/", "exercises/")) or "__pycache__" in name for name in modes)
    assert "ex01 ex02" in (tmp_path / "source/run_autograder").read_text()
    for script in ("setup.sh", "run_autograder"):
        assert subprocess.run(["bash", "-n", tmp_path / "source" / script], check=False).returncode == 0
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission/ex01_softmax.py").write_bytes(b"def softmax(x):\n    return x.missing\n")
    # As run_autograder calls it, with the package of the zip and nothing else of the repository.
    command = [sys.executable, "-m", "flashlib.course.grader.autograder", "ex01"]
    paths = ["--submission", tmp_path / "submission", "--results", tmp_path / "results/results.json"]
    ran = subprocess.run(
        [*command, *paths], cwd=tmp_path / "source", check=False, capture_output=True, text=True, timeout=250
    )
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert ran.returncode == 0 and problems_of(results) == [] and len(results["tests"]) == 15, (ran.stderr, results)
    assert results["score"] == 0 and "exception" in results["tests"][0]["tags"]
    assert in_shell("--gradescope", tmp_path / "b.zip").exit_code == 2
    with pytest.raises(ValueError, match="ex77"):
        build(tmp_path / "c.zip", ["ex77"])


@pytest.mark.parametrize("shape", ["folder", "file", "zip", "deep", "empty", "nothing there"])
def test_an_autograder_takes_what_one_student_hands_in(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(classroom, "grade", lambda exercise, submission, sandbox, **options: report_for(
        exercise, submission.student, 0 if submission.source == GOOD else 99, "missing-file"
    ))  # fmt: skip
    place = tmp_path / "submission"
    if shape != "nothing there":
        place.mkdir()
    if shape in ("folder", "file"):
        (place / "ex01_softmax.py").write_bytes(GOOD)
    elif shape == "deep":
        (place / "work/more").mkdir(parents=True)
        (place / "work/more/ex01_softmax.py").write_bytes(GOOD)
    elif shape == "zip":
        with zipfile.ZipFile(place / "mine.zip", "w") as archive:
            archive.writestr("ex01_softmax.py", GOOD)
    results = grade_folder(place / "ex01_softmax.py" if shape == "file" else place, ["ex01"])
    assert (results["score"] > 0) == (shape not in ("empty", "nothing there")) and problems_of(results) == []


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), RecursionError(), OSError(5, "disk")])
def test_an_autograder_writes_results_whatever_happens(tmp_path, monkeypatch, error):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr("flashlib.course.grader.autograder.grade_folder", failing)
    file = tmp_path / f"deep/{secrets.token_hex(3)}/results.json"
    assert main(["ex01", "--submission", str(tmp_path), "--results", str(file)]) == 0
    results = json.loads(file.read_text())
    assert results["score"] == 0 and type(error).__name__ in results["output"] and problems_of(results) == []
