"""Make the exercises from the solutions: `python -m flashlib.course.stubs`, or with `--check` only compare.

What stands between `# BEGIN SOLUTION` and `# END SOLUTION` becomes `raise NotImplementedError(...)`. All else, the
docstrings with shapes and contract above all, is the same in both, and a header says what the exercise asks of the reader.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from flashlib.course.grader.exercise import Exercise, exercise_names, load_exercise

REPOSITORY = Path(__file__).resolve().parents[2]
BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"


def stub(exercise: Exercise, solution: str) -> str:
    """The exercise file for the text of a solution file.

    Raises:
        ValueError: the marks do not pair up, or there are none, or the result is not valid Python.
    """
    lines: list[str] = []
    inside = False
    solutions = 0
    for number, line in enumerate(solution.splitlines(), start=1):
        mark = line.strip()
        if mark in (BEGIN, END) and inside == (mark == BEGIN):
            raise ValueError(f"{exercise.file}, line {number}: {mark} without its partner")
        if mark == BEGIN:
            solutions += 1
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f'{indent}raise NotImplementedError("{_unwritten(lines)}")')
        if mark in (BEGIN, END):
            inside = mark == BEGIN
        elif not inside:
            lines.append(line)
    if inside or not solutions:
        raise ValueError(f"{exercise.file}: {'a solution is never closed' if inside else f'there is no {BEGIN}'}")
    text = _header(exercise) + _without_unused_imports("\n".join(lines)) + "\n"
    ast.parse(text)
    return text


def _unwritten(lines: list[str]) -> str:
    """`write softmax here`: the function or method whose body begins."""
    for line in reversed(lines):
        if found := re.match(r"\s*def (\w+)", line):
            return f"write {found[1]} here"
    return "write this"


def _header(exercise: Exercise) -> str:
    scale = "difficulty {0}/5 · importance {1}/5 · about {2} minutes"
    return (
        f"# Exercise {exercise.name[2:]}: {exercise.title}\n"
        f"# {scale.format(exercise.difficulty, exercise.importance, exercise.minutes)}\n"
        f"# Chapter: notebooks/{exercise.chapter}.ipynb\n"
        f"#\n"
        f'# Check your work with `flashlib grade {exercise.name}`, or in a notebook with `check("{exercise.name}")`.\n\n'
    )


def _without_unused_imports(text: str) -> str:
    """Drop `import x` lines that only the solution needed, so as not to give its tools away. torch stays."""
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    kept = []
    for line in text.split("\n"):
        found = re.fullmatch(r"import (\w+)", line)
        if not found or found[1] in names:
            kept.append(line)
        elif found[1] == "torch":
            kept.append(f"{line}  # noqa: F401")
    return re.sub(r'(?<=""")\n\n\n+(?=import|from)', "\n\n", "\n".join(kept))


def main(arguments: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m flashlib.course.stubs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a stub is not what it should be")
    options = parser.parse_args(arguments)
    stale = []
    for name in exercise_names():
        exercise = load_exercise(name)
        text = stub(exercise, (REPOSITORY / "solutions" / exercise.file).read_text())
        file = REPOSITORY / "exercises" / exercise.file
        if file.exists() and file.read_text() == text:
            continue
        if options.check:
            stale.append(exercise.file)
        else:
            file.write_text(text)
            print(f"wrote exercises/{exercise.file}")
    if stale:
        print(f"not in step with solutions/: {', '.join(stale)}. Run python -m flashlib.course.stubs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
