"""What racecheck reports of a kernel, sorted by how the kernel orders the two accesses.

A report names the file and line of each access, innermost function first. In a warp-specialised kernel a function belongs to the
partitions that call it, which its source says: two accesses that no partition shares are ordered by what partitions meet at, mbarriers.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

# How two accesses are ordered, and the right kernel of planted.py in which nothing else orders them.
CONTROL_OF = {
    "handover": "control_handover",
    "dispatch": "control_dispatch",
    "written before": "control_written_before",
}
DISPATCH, BODY = "dispatch", "body"
ACCESS = re.compile(r"(?:Read|Write) access at (\w+)\+0x[0-9a-f]+ in (\S+):(\d+)(?: \[(\d+) hazards\])?")


@dataclass(frozen=True)
class Access:
    """One of the accesses of a report. ``hazards``: how often it met the first one; 0 for the first."""

    kernel: str
    file: str
    line: int
    hazards: int


def accesses(report: str) -> list[Access]:
    """The first access, then those that race with it; none if some access has no line."""
    found = [Access(kernel, file, int(line), int(n or 0)) for kernel, file, line, n in ACCESS.findall(report)]
    return found if len(found) == report.count(" access at ") else []


def kind_of(report: str, kernels: dict[str, Any]) -> str | None:
    """Which key of ``CONTROL_OF`` the report is about; None for any other report.

    Args:
        report: of racecheck, one line an access.
        kernels: the warp-specialised kernels, by name.
    """
    found = accesses(report)
    if len(found) < 2 or len({access.kernel for access in found}) != 1 or found[0].kernel not in kernels:
        return None
    lines = places(kernels[found[0].kernel])
    first, *others = (lines.get((access.file, access.line), set()) for access in found)
    kinds = {_between(first, other) for other in others}
    return kinds.pop() if len(kinds) == 1 else None


def _between(one: set[str], other: set[str]) -> str | None:
    outside = {DISPATCH, BODY}
    if not one or not other:
        return None
    if one == other == {DISPATCH}:
        return "dispatch"
    if not (one | other) & outside:
        return None if one & other else "handover"
    return "written before" if {BODY} in (one, other) and not (one & other) else None


@cache
def places(kernel: Any) -> dict[tuple[str, int], set[str]]:
    """Where each source line of a warp-specialised kernel belongs, by (file, line): to partitions, by their functions' names, to the
    kernel's own body, or to the dispatch, which the compiler places at the head of the kernel and where it splits."""
    found, function = defaultdict(set), _tree(kernel)
    for line in _lines(kernel):
        found[_file(kernel), line] = {DISPATCH if line < function.body[0].lineno else BODY}
    for split in _splits(function):
        for line in range(split.lineno, split.end_lineno + 1):
            found[_file(kernel), line] = {DISPATCH}
    for partition in _partitions(function):
        for reached in _reached(kernel.fn.__globals__[partition]):
            for line in _lines(reached):
                found[_file(reached), line].add(partition)
    return found


def _splits(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements that split the kernel, with the condition that chooses between them: the compiler gives their first line."""

    return [
        statement
        for statement in function.body
        if any(isinstance(part, ast.Attribute) and part.attr == "warp_specialize" for part in ast.walk(statement))
    ]


def _partitions(function: ast.FunctionDef) -> set[str]:
    """The functions that a kernel splits into: the first entries of ``[(function, (argument, ...)), ...]``."""
    tuples = (part for split in _splits(function) for part in ast.walk(split) if isinstance(part, ast.Tuple))
    heads = ((pair.elts[0], pair.elts[1]) for pair in tuples if len(pair.elts) == 2)
    return {name.id for name, arguments in heads if isinstance(name, ast.Name) and isinstance(arguments, ast.Tuple)}


def _reached(function: Any) -> list[Any]:
    """A jitted function, and all jitted ones that it calls, directly or not."""
    found = [function]
    for caller in found:
        names = (part.id for part in ast.walk(_tree(caller)) if isinstance(part, ast.Name))
        called = (caller.fn.__globals__.get(name) for name in names)
        found += [each for each in dict.fromkeys(called) if hasattr(each, "raw_src") and each not in found]
    return found


def _tree(function: Any) -> ast.FunctionDef:
    """The syntax tree of a jitted function, with the line numbers of its file."""
    lines, first = inspect.getsourcelines(function.fn)
    return ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), first - 1).body[0]


def _lines(function: Any) -> range:
    lines, first = inspect.getsourcelines(function.fn)
    return range(first, first + len(lines))


def _file(function: Any) -> str:
    return inspect.getsourcefile(function.fn).rpartition("/")[2]
