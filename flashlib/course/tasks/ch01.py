"""Chapter 01: scores, weights, output, and the bytes that they take."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong

_INF = float("inf")


def _rows(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def score(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.T / q.shape[-1] ** 0.5


def weigh(scores: Tensor) -> Tensor:
    future = torch.ones_like(scores).triu(diagonal=1).bool()
    return torch.softmax(scores.masked_fill(future, -_INF), dim=-1)


def _strict(scores: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill(torch.ones_like(scores).triu().bool(), -_INF), dim=-1)


def _over_queries(scores: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill(torch.ones_like(scores).triu(diagonal=1).bool(), -_INF), dim=0)


def mix(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v


def score_bytes(heads: int, tokens: int, itemsize: int) -> int:
    return heads * tokens * tokens * itemsize


TASKS = (
    Task(
        "01-scores",
        "score",
        score,
        (
            Wrong("the scores are not divided by the root of d", "What keeps their size from growing with head_dim?", lambda q, k: q @ k.T),
            Wrong("the scores are divided by d", "The formula divides by the square root of d.", lambda q, k: q @ k.T / q.shape[-1]),
            Wrong("rows and columns are swapped", "Row i must hold query i against every key.", lambda q, k: k @ q.T / q.shape[-1] ** 0.5),
            Wrong("only matching pairs are multiplied", "Every query meets every key, not only its own.", lambda q, k: (q * k).sum(-1) / q.shape[-1] ** 0.5),
        ),
        lambda g: [(_rows(g, n, 16), _rows(g, n, 16)) for n in (1, 3, 6)],
        lines=1,
    ),
    Task(
        "01-weights",
        "weigh",
        weigh,
        (
            Wrong("nothing is hidden", "A token must not look at what comes later.", lambda s: torch.softmax(s, dim=-1)),
            Wrong("a token does not see itself", "The diagonal counts: `triu(diagonal=1)` begins beside it.", _strict),
            Wrong("the softmax runs over the queries", "The weights of one query, a row, sum to 1.", _over_queries),
            Wrong("the future is blanked after the softmax", "Then the rows no longer sum to 1. Hide the scores, with -inf.", lambda s: torch.softmax(s, dim=-1).tril()),
            Wrong("hidden scores are set to 0", "exp(0) is 1, and that is a weight. Which score has the weight 0?", lambda s: torch.softmax(s.tril(), dim=-1)),
        ),
        lambda g: [(_rows(g, n, n),) for n in (2, 5)],
    ),
    Task(
        "01-output",
        "mix",
        mix,
        (
            Wrong("the weights are transposed", "Row i of the output uses row i of the weights.", lambda w, v: w.T @ v),
            Wrong("one weight for each value", "A row is a mean of all values, not its own value scaled.", lambda w, v: w.diagonal()[:, None] * v),
        ),
        lambda g: [(torch.softmax(_rows(g, n, n), -1), _rows(g, n, 4)) for n in (2, 5)],
        lines=1,
    ),
    Task(
        "01-score-bytes",
        "score_bytes",
        score_bytes,
        (
            Wrong("the heads are forgotten", "Each head has a matrix of its own.", lambda h, n, b: n * n * b),
            Wrong("numbers are counted, not bytes", "How many bytes does one number take?", lambda h, n, b: h * n * n),
            Wrong("one row is counted", "There is a row for every token.", lambda h, n, b: h * n * b),
        ),
        lambda g: [(9, 2048, 4), (32, 100, 2), (3, 7, 4)],
        lines=1,
    ),
)  # fmt: skip
