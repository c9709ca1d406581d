"""The softmax of whole rows, right and in plain steps, for ex01 and ex06."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.grader.exercise import Misconception


def softmax_with(x: Tensor, shift: Tensor) -> Tensor:
    """exp(x - shift) over its sum, in x's dtype or at least float32, with no care for anything."""
    weights = torch.exp(x.to(torch.promote_types(x.dtype, torch.float32)) - shift)
    return weights / weights.sum(-1, keepdim=True)


def row_max(x: Tensor) -> Tensor:
    """The maximum of each row; 0 where the row has no finite entry, so that -inf - max stays -inf."""
    maximum = x.amax(-1, keepdim=True)
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def softmax64(x: Tensor) -> Tensor:
    weights = torch.exp(x.double() - row_max(x.double()))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def softmax_naive(x: Tensor) -> list[Tensor]:
    """Two right ways to round: PyTorch's own, and the formula in at least float32."""
    own = torch.softmax(x, -1).masked_fill((x == -torch.inf).all(-1, keepdim=True), 0.0)
    formula = softmax_with(x, row_max(x)).to(x.dtype)
    return [own, formula.masked_fill((x == -torch.inf).all(-1, keepdim=True), 0.0)]


def softmax_terms(x: Tensor) -> Tensor:
    """Each weight exp(y) / sum: y = x - max is rounded, exp(y) is, and the sum is."""
    shift = x - row_max(x)
    return softmax64(x) * (2 + shift.masked_fill(shift == -torch.inf, 0.0).abs())


NOT_NORMALIZED = Misconception(
    "not-normalized",
    "The exponentials were not divided by their sum.",
    "Softmax gives weights: they sum to 1.",
)
