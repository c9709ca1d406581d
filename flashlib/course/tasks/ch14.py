"""Chapter 14: the memory's share, what a gate makes of it, and chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong


def memory_share(lse_memory: Tensor, lse_local: Tensor) -> Tensor:
    return torch.sigmoid(lse_memory - lse_local)


def gated_share(w: float, alpha: float) -> float:
    return alpha * w / (1 - w + alpha * w)


def _lses(generator: torch.Generator) -> list[tuple]:
    a, b = (3 * torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    return [(a, b), (a + 1000, b + 1000)]


TASKS = (
    Task(
        "14-share",
        "memory_share",
        memory_share,
        (
            Wrong("it overflows", "Both exponentials may be huge. What does their quotient depend on?", lambda a, b: a.exp() / (a.exp() + b.exp())),
            Wrong("the prompt's share", "Which of the two is in the numerator?", lambda a, b: torch.sigmoid(b - a)),
            Wrong("the logarithms are divided", "lse is the logarithm of a weight.", lambda a, b: a / (a + b)),
        ),
        _lses,
        lines=1,
    ),
    Task(
        "14-gated",
        "gated_share",
        gated_share,
        (
            Wrong("that is blending", "The gate also counts in the denominator.", lambda w, alpha: alpha * w),
            Wrong("the prompt is gated, too", "Only the memory's exponentials count alpha times.", lambda w, alpha: alpha * w / (alpha * (1 - w) + alpha * w) if alpha else 0.0),
            Wrong("alpha is added", "Each exponential of the memory counts alpha times: a factor.", lambda w, alpha: (w + alpha) / (1 + alpha)),
        ),
        lambda g: [(0.99, 0.1), (0.3, 0.5), (0.5, 1.0), (0.7, 0.25)],
        lines=1,
    ),
)  # fmt: skip
