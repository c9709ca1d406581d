"""Small tasks in the flow of a chapter: a function of one to five lines, graded where it was written, in the reader's own kernel.

A task knows what is right and which wrong answers people give. A function that gives a wrong answer's results, case by case, has made
that mistake, and is told so by its name.
"""

from __future__ import annotations

import html
import inspect
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graded", "Task", "Wrong", "grade"]

# Cases are drawn in float64 but for kernels, so that two right functions differ by far less than a right one and a wrong one.
_RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-5}
_COLORS = {"right": "#009E73", "wrong": "#D55E00", "to do": "#0072B2"}


@dataclass(frozen=True)
class Wrong:
    """A wrong answer that people give.

    Attributes:
        name: what went wrong, in a few words. hint: what to think about. answer: a function that makes the mistake.
    """

    name: str
    hint: str
    answer: Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """What is to be written, and how it is graded.

    Attributes:
        id: two digits of the chapter, then words: `"02-update"`.
        function: the name that the reader's function has.
        right: ours. wrong: the mistakes that are told by name.
        cases: draws the arguments to try, from a generator with a fixed seed.
        call: runs a function on the arguments of a case; for a kernel, launches it.
        lines: how many ours takes.
    """

    id: str
    function: str
    right: Callable[..., Any]
    wrong: tuple[Wrong, ...]
    cases: Callable[[torch.Generator], list[tuple]]
    call: Callable[[Callable[..., Any], tuple], Any] = lambda function, arguments: function(*arguments)
    lines: int = 2


@dataclass(frozen=True)
class Graded:
    """What became of an attempt. Prints as text, shows as HTML.

    Attributes:
        task: the `Task`. state: `"right"`, `"wrong"` or `"to do"`.
        mistake: the `Wrong` that was recognized, or None. told: what to tell the reader, a line each.
    """

    task: Task
    state: str
    told: tuple[str, ...]
    mistake: Wrong | None = None

    def __str__(self) -> str:
        return "\n".join(self.told)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        first, *rest = (html.escape(line) for line in self.told)
        body = "".join(f'<div style="margin:2px 0">{line}</div>' for line in [f"<b>{first}</b>", *rest])
        return f'<div style="border-left:4px solid {_COLORS[self.state]};padding:4px 12px;margin:6px 0">{body}</div>'


def grade(task: Task, function: Callable[..., Any]) -> Graded:
    """Try a function on all cases of a task."""
    cases = task.cases(torch.Generator().manual_seed(7))
    came: list[Any] = []
    for arguments in cases:
        given = _copied(arguments)
        try:
            came.append(task.call(function, given))
        except Exception as error:
            return Graded(
                task, "wrong", (f"{task.function} raises {type(error).__name__}: {error}", _place(error, function))
            )
        if not _same(given, arguments):
            return Graded(task, "wrong", (f"{task.function} changes what it is given. Make new values instead.",))
    if any(result is None or result is ... for result in came) or all(map(_untouched, came)):
        return Graded(task, "to do", (f"To do: {task.function}. Ours takes {_lines(task.lines)}.",))
    expected = [task.call(task.right, _copied(arguments)) for arguments in cases]
    failed = [i for i, pair in enumerate(zip(came, expected, strict=True)) if not _same(*pair)]
    if not failed:
        return Graded(task, "right", (f"{task.function}: right, in all {len(cases)} cases.",))
    for mistake in task.wrong:
        if all(_same(result, _tried(task, mistake.answer, case)) for result, case in zip(came, cases, strict=True)):
            return Graded(
                task, "wrong", (f"{task.function}: not yet. It looks like this: {mistake.name}.", mistake.hint), mistake
            )
    at = failed[0]
    shown = ", ".join(
        f"{name} = {_brief(value)}" for name, value in zip(_names(task, cases[at]), cases[at], strict=True)
    )
    what = (f"With {shown}", f"came {_brief(came[at])}", f"expected {_brief(expected[at])}")
    return Graded(task, "wrong", (f"{task.function}: not yet, in {len(failed)} of {len(cases)} cases.", *what))


def _tried(task: Task, answer: Callable[..., Any], case: tuple) -> Any:
    try:
        return task.call(answer, _copied(case))
    except Exception as error:
        return error


def _copied(arguments: Any) -> Any:
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_copied(one) for one in arguments)
    return arguments.clone() if isinstance(arguments, Tensor) else arguments


def _untouched(result: Any) -> bool:
    """Whether a kernel stored nothing where its results belong, which holds NaN before."""
    return isinstance(result, Tensor) and result.numel() > 0 and bool(result.isnan().all())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        try:
            a, b = torch.as_tensor(a), torch.as_tensor(b)
        except (TypeError, ValueError, RuntimeError):
            return False
        if a.shape != b.shape:
            return False
        within = max(_RELATIVE.get(x.dtype, 0.0) for x in (a, b))
        a, b = a.double(), b.double()
        size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
        return torch.allclose(a, b, rtol=within, atol=within * size, equal_nan=True)
    if _is_number(a) and _is_number(b):
        return math.isclose(a, b, rel_tol=_RELATIVE[torch.float64]) or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(task: Task, case: tuple) -> list[str]:
    function = getattr(task.right, "fn", task.right)
    return list(inspect.signature(function).parameters)[: len(case)]


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() > 8:
            return f"a tensor {list(value.shape)}"
        return f"{[round(x, 3) for x in value.flatten().tolist()]}" + (
            f" of shape {list(value.shape)}" if value.dim() > 1 else ""
        )
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(_brief, value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _place(error: Exception, function: Callable[..., Any]) -> str:
    code = getattr(getattr(function, "fn", function), "__code__", None)
    lines = [
        frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename
    ]
    return f"in the line: {lines[-1].line}" if lines and lines[-1].line else "before its first line"


def _lines(count: int) -> str:
    return "one line" if count == 1 else f"{count} lines"
