"""Chapter 09: the gradients of attention, one formula at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _weights(generator: torch.Generator, n: int) -> Tensor:
    return torch.softmax(_random(generator, n, n), -1)


def score_gradient(p: Tensor, dp: Tensor) -> Tensor:
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def delta_of(out: Tensor, d_out: Tensor) -> Tensor:
    return (out * d_out).sum(-1)


def weights_again(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(scores - lse[:, None])


def query_and_key_gradients(ds: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scale * ds @ k, scale * ds.mT @ q


TASKS = (
    Task(
        "09-score-gradient",
        "score_gradient",
        score_gradient,
        (
            Wrong("the row's sum is not subtracted", "Raising one score lowers all other weights of the row.", lambda p, dp: p * dp),
            Wrong("the mean of dP is subtracted", "The sum over k has the weights P in it.", lambda p, dp: p * (dp - dp.mean(-1, keepdim=True))),
            Wrong("the sum runs over the queries", "A softmax is of one row.", lambda p, dp: p * (dp - (p * dp).sum(0, keepdim=True))),
            Wrong("the factor P in front is missing", "dS is P times a difference.", lambda p, dp: dp - (p * dp).sum(-1, keepdim=True)),
        ),
        lambda g: [(_weights(g, n), _random(g, n, n)) for n in (3, 6)],
        lines=1,
    ),
    Task(
        "09-query-and-key",
        "query_and_key_gradients",
        query_and_key_gradients,
        (
            Wrong("the scale is missing", "S is sigma Q K^T; what becomes of sigma?", lambda ds, q, k, c: (ds @ k, ds.mT @ q)),
            Wrong("dK is not from the transposed dS", "Key j gathers from all rows: column j of dS.", lambda ds, q, k, c: (c * ds @ k, c * ds @ q)),
            Wrong("queries and keys are swapped", "dQ is made of keys, dK of queries.", lambda ds, q, k, c: (c * ds @ q, c * ds.mT @ k)),
        ),
        lambda g: [(_random(g, n, n), _random(g, n, 4), _random(g, n, 4), 0.5) for n in (3, 6)],
    ),
    Task(
        "09-delta",
        "delta_of",
        delta_of,
        (
            Wrong("it is summed over the rows", "One number for each row: sum over the channels.", lambda o, g: (o * g).sum(0)),
            Wrong("the mean was taken", "A sum over the channels, not a mean.", lambda o, g: (o * g).mean(-1)),
            Wrong("only dO is summed", "dO meets O, channel by channel.", lambda o, g: g.sum(-1)),
        ),
        lambda g: [(_random(g, 4, 8), _random(g, 4, 8)), (_random(g, 8, 8), _random(g, 8, 8))],
        lines=1,
    ),
    Task(
        "09-again",
        "weights_again",
        weights_again,
        (
            Wrong("divided by the LSE", "The LSE is a logarithm: dividing becomes subtracting.", lambda s, lse: torch.exp(s) / lse[:, None]),
            Wrong("the LSE is subtracted from columns", "Each row has its own: lse[:, None].", lambda s, lse: torch.exp(s - lse[None, :])),
            Wrong("nothing is subtracted", "The weights of a row sum to 1.", lambda s, lse: torch.exp(s)),
        ),
        lambda g: [(s := _random(g, n, n), torch.logsumexp(s, -1)) for n in (3, 6)],
        lines=1,
    ),
)  # fmt: skip
