"""Causal attention over a sequence that lies on several ranks, as each of them runs it.

A rank is a generator. What it yields is a request to the network; what comes back from the yield is the answer. The network is as one of GPUs is: a rank that
sends waits until the other one receives. Graded is what comes over it, so that a rank which waits for ever is seen at once, and no process hangs.
"""

import torch
from torch import Tensor


class Rank:
    """Given. How a generator of this file is driven from outside: its first request, and then the next for each answer."""

    def __init__(self, rank, q, k, v, places) -> None:
        self._steps = ring_attention(rank, q.clone(), k.clone(), v.clone(), places)

    def send(self, answer=None) -> list:
        """``["request", what it yields]``, or ``["done", what it returns]``."""
        try:
            return ["request", self._steps.send(None if answer is None else answer.clone())]
        except StopIteration as end:
            return ["done", end.value]


def balanced(length: int, ranks: int) -> list[list[int]]:
    """Which positions of a sequence each rank takes: a list for each rank, ascending. Every position lies on one rank.

    Position i has i + 1 keys to look at. No rank has more than a tenth above the mean of them, where ``length`` is at least 32 for each rank, and no
    rank has more than 2 positions more than another. Any ``length`` from 0 is taken.
    """
    # BEGIN SOLUTION
    cuts = [length * part // (2 * ranks) for part in range(2 * ranks + 1)]
    runs = [list(range(cuts[part], cuts[part + 1])) for part in range(2 * ranks)]
    return [runs[rank] + runs[-1 - rank] for rank in range(ranks)]
    # END SOLUTION


def attend(q: Tensor, k: Tensor, v: Tensor, rows: list[int], keys: list[int]) -> tuple[Tensor, Tensor]:
    """Causal attention over some keys: a row at position i sees the keys at positions up to i, of those that are here.

    Args:
        q: ``[H, R, D]`` float32, for the R positions ``rows``. k: ``[H, K, D]``. v: ``[H, K, D]``, for the K positions ``keys``. R and K may be 0.

    Returns:
        out ``[H, R, D]`` and lse ``[H, R]``, the logarithm of the sum of the exponentials of a row's scores ``q k / sqrt(D)``. A row that sees none of the keys
        has out 0 and lse -inf.
    """
    # BEGIN SOLUTION
    here, there = (torch.tensor(places, dtype=torch.int64) for places in (rows, keys))
    scores = (q @ k.mT) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(there > here[:, None], float("-inf"))
    if not keys:
        return torch.zeros_like(q), q.new_full(q.shape[:2], float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log())[..., 0]
    return (weights @ v) / total.masked_fill(total == 0, 1.0), lse
    # END SOLUTION


def ring_attention(rank: int, q: Tensor, k: Tensor, v: Tensor, places: list[list[int]]):
    """A generator that computes the rows of one rank over the keys of all: yields requests, and returns ``(out, lse)``, as `attend` would over all keys.

    The requests, as tuples. Each is answered by what was received, or None:

    * ``("send", to, x)``: a tensor to a rank. The answer, None, comes once that rank receives.
    * ``("receive", source)``: the next tensor that this rank sends.
    * ``("exchange", to, x, source)``: both at once, for a rank that would otherwise wait for one that waits.

    What is sent from one rank to another is keys and values that some row there sees, each once, and nothing else; no message where there are none.
    Beside its own, a rank holds keys and values of one other rank at a time.

    Args:
        q, k, v: ``[H, n, D]`` float32, of this rank's n positions.
        places: the positions on each rank, ascending, by rank; in any arrangement, and some ranks may have none.
    """
    # BEGIN SOLUTION
    ranks, mine = len(places), places[rank]
    out, lse = attend(q, k, v, mine, mine)
    for step in range(1, ranks):
        to, source = (rank + step) % ranks, (rank - step) % ranks
        wanted = _seen(mine, places[source])
        given = _seen(places[to], mine)
        message = torch.stack([k[:, : len(given)], v[:, : len(given)]])
        if given and wanted:
            came = yield ("exchange", to, message, source)
        elif given:
            came = yield ("send", to, message)
        elif wanted:
            came = yield ("receive", source)
        if wanted:
            out, lse = _merged(out, lse, *attend(q, came[0], came[1], mine, wanted))
    return out, lse


def _seen(rows, keys):
    """Those of some ascending keys that some row sees: all up to the last row."""
    return [key for key in keys if rows and key <= rows[-1]]


def _merged(out, lse, other_out, other_lse):
    top = torch.maximum(lse, other_lse)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weight, other = torch.exp(lse - top), torch.exp(other_lse - top)
    total = weight + other
    share = total.masked_fill(total == 0, 1.0)
    return (weight / share)[..., None] * out + (other / share)[..., None] * other_out, top + total.log()
    # END SOLUTION
