"""Inputs that bring mistakes to light, for the authors of checks. What `Trial.randn` draws, these arrange."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def in_poison(x: Tensor, margin: int = 3) -> Tensor:
    """The same values as a view into a larger buffer of NaN: whoever reads beyond the tensor reads NaN.

    Args:
        x: floating, any shape.
        margin: NaN entries before and after, along every axis.
    """
    buffer = torch.full([size + 2 * margin for size in x.shape], torch.nan, dtype=x.dtype)
    view = buffer[tuple(slice(margin, margin + size) for size in x.shape)]
    view.copy_(x)
    return view


def transposed_in_poison(x: Tensor, margin: int = 3) -> Tensor:
    """``[B, H, S, D]`` values laid out in memory as ``[B, S, H, D]``, with NaN all around."""
    return in_poison(x.transpose(1, 2), margin).transpose(1, 2)


def with_poisoned_tail(x: Tensor, length: int, dim: int = -2) -> Tensor:
    """A copy whose entries from `length` on, along `dim`, are NaN: padding that nobody may read."""
    poisoned = x.clone()
    poisoned.narrow(dim, length, x.shape[dim] - length).fill_(torch.nan)
    return poisoned


def ramp(count: int, low: float, high: float, *, falling: bool = False) -> Tensor:
    """`count` values from `low` to `high`, evenly spaced; the other way round if `falling`."""
    values = torch.linspace(low, high, count)
    return values.flip(0) if falling else values


def with_scores_along(q: Tensor, k: Tensor, profile: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """q and k changed so that every query's scaled score with key j is about ``profile[j]``, plus the noise that was there.

    Decides where the running maximum moves: a rising profile gives every tile a larger maximum than the one before
    (each step must rescale), a falling one puts the maximum into the first tile, a very negative one keeps all below 0.

    Args:
        q: ``[..., Sq, D]``. Its last channel is overwritten.
        k: ``[..., Sk, D]``. Its last channel is overwritten.
        profile: ``[Sk]``, the wanted scores.
        scale: of the scores, ``1 / sqrt(D)`` if None.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k = q.clone(), k.clone()
    weight = max(1.0, float(profile.abs().max()) / scale) ** 0.5  # shared evenly, so that float16 can hold both factors
    q[..., -1] = weight
    k[..., -1] = (profile / (scale * weight)).to(k.dtype)
    return q, k
