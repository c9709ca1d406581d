"""What a GPU's compiler makes of a kernel, as ex06 to ex09 ask it: no GPU is needed for that."""

from __future__ import annotations

from typing import Any

from flashlib.course.grader.exercise import Misconception
from flashlib.course.grader.trial import Trial

ROUNDED_TO_TF32 = Misconception(
    "rounded-to-tf32",
    "On a GPU tl.dot would round float32 inputs to TF32, which has ten bits after the point. The interpreter does not show it.",
    "Which argument of tl.dot says how float32 is multiplied?",
)


def expect_compiled(t: Trial, no_kernel: Misconception, function: str, *args: Any, **kwargs: Any) -> None:
    """The compiler takes every kernel that a call launches, for sm_80 and sm_90, and multiplies float32 in float32.

    Compiling takes longer than most checks: first let those who compute something else be told so by a cheaper call.

    Raises:
        Failure: `"compile-error"`, at the line of the kernel; `"rounded-to-tf32"`; or `no_kernel`.
    """
    kernels = t.compile(function, *args, **kwargs)
    if not kernels:
        t.fail_as(no_kernel, got="no kernel was launched", expected="a Triton kernel")
    rounded = {precision for dots in kernels.values() for precision, dtype in dots if dtype == "f32"} - {"ieee"}
    if rounded:
        t.fail_as(ROUNDED_TO_TF32, got=f"tl.dot with {', '.join(sorted(rounded))}", expected='input_precision="ieee"')
