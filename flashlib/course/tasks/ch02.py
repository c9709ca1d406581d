"""Chapter 02: the step, with and without values, and the merge."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong


def _row(generator: torch.Generator, size: int, height: float = 0.0) -> Tensor:
    return 3 * torch.randn(size, generator=generator, dtype=torch.float64) + height


def safe_softmax(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.max())
    return weights / weights.sum()


def update(m: Tensor, l: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    m_new = torch.maximum(m, block.max())
    return m_new, l * torch.exp(m - m_new) + torch.exp(block - m_new).sum()


def _update(rescale, pivot=torch.maximum, keep=1.0):
    def wrong(m, l, block):
        m_new = pivot(m, block.max())
        return m_new, keep * l * rescale(m, m_new) + torch.exp(block - m_new).sum()

    return wrong


def _no_rescale(m, m_new):
    return torch.ones_like(m)


def _old_reference(m: Tensor, l: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    m_new = torch.maximum(m, block.max())
    return m_new, l * torch.exp(m - m_new) + torch.exp(block - m).sum()


def carry(m: Tensor, l: Tensor, acc: Tensor, block: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m_new = torch.maximum(m, block.max())
    rescale, p = torch.exp(m - m_new), torch.exp(block - m_new)
    return m_new, l * rescale + p.sum(), acc * rescale + p @ values


def _carry(which: str):
    def wrong(m, l, acc, block, values):
        m_new, l_new, acc_new = carry(m, l, acc, block, values)
        p = torch.exp(block - m_new)
        if which == "acc kept":
            acc_new = acc + p @ values
        elif which == "divided":
            acc_new = acc_new / l_new
        elif which == "unweighted":
            acc_new = acc * torch.exp(m - m_new) + values.sum(0)
        return m_new, l_new, acc_new

    return wrong


def merge_two(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    return torch.exp(lse_a - lse) * out_a + torch.exp(lse_b - lse) * out_b, lse


def _merge(weigh, lse=torch.logaddexp):
    def wrong(out_a, lse_a, out_b, lse_b):
        a, b = weigh(lse_a, lse_b)
        return a * out_a + b * out_b, lse(lse_a, lse_b)

    return wrong


def _states(generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A running state of five scores, and a block that raises the maximum, one that does not, and one far below."""
    states = []
    for height in (4.0, -4.0, -300.0):
        seen = _row(generator, 5, height if height < -100 else 0.0)
        block = _row(generator, 4, height)
        states.append((seen.max(), torch.exp(seen - seen.max()).sum(), block))
    return states


def _with_values(generator: torch.Generator) -> list[tuple]:
    cases = []
    for m, l, block in _states(generator):
        acc = _row(generator, 3)
        cases.append((m, l, acc, block, _row(generator, 12).reshape(4, 3)))
    return cases


def _pieces(generator: torch.Generator) -> list[tuple]:
    heights = ((0.0, 0.0), (3.0, -2.0), (-1.0, 4.0), (1000.0, 999.0))
    lses = [[torch.tensor(x, dtype=torch.float64) for x in pair] for pair in heights]
    return [(_row(generator, 3), a, _row(generator, 3), b) for a, b in lses]


TASKS = (
    Task(
        "02-safe-softmax",
        "safe_softmax",
        safe_softmax,
        (
            Wrong("nothing is subtracted", "exp of the largest score must not overflow.", lambda s: torch.exp(s) / torch.exp(s).sum()),
            Wrong("the mean is subtracted", "Then the largest exponent is not 0, and can still overflow.", lambda s: torch.exp(s - s.mean()) / torch.exp(s - s.mean()).sum()),
            Wrong("the sum is taken without the maximum", "Numerator and denominator must use the same constant.", lambda s: torch.exp(s - s.max()) / torch.exp(s).sum()),
            Wrong("it is not divided", "The weights must sum to 1.", lambda s: torch.exp(s - s.max())),
        ),
        lambda g: [(_row(g, 6),), (_row(g, 6, 2000.0) ,), (torch.tensor([0.0, 900.0, 1800.0], dtype=torch.float64),)],
    ),
    Task(
        "02-update",
        "update",
        update,
        (
            Wrong("the old sum is not brought into line", "It was taken relative to the old maximum. By which factor is each of its terms off?", _update(_no_rescale)),
            Wrong("the old sum is multiplied by the inverse of the factor", "e^(s - m') is e^(s - m) times which power of e?", _update(lambda m, m_new: torch.exp(m_new - m))),
            Wrong("the old maximum is forgotten", "A block may hold nothing larger than what was seen before.", _update(lambda m, m_new: torch.exp(m - m_new), pivot=lambda m, new: new)),
            Wrong("the old sum is thrown away", "It need not be: one multiplication repairs it.", _update(lambda m, m_new: torch.exp(m - m_new), keep=0.0)),
            Wrong("the block is taken relative to the old maximum", "Everything in the new sum must be relative to the new maximum.", _old_reference),
        ),
        _states,
    ),
    Task(
        "02-carry",
        "carry",
        carry,
        (
            Wrong("acc is not rescaled", "acc is relative to the old maximum, as l is.", _carry("acc kept")),
            Wrong("acc is divided by l in every step", "The division waits until the end; acc is a sum.", _carry("divided")),
            Wrong("the values are added without their weights", "Each value counts with its exponential.", _carry("unweighted")),
        ),
        _with_values,
        lines=3,
    ),
    Task(
        "02-merge",
        "merge_two",
        merge_two,
        (
            Wrong("the outputs are added", "Each is a mean already: two of them sum to twice too much.", _merge(lambda a, b: (1.0, 1.0))),
            Wrong("the outputs are averaged", "They do not stand for the same weight. What says how much?", _merge(lambda a, b: (0.5, 0.5))),
            Wrong("the weights are the log-sum-exps themselves", "They are logarithms. Of what?", _merge(lambda a, b: (a / (a + b), b / (a + b)))),
            Wrong("the weights overflow", "Subtract something from both exponents first; what was the best choice for a row?", _merge(lambda a, b: (a.exp() / (a.exp() + b.exp()), b.exp() / (a.exp() + b.exp())))),
            Wrong("the new log-sum-exp is the larger one", "It is the logarithm of the sum of both.", _merge(lambda a, b: (torch.sigmoid(a - b), torch.sigmoid(b - a)), torch.maximum)),
        ),
        _pieces,
    ),
)  # fmt: skip
