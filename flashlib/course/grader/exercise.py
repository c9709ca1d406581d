"""What an exercise consists of: the declarations its author writes. `flashlib/course/exercises/__init__.py` shows how."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flashlib.course.grader.sandbox.outcome import Limits
from flashlib.reference import largest_error, one_rounding

# Names of ATen operators, each standing for all of its overloads, and of functions that PyTorch has in Python for the same. That
# no operator and no function is left which computes the same is what tests/grader/test_bans.py finds out, by calling all of them.
SDPA = {
    "sdpa-called": (
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_attention_math_for_mps",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_flash_attention_forward_no_dropout_inplace",
        "_efficient_attention_forward",
        "_cudnn_attention_forward",
        "_native_multi_head_attention",
        "_triton_multi_head_attention",
        "_triton_scaled_dot_attention",
        "_transformer_encoder_layer_fwd",
        "flex_attention",
        "math_attention",
        "_math_attention_inner",
        "sdpa_dense",
    )
}
SOFTMAX = {
    "softmax-called": (
        "softmax",
        "_softmax",
        "_safe_softmax",
        "_masked_softmax",
        "_sparse_softmax",
        "_nested_tensor_softmax_with_shape",
        "special_softmax",
        "log_softmax",
        "_log_softmax",
        "_sparse_log_softmax",
        "special_log_softmax",
        "logsumexp",
        "special_logsumexp",
        "logcumsumexp",
        "_logcumsumexp",
        "_softmax_unbacked_safe_amax",
        "gumbel_softmax",
        "SoftmaxTransform",
    )
}

FORBIDDEN_SAYS = {
    "sdpa-called": "You called PyTorch's own attention; this exercise is to write it.",
    "softmax-called": "You called a softmax (or log-sum-exp) that is there already; this exercise is to write it.",
    "compile-called": "You used torch.compile. It needs a compiler, and processes of its own, which are not there while you are "
    "graded. Take it off: what is compiled is the same code.",
}


# A function of one `flashlib.course.grader.trial.Trial`. That module stands on this one, so its name is not to be had here.
Check = Callable[[Any], None]
# Each exercise is a module in there. The grader finds them by name, as plugins, and imports none by itself: they stand on it.
EXERCISES = "flashlib.course.exercises"


@dataclass(frozen=True, eq=False)
class Misconception:
    """A mistake that people make, and how to recognize it.

    Attributes:
        slug: its name in reports and in the kill matrix, such as `"max-starts-at-zero"`.
        says: one or two sentences to the student: what the code seems to do, and what follows from it.
        hint: the first hint: where to look, not the repaired line.
        model: what a solution with this mistake computes, with the arguments of the student's function. It need only be
            right on inputs where the mistake shows. None for mistakes that a property recognizes in another way.
    """

    slug: str
    says: str
    hint: str = ""
    model: Callable[..., Any] | None = None


@dataclass(frozen=True, eq=False)
class Target:
    """A function of the student's file, and what is known about it.

    Attributes:
        function: its name.
        oracle: the exact answer, in float64, with the arguments of the student's function. A tensor, or a tuple of them.
        budget: the largest absolute error allowed for each output, with the same arguments: a float or a tuple of them.
        outputs: names of the outputs, each with its dtype; None stands for the dtype of the first tensor argument.
        misconceptions: what to compare a wrong answer with, the more specific first.
    """

    function: str
    oracle: Callable[..., Any]
    budget: Callable[..., Any]
    outputs: Mapping[str, torch.dtype | None] = field(default_factory=lambda: {"out": None})
    misconceptions: Sequence[Misconception] = ()


def budget_of(
    naive: Callable[..., Any], oracle: Callable[..., Any], terms: Callable[..., Any] | None = None
) -> Callable[..., tuple[float, ...]]:
    """The error budget that `flashlib.reference` gives attention, for any function with a plain implementation.

    Twice the error of `naive` against `oracle`, plus one rounding of the output, plus one rounding of the terms.

    Args:
        naive: computes in the inputs' dtype. It may return a list of answers, each computed another way: the worst counts.
        oracle: computes in float64.
        terms: for each output, the sum of the magnitudes of the terms that it is a sum of (`exp(y)` counts 1 + |y| times:
            y was rounded too). They are rounded once in float32, or float64 for float64 inputs. On small inputs the naive
            answer may be exact by luck, and always is when it computes in float64; this keeps the budget fair. Called with
            the tensors in float64.
    """

    def budget(*args: Any, **kwargs: Any) -> tuple[float, ...]:
        exact = as_tuple(oracle(*args, **kwargs))
        answers = naive(*args, **kwargs)
        answers = [as_tuple(answer) for answer in (answers if isinstance(answers, list) else [answers])]
        allowed = [
            2 * max(largest_error(answer[index], value) for answer in answers)
            + one_rounding(value, answers[0][index].dtype)
            for index, value in enumerate(exact)
        ]
        if terms is not None:
            dtype = next(x.dtype for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            sums = as_tuple(terms(*map(_in_float64, args), **{key: _in_float64(x) for key, x in kwargs.items()}))
            allowed = [
                one + eps * (float(total.max()) if total.numel() else 0.0)
                for one, total in zip(allowed, sums, strict=True)
            ]
        return tuple(allowed)

    return budget


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@dataclass(frozen=True)
class Property:
    """One thing that is checked: a name, what it says of a right solution, points, hints, and the check itself."""

    name: str
    title: str
    points: int
    hints: tuple[str, ...]
    run: Check


@dataclass
class Exercise:
    """An exercise: what the student sees first, what he may use, and the properties he is graded by.

    Attributes:
        name: `"ex01"`.
        file: `"ex01_softmax.py"`, in `solutions/` and, with the solution taken out, in `exercises/`.
        title: a few words.
        chapter: the notebook it belongs to, such as `"01_naive_attention"`.
        difficulty, importance: 1 to 5.
        minutes: how long it takes.
        forbidden: operations taken out of PyTorch: `SDPA`, `SOFTMAX`, or both (`SDPA | SOFTMAX`), or your own mapping
            from a diagnosis to names of ATen operators and of PyTorch's own functions.
        limits: time and memory for one submission.
        preload: modules a child should find loaded (`("triton",)`).
        environment: variables set before anything is imported (`{"TRITON_INTERPRET": "1"}`).
    """

    name: str
    file: str
    title: str
    chapter: str
    difficulty: int
    importance: int
    minutes: int
    forbidden: Mapping[str, Sequence[str]] = field(default_factory=lambda: SDPA)
    limits: Limits = field(default_factory=Limits)
    preload: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    properties: list[Property] = field(default_factory=list)

    @property
    def points(self) -> int:
        return sum(prop.points for prop in self.properties)

    def property(self, *, points: int, hints: Sequence[str] = ()) -> Callable[[Check], Property]:
        """Decorate a function of one `Trial`: it becomes a property named after it; its docstring is the title.

        Raises:
            ValueError: no docstring, no points, or a name that is taken.
        """

        def declare(function: Check) -> Property:
            title = inspect.getdoc(function)
            if not title:
                raise ValueError(
                    f"property {function.__name__} of {self.name} needs a docstring: it is shown as the title"
                )
            if points < 1:
                raise ValueError(f"points of {function.__name__} must be at least 1, got {points}")
            name = function.__name__.replace("_", "-")
            if any(prop.name == name for prop in self.properties):
                raise ValueError(f"{self.name} has two properties named {name}")
            self.properties.append(Property(name, title.splitlines()[0], points, tuple(hints), function))
            return self.properties[-1]

        return declare


def exercise_names() -> list[str]:
    """Names of all exercises, in order: `["ex01", ...]`."""
    folder = importlib.import_module(EXERCISES).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if module.name.startswith("ex"))


def load_exercise(name: str) -> Exercise:
    """The exercise of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in exercise_names():
        raise ValueError(f"there is no exercise {name!r}; there are {', '.join(exercise_names())}")
    return importlib.import_module(f"{EXERCISES}.{name}").exercise
