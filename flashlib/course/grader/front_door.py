"""`check("ex01")`: grade your own file, from a notebook or a script."""

from __future__ import annotations

import atexit
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from flashlib.course.grader.engine import Submission, grade, sandbox_for
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.report import Report
from flashlib.course.grader.sandbox.session import Sandbox
from flashlib.course.grader.submissions import read_submission

PREAMBLE = "import math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import Tensor\n"
TRITON_PREAMBLE = "import triton\nimport triton.language as tl\n"
_sandboxes: dict[str, Sandbox] = {}


def check(
    exercise: str,
    *,
    file: str | Path | None = None,
    functions: Mapping[str, Callable] | None = None,
    hints: int = 1,
    seed: int | None = None,
    seconds: float | None = None,
) -> Report:
    """Grade your solution of an exercise. The answer prints as text and shows as HTML in a notebook.

    Args:
        exercise: such as `"ex01"`.
        file: your solution; if None, `exercises/ex01_*.py` of the directory you are in or of one above it.
        functions: functions that you wrote in a notebook, by the names the exercise asks for, instead of a file. Their
            source is copied, so they may use each other, `math`, `torch`, `F` and `Tensor`, and nothing else; in a Triton
            exercise also `triton` and `tl`, and kernels are among the functions.
        hints: how many hints to show for each check that fails; ask for more when one is not enough.
        seed: the inputs of an earlier run, which printed it.
        seconds: time limit for one call, in place of the exercise's own.

    Raises:
        ValueError: there is no such exercise, no such file, or `hints` is negative.
        SandboxError: this machine cannot run the grader; the message says why.
    """
    declared = load_exercise(exercise)
    if hints < 0:
        raise ValueError(f"hints must be 0 or more, got {hints}")
    if file is not None and functions is not None:
        raise ValueError("give either file or functions, not both")
    if functions is not None:
        submission = Submission("notebook", _source_of(functions, triton="triton" in declared.preload))
    else:
        submission = read_submission("you", Path(file) if file is not None else find(declared.file))
    if exercise not in _sandboxes:
        _sandboxes[exercise] = sandbox_for(declared)
        atexit.register(_sandboxes[exercise].close)
    if seconds is not None:
        declared = replace(declared, limits=replace(declared.limits, seconds=seconds))
    return grade(declared, submission, _sandboxes[exercise], seed=seed, hints=hints)


def find(name: str) -> Path:
    """The file `exercises/<name>` of the current directory or the nearest one above it.

    Raises:
        ValueError: there is none.
    """
    here = Path.cwd()
    for directory in (here, *here.parents):
        for candidate in (directory / name, directory / "exercises" / name):
            if candidate.exists():
                return candidate
    raise ValueError(f"found no exercises/{name} in {here} or above it; say where it is: file=...")


def _source_of(functions: Mapping[str, Callable], *, triton: bool) -> bytes:
    parts = [PREAMBLE + TRITON_PREAMBLE * triton]
    for name, function in functions.items():
        function = getattr(function, "fn", function)  # the function under @triton.jit
        try:
            parts.append(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError) as error:
            raise ValueError(f"functions[{name!r}] has no source to copy; save it in a file") from error
        if function.__name__ != name:
            parts.append(f"{name} = {function.__name__}\n")
    return "\n\n".join(parts).encode()
