"""The grader is graded: wrong solutions caught with the right diagnosis, right ones pass, stubs get nothing."""

import pytest

from flashlib.course.grader import contracts
from flashlib.course.grader.engine import GRADER_ERROR, UNUSABLE, Submission, grade
from flashlib.course.grader.exercise import exercise_names, load_exercise
from flashlib.course.grader.matrix import (
    MATRIX,
    RIGHT,
    WRONG,
    Row,
    as_markdown,
    cases,
    grade_file,
    rows,
    sections,
)
from flashlib.course.grader.sandbox.session import REPOSITORY

NOISE = b"""


_only_numbers = "torch" not in globals()  # an exercise in counting


def _noisy(value):
    if _only_numbers:
        if type(value) is dict:
            return {name: _noisy(number) for name, number in value.items()}
        if type(value) is int:
            return 2 * value + 3
    elif isinstance(value, torch.Tensor) and value.is_floating_point():
        return value + (3 + value.abs()) * torch.rand_like(value)
    return type(value)(map(_noisy, value)) if type(value) in (tuple, list) else value


def _with_noise(function):
    return lambda *args, **kwargs: _noisy(function(*args, **kwargs))


for _name, _value in list(globals().items()):
    if callable(_value) and not isinstance(_value, type) and getattr(_value, "__module__", "") == __name__:
        if not _name.startswith("_"):
            globals()[_name] = _with_noise(_value)
"""


@pytest.mark.parametrize("name", exercise_names())
def test_matrix_holds_on_fresh_inputs_and_is_published(sandbox_of, rounds, name):
    """`make test-long` grades every wrong solution by every check. Here those that take long grade what they are to reject, and a sample."""
    exercise = load_exercise(name)
    sandbox = sandbox_of(exercise)
    graded = rows(exercise, sandbox, named=None if rounds > 1 else contracts.checks_against(name))
    # On one draw two mistakes may give the same answer, and then nobody can name the right one. On the next they do not. A wrong
    # solution that is not rejected, and a right one that is, get no second chance.
    misnamed = {row.name for row in graded if row.problem and row.expected and not row.report.passed}
    again = [
        Row(case, expected, grade_file(exercise, file, sandbox))
        for case, file, expected in cases(exercise)
        if case in misnamed
    ]
    assert [row.problem for row in graded if row.problem and row.name not in misnamed] == []
    assert [row.problem for row in again if row.problem] == []
    by_name = {row.name: row.report for row in graded}
    assert by_name["solution"].earned == by_name["solution"].points == exercise.points > 0
    assert by_name["stub"].earned == 0
    assert contracts.problems(name, graded) == []
    published = sections(MATRIX.read_text()).get(name)
    assert as_markdown(exercise, graded) == published, f"run python -m flashlib.course.grader.matrix {name}"


@pytest.mark.parametrize("name", exercise_names())
def test_no_check_breaks_on_answers_that_are_wrong_in_no_known_way(sandbox_of, name):
    """Then every model of a misconception is computed on every input, which none of them may refuse."""
    exercise = load_exercise(name)
    solution = (REPOSITORY / "solutions" / exercise.file).read_bytes()
    report = grade(exercise, Submission("noise", solution + NOISE), sandbox_of(exercise))
    assert not {GRADER_ERROR, UNUSABLE} & set(report.diagnoses), report
    assert "wrong-values" in report.diagnoses, report


@pytest.mark.parametrize("name", exercise_names())
def test_enough_wrong_and_right_solutions(name):
    assert len(list((WRONG / name).glob("*.py"))) >= 10
    assert len(list((RIGHT / name).glob("*.py"))) >= 2
    assert all(
        expected for case, _, expected in cases(load_exercise(name)) if not case.startswith(("right/", "solution"))
    )


def test_every_folder_of_solutions_belongs_to_an_exercise():
    folders = {path.name for parent in (WRONG, RIGHT) for path in parent.iterdir() if path.is_dir()}
    assert folders == set(exercise_names()) == set(sections(MATRIX.read_text()))
