"""The grader is graded: wrong solutions caught with the right diagnosis, right ones pass, stubs get nothing."""

import pytest

from flashlib.course.grader.engine import sandbox_for
from flashlib.course.grader.exercise import exercise_names, load_exercise
from flashlib.course.grader.matrix import MATRIX, RIGHT, WRONG, as_markdown, cases, rows, sections


@pytest.mark.parametrize("name", exercise_names())
def test_matrix_holds_on_fresh_inputs_and_is_published(name):
    exercise = load_exercise(name)
    with sandbox_for(exercise) as sandbox:
        graded = rows(exercise, sandbox)
    assert [row.problem for row in graded if row.problem] == []
    by_name = {row.name: row.report for row in graded}
    assert by_name["solution"].earned == by_name["solution"].points == exercise.points > 0
    assert by_name["stub"].earned == 0
    published = sections(MATRIX.read_text()).get(name)
    assert as_markdown(exercise, graded) == published, f"run python -m flashlib.course.grader.matrix {name}"


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
