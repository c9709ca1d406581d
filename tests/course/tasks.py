"""Tasks in the chapters: what is right passes, each wrong answer is rejected by its name, and a stub is to do. Their kernels are interpreted:

TRITON_INTERPRET=1 pytest tests/course/tasks.py
"""

import ast
import inspect
import time
from pathlib import Path

import nbformat
import pytest

from flashlib.course.tasks import attempt, tasks_of
from flashlib.course.tasks.task import Task, grade

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
TASKS = [task for path in NOTEBOOKS for task in tasks_of(path.name[:2]).values()]
SECONDS = 5


def _id(task: Task) -> str:
    return task.id


@pytest.mark.parametrize("task", TASKS, ids=_id)
def test_ours_is_right_and_a_stub_is_to_do(task):
    started = time.process_time()
    graded = grade(task, task.right)
    assert graded.state == "right", graded
    assert time.process_time() - started < SECONDS
    assert "right, in all" in str(graded) and "right, in all" in graded._repr_html_()


@pytest.mark.parametrize("task", TASKS, ids=_id)
def test_each_wrong_answer_is_rejected_by_its_name(task):
    assert len(task.wrong) >= 2 and len({mistake.name for mistake in task.wrong}) == len(task.wrong)
    for mistake in task.wrong:
        graded = grade(task, mistake.answer)
        assert graded.state == "wrong" and graded.mistake is mistake, f"{mistake.name}: {graded}"
        assert mistake.name in str(graded) and mistake.hint in str(graded) and mistake.hint.strip()


def _set_in(path: Path) -> dict[str, tuple[int, str]]:
    """The tasks that a chapter sets: by id, the number of the cell and its source."""
    found = {}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code" and "attempt(" in cell.source:
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attempt":
                    found[ast.literal_eval(node.args[0])] = number, cell.source
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_sets_its_tasks_each_once_with_a_stub(path):
    tasks, cells = tasks_of(path.name[:2]), _set_in(path)
    assert list(cells) == list(tasks), "in the order in which they are written down"
    if "01" <= path.name[:2] <= "05":
        assert 3 <= len(tasks) <= 5
    for id, (_, source) in cells.items():
        (stub,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        assert stub.name == tasks[id].function
        ours = inspect.signature(getattr(tasks[id].right, "fn", tasks[id].right))
        assert [argument.arg for argument in stub.args.args] == list(ours.parameters), id
        assert ast.get_docstring(stub), "what comes in and what goes out"
        body = [node for node in stub.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
        assert not body, f"{id}: the stub writes {ast.unparse(body[0])}"


def test_an_error_is_told_with_its_line():
    def scores(q, k):
        return q @ k  # shapes do not fit

    graded = attempt("01-scores", scores)
    assert graded.state == "wrong" and "raises RuntimeError" in str(graded) and "q @ k" in str(graded)


def test_what_is_wrong_in_no_known_way_is_shown_with_a_case():
    graded = attempt("01-score-bytes", lambda heads, tokens, itemsize: 17)
    assert graded.mistake is None
    assert str(graded).splitlines() == [
        "score_bytes: not yet, in 3 of 3 cases.",
        "With heads = 9, tokens = 2048, itemsize = 4",
        "came 17",
        "expected 150994944",
    ]


def test_inputs_must_stay_as_they_are():
    def weights(scores):
        scores.fill_(0)
        return scores

    assert "changes what it is given" in str(attempt("01-weights", weights))


def test_unknown_tasks_and_things_that_are_no_functions_are_refused():
    with pytest.raises(ValueError, match="no task '01-x'; chapter '01' sets"):
        attempt("01-x", print)
    with pytest.raises(TypeError, match="must be a function, got int"):
        attempt("01-scores", 3)
