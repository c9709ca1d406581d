"""Every sentence that an exercise's docstrings say: which check holds a solution to it, and which wrong solution shows that it does.

`exercises/CONTRACTS.md` is the table. A sentence that nobody can break says why not, by one of the words in `NO_CONTRACT`.
`python -m flashlib.course.grader.contracts` writes rows for sentences that are new, and drops those that are gone.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from flashlib.course.grader.exercise import exercise_names, load_exercise
from flashlib.course.grader.matrix import Row
from flashlib.course.grader.sandbox.session import REPOSITORY

TABLE = REPOSITORY / "exercises/CONTRACTS.md"
NO_CONTRACT = {
    "told": "It says what something is for, or what the caller does, and asks nothing of a solution.",
    "premise": "What a caller promises. The checks keep it; no solution can break it.",
    "given": "It is about code that is given, or about the grader.",
}
INTRODUCTION = f"""\
# What the exercises promise, and who holds them to it

Each sentence of each docstring, the checks that hold a solution to it, and wrong solutions (under `tests/grader/wrong/`) that break
it and are rejected by one of these checks. A test repeats that with every kill matrix. Where there is no check, a word says why:

{chr(10).join(f"- *{word}*: {says}" for word, says in NO_CONTRACT.items())}
"""


@dataclass(frozen=True)
class Promise:
    """One sentence.

    Attributes:
        place: the function, class or method whose docstring it stands in; `"module"` for the file's own.
        says: the sentence.
        checks: names of properties. Empty if nobody can break it.
        wrong: names of wrong solutions; or one of `NO_CONTRACT`.
    """

    place: str
    says: str
    checks: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


def sentences(docstring: str) -> list[str]:
    """Its sentences, each in one line. Each entry under `Args:` begins a new one."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = [line.strip() for line in paragraph.splitlines()]
        text = " ".join(line for line in lines if not re.fullmatch(r"(Args|Returns|Raises|Attributes):|", line))
        # A full stop ends a sentence, but not the two of a range, as in `0 .. G - 1`.
        found += [part for part in re.split(r"(?<=[^.][.!?])\s+|(?<=\.\))\s+", text) if part]
    return found


def promised(exercise: str) -> list[tuple[str, str]]:
    """Place and sentence, in the order of the exercise's file."""
    tree = ast.parse((REPOSITORY / "exercises" / load_exercise(exercise).file).read_text())
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, place: str) -> None:
        if docstring := ast.get_docstring(node):
            found.extend((place or "module", sentence) for sentence in sentences(docstring))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                visit(child, f"{place}.{child.name}".lstrip("."))

    visit(tree, "")
    return found


def as_markdown(table: dict[str, list[Promise]]) -> str:
    parts = [INTRODUCTION]
    for name, promises in table.items():
        lines = [
            f"## {name}: {load_exercise(name).title}",
            "",
            "| where | sentence | checks | wrong solutions |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {one.place} | {one.says.replace('|', chr(92) + '|')} | {', '.join(one.checks)} | "
            f"{', '.join(one.wrong) if one.checks else ''.join(f'*{word}*' for word in one.wrong)} |"
            for one in promises
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def read_table(text: str) -> dict[str, list[Promise]]:
    """The table that `as_markdown` wrote."""
    table: dict[str, list[Promise]] = {}
    for line in text.splitlines():
        if heading := re.match(r"## (ex\d\d): ", line):
            table[heading[1]] = []
        elif line.startswith("| ") and not line.startswith("| where |"):
            place, says, checks, wrong = (
                part.strip().replace("\\|", "|") for part in re.split(r"(?<!\\)\|", line.strip()[1:-1])
            )
            words = tuple(word.strip("* ") for word in wrong.split(",") if word.strip("* "))
            promise = Promise(place, says, tuple(word.strip() for word in checks.split(",") if word.strip()), words)
            next(reversed(table.values())).append(promise)
    return table


def checks_against(exercise: str) -> dict[str, set[str]]:
    """For each wrong solution in the table, the checks that are named with it."""
    found: dict[str, set[str]] = {}
    for one in read_table(TABLE.read_text()).get(exercise, []):
        for wrong in one.wrong:
            found.setdefault(wrong, set()).update(one.checks)
    return found


def problems(exercise: str, graded: Sequence[Row]) -> list[str]:
    """What is not as the table says, given a kill matrix of the exercise."""
    promises = read_table(TABLE.read_text()).get(exercise, [])
    found = [f"not in the table, or gone: {place}: {says}" for place, says in _differences(exercise, promises)]
    failed = {
        row.name: {result.name for result in row.report.results if result.finding}
        for row in graded
        if "/" not in row.name and row.name not in ("solution", "stub")
    }
    known = {prop.name for prop in load_exercise(exercise).properties}
    for one in promises:
        where = f"{one.place}: {one.says[:60]}"
        if not one.checks:
            if len(one.wrong) != 1 or one.wrong[0] not in NO_CONTRACT:
                found.append(f"{where}: no check, and no reason")
            continue
        found += [f"{where}: there is no check {check}" for check in one.checks if check not in known]
        found += [f"{where}: there is no wrong solution {wrong}" for wrong in one.wrong if wrong not in failed]
        rejecting = {wrong: failed.get(wrong, set()) & set(one.checks) for wrong in one.wrong}
        found += [f"{where}: {wrong} passes {', '.join(one.checks)}" for wrong, by in rejecting.items() if not by]
        found += [
            f"{where}: {check} rejects none of {', '.join(one.wrong)}"
            for check in one.checks
            if not any(check in by for by in rejecting.values())
        ]
    return found


def _differences(exercise: str, promises: Sequence[Promise]) -> list[tuple[str, str]]:
    listed, said = [(one.place, one.says) for one in promises], promised(exercise)
    return [each for each in said if each not in listed] + [each for each in listed if each not in said]


def main() -> int:
    """Bring the sentences of the table up to date; rows that are new have neither check nor reason."""
    old = read_table(TABLE.read_text()) if TABLE.exists() else {}
    table = {}
    for name in exercise_names():
        rows = {(one.place, one.says): one for one in old.get(name, [])}
        table[name] = [rows.get(each, Promise(*each)) for each in promised(name)]
    TABLE.write_text(as_markdown(table))
    missing = [f"{name} {one.place}: {one.says}" for name, rows in table.items() for one in rows if not one.wrong]
    print("\n".join(missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
