"""The grader: students' code in a fenced process, the oracle and the verdict outside of it.

`check("ex01")` in a notebook, `flashlib grade` in a shell. How to write an exercise: `flashlib.course.exercises`.
"""

from importlib import import_module

_HOME = {"Finding": "findings", "Report": "report", "Result": "findings", "check": "front_door"}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
