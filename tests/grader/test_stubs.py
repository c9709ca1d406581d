"""Exercises are the solutions with the solution taken out, and stay in step with them."""

import ast

import pytest

from flashlib.course import stubs
from flashlib.course.grader.exercise import exercise_names, load_exercise

SOLUTION = '''"""Doc."""

import math

import torch


def area(r: torch.Tensor) -> torch.Tensor:
    """[n] to [n]."""
    # BEGIN SOLUTION
    return math.pi * r * r
    # END SOLUTION


def twice(x):
    return x + x
'''


@pytest.fixture
def exercise():
    return load_exercise("ex01")


def test_stubs_are_in_step():
    assert stubs.main(["--check"]) == 0


def test_check_notices_a_stale_and_a_missing_stub(tmp_path, monkeypatch, capsys, exercise):
    for folder in ("solutions", "exercises"):
        (tmp_path / folder).mkdir()
    for name in exercise_names():
        file = load_exercise(name).file
        (tmp_path / "solutions" / file).write_text((stubs.REPOSITORY / "solutions" / file).read_text())
    monkeypatch.setattr(stubs, "REPOSITORY", tmp_path)
    assert stubs.main(["--check"]) == 1
    assert stubs.main([]) == 0 and stubs.main(["--check"]) == 0
    with (tmp_path / "exercises" / exercise.file).open("a") as file:
        file.write("# edited\n")
    assert stubs.main(["--check"]) == 1
    assert exercise.file in capsys.readouterr().err


def test_solution_is_replaced_and_all_else_kept(exercise):
    text = stubs.stub(exercise, SOLUTION)
    assert 'raise NotImplementedError("write area here")' in text
    assert "math" not in text and "SOLUTION" not in text
    assert '"""[n] to [n]."""' in text and "return x + x" in text
    assert text.startswith("# Exercise 01: ") and "30 minutes" in text and "01_naive_attention" in text
    namespace = {}
    exec(compile(text, "stub", "exec"), namespace)
    with pytest.raises(NotImplementedError):
        namespace["area"](1)


@pytest.mark.parametrize(
    "broken",
    [
        SOLUTION.replace("    # BEGIN SOLUTION\n", ""),
        SOLUTION.replace("    # END SOLUTION\n", ""),
        SOLUTION.replace("# END SOLUTION", "# BEGIN SOLUTION"),
        "x = 1\n",
    ],
)
def test_marks_that_do_not_pair_are_refused(exercise, broken):
    with pytest.raises(ValueError, match=exercise.file):
        stubs.stub(exercise, broken)


@pytest.mark.parametrize("name", exercise_names())
def test_docstrings_give_no_solution_away(name):
    """A stub parses, says what each function takes and gives, and holds no line of the solution."""
    exercise = load_exercise(name)
    solution = (stubs.REPOSITORY / "solutions" / exercise.file).read_text()
    stub = (stubs.REPOSITORY / "exercises" / exercise.file).read_text()
    for node in ast.walk(ast.parse(stub)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{exercise.file}: {node.name} has no docstring"
    taken_out = solution.count(stubs.BEGIN)
    assert stub.count("raise NotImplementedError(") == taken_out > 0
