"""What the chapters let a reader write before they show it: see `flashlib.course.tasks.task`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from flashlib.course.tasks.task import Graded, Task, Wrong, grade

__all__ = ["Graded", "Task", "Wrong", "attempt", "tasks_of"]


@cache
def tasks_of(chapter: str) -> dict[str, Task]:
    """The tasks of a chapter (`"02"`) by their ids, in the order in which they are set; none if it sets none."""
    name = f"{__name__}.ch{chapter}"
    if find_spec(name) is None:
        return {}
    return {task.id: task for task in import_module(name).TASKS}


def attempt(id: str, function: Callable[..., Any]) -> Graded:
    """Grade a function that was written in a chapter.

    Args:
        id: of the task, as `"02-update"`.
        function: yours.

    Raises:
        ValueError: there is no such task.
        TypeError: `function` is no function.
    """
    known = tasks_of(str(id)[:2])
    if id not in known:
        raise ValueError(f"there is no task {id!r}; chapter {str(id)[:2]!r} sets {list(known)}")
    if not callable(getattr(function, "fn", function)):
        raise TypeError(f"function must be a function, got {type(function).__name__}")
    return grade(known[id], function)
