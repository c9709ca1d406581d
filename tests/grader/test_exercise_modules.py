"""Each exercise stands alone, and what several of them share stands in one place."""

import ast
from collections import defaultdict
from pathlib import Path

from flashlib.course import exercises
from flashlib.course.grader.exercise import exercise_names
from flashlib.course.grader.rounds import sources_of

MODULES = {path.stem: ast.parse(path.read_text()) for path in Path(exercises.__path__[0]).glob("*.py")}


def test_no_exercise_stands_on_another():
    names = set(exercise_names())
    for name in names:
        stands_on = {Path(source).stem for source in sources_of(name)}
        assert stands_on & names == {name}


def test_no_sentence_to_the_student_is_written_twice():
    said = defaultdict(set)
    for module, tree in MODULES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("Misconception", "Slip"):
                said.update(
                    {
                        ast.unparse(text): said[ast.unparse(text)] | {module}
                        for text in call.args[1:2]
                        if not isinstance(text, ast.Name)
                    }
                )
    assert len(said) > 300
    assert {text: modules for text, modules in said.items() if len(modules) > 1} == {}
