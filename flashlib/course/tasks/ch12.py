"""Chapter 12: merging the splits, and how many to make."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong


def combine_pieces(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(lses, 0)
    return torch.exp(lses - lse) @ outs, lse


def _combine(weigh, lse=lambda lses: torch.logsumexp(lses, 0)):
    def wrong(outs, lses):
        return weigh(lses) @ outs, lse(lses)

    return wrong


def _pieces(generator: torch.Generator) -> list[tuple]:
    lses = ([0.0, 1.0, -2.0], [800.0, 799.0], [3.0, float("-inf"), 2.0, 0.5])
    return [
        (torch.randn(len(of), 4, generator=generator, dtype=torch.float64), torch.tensor(of, dtype=torch.float64))
        for of in lses
    ]


def launch_time(pairs: int, tiles: int, splits: int, multiprocessors: int) -> int:
    waves = -(-pairs * splits // multiprocessors)
    return waves * (-(-tiles // splits) + 2)


TASKS = (
    Task(
        "12-combine",
        "combine_pieces",
        combine_pieces,
        (
            Wrong("the outputs are added", "The weights of a split sum to 1 already.", _combine(torch.ones_like)),
            Wrong("the outputs are averaged", "The splits do not weigh the same.", _combine(lambda lses: torch.full_like(lses, 1 / len(lses)))),
            Wrong("the weights overflow", "Subtract the common lse, or the largest, before you take the exponential.", _combine(lambda lses: lses.exp() / lses.exp().sum())),
            Wrong("the common lse is the largest one", "It is the logarithm of the sum of all.", _combine(lambda lses: lses.softmax(0), lambda lses: lses.max())),
            Wrong("the common lse is the sum", "Logarithms are not added here: what they are logarithms of is.", _combine(lambda lses: lses.softmax(0), lambda lses: lses.sum())),
        ),
        _pieces,
    ),
    Task(
        "12-launch-time",
        "launch_time",
        launch_time,
        (
            Wrong("a wave may be a fraction", "A 133rd program needs a wave, however empty it is.", lambda p, t, s, m: p * s / m * (-(-t // s) + 2)),
            Wrong("the start and the end of a program are forgotten", "A program costs 2 tiles beside its own.", lambda p, t, s, m: -(-p * s // m) * -(-t // s)),
            Wrong("a split may hold a fraction of a tile", "The longest split decides, and it holds whole tiles.", lambda p, t, s, m: -(-p * s // m) * (t / s + 2)),
            Wrong("the splits are not counted as programs", "Each split of each pair is a program.", lambda p, t, s, m: -(-p // m) * (-(-t // s) + 2)),
        ),
        lambda g: [(8, 128, s, 132) for s in (1, 3, 16, 17)] + [(200, 10, 3, 132)],
    ),
)  # fmt: skip
