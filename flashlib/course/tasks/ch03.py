"""Chapter 03: the two loops, and what they read."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong
from flashlib.tiled import online_softmax_step


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def empty_state(rows: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows, head_dim)


def _state(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.to(q.dtype) for x in empty_state(q.shape[0], v.shape[1]))


def over_keys(q_rows: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    state = _state(q_rows, v)
    for keys in cut(k.shape[0], size):
        state = online_softmax_step(state, q_rows @ k[keys].T, v[keys])
    return state[2] / state[1][:, None]


def _over_keys(*, divide=True, restart=False, whole_only=False):
    def wrong(q_rows, k, v, size):
        state = _state(q_rows, v)
        for keys in cut(k.shape[0], size):
            if whole_only and keys.stop - keys.start < size:
                continue
            if restart:
                state = _state(q_rows, v)
            state = online_softmax_step(state, q_rows @ k[keys].T, v[keys])
        return state[2] / state[1][:, None] if divide else state[2]

    return wrong


def over_rows(q: Tensor, k: Tensor, v: Tensor, size_q: int, size_k: int) -> Tensor:
    return torch.cat([over_keys(q[rows], k, v, size_k) for rows in cut(q.shape[0], size_q)])


def reads_of_keys(tokens: int, size_q: int) -> int:
    return -(-tokens // size_q)


TASKS = (
    Task(
        "03-cut",
        "cut",
        cut,
        (
            Wrong("the last block, which is not full, is missing", "1,000 is not a multiple of 64, and the last 40 count too.", lambda n, b: [slice(i * b, (i + 1) * b) for i in range(n // b)]),
            Wrong("the last block runs past the end", "It ends where the rows end.", lambda n, b: [slice(i, i + b) for i in range(0, n, b)]),
            Wrong("the blocks overlap by one", "A slice does not include its end.", lambda n, b: [slice(i, min(i + b + 1, n)) for i in range(0, n, b)]),
        ),
        lambda g: [(12, 4), (10, 4), (3, 8)],
        lines=1,
    ),
    Task(
        "03-over-keys",
        "over_keys",
        over_keys,
        (
            Wrong("the division at the end is missing", "acc is a sum of exponentials times values. Of what is it a mean?", _over_keys(divide=False)),
            Wrong("each block starts from the empty state", "The state is what is carried from one block to the next.", _over_keys(restart=True)),
            Wrong("the last, narrow block of keys is left out", "Does your loop reach the end if the size does not divide the number of keys?", _over_keys(whole_only=True)),
        ),
        lambda g: [(_random(g, 3, 4), _random(g, n, 4), _random(g, n, 2), size) for n, size in ((6, 2), (7, 3), (5, 8))],
        lines=4,
    ),
    Task(
        "03-over-rows",
        "over_rows",
        over_rows,
        (
            Wrong("queries see only the keys of their own block", "Every block of rows meets all the keys.", lambda q, k, v, a, b: torch.cat([over_keys(q[r], k[r], v[r], b) for r in cut(q.shape[0], a)])),
            Wrong("the last, narrow block of rows is left out", "The rows may not fill their last block.", lambda q, k, v, a, b: torch.cat([over_keys(q[r], k, v, b) for r in cut(q.shape[0], a) if r.stop - r.start == a] or [q[:0] @ k.T @ v])),
            Wrong("blocks lie beside one another", "Blocks of rows belong below one another, along the first axis.", lambda q, k, v, a, b: torch.stack([over_keys(q[i : i + 1], k, v, b)[0] for i in range(q.shape[0])], dim=1)),
        ),
        lambda g: [(_random(g, n, 4), _random(g, n, 4), _random(g, n, 2), a, b) for n, a, b in ((6, 2, 3), (7, 3, 2))],
        lines=1,
    ),
    Task(
        "03-key-reads",
        "reads_of_keys",
        reads_of_keys,
        (
            Wrong("the narrow block is not counted", "It needs all the keys, too.", lambda n, b: n // b),
            Wrong("a fraction of a pass", "A block of rows reads all the keys or none.", lambda n, b: n / b),
            Wrong("every row reads the keys by itself", "All rows of a block share a tile of keys.", lambda n, b: n),
            Wrong("the keys are read once", "That is the other loop order.", lambda n, b: 1),
        ),
        lambda g: [(1000, 64), (1024, 64), (100, 128)],
        lines=1,
    ),
)  # fmt: skip
