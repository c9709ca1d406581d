# Exercise 18: Ring attention
# difficulty 4/5 · importance 4/5 · about 90 minutes
# Chapter: notebooks/17_many_gpus.ipynb
#
# Check your work with `flashlib grade ex18`, or in a notebook with `check("ex18")`.

"""Causal attention over a sequence that lies on several ranks, as each of them runs it.

A rank is a generator. What it yields is a request to the network; what comes back from the yield is the answer. The network is as one of GPUs is: a rank that
sends waits until the other one receives. Graded is what comes over it, so that a rank which waits for ever is seen at once, and no process hangs.
"""

import torch  # noqa: F401
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
    raise NotImplementedError("write balanced here")


def attend(q: Tensor, k: Tensor, v: Tensor, rows: list[int], keys: list[int]) -> tuple[Tensor, Tensor]:
    """Causal attention over some keys: a row at position i sees the keys at positions up to i, of those that are here.

    Args:
        q: ``[H, R, D]`` float32, for the R positions ``rows``. k: ``[H, K, D]``. v: ``[H, K, D]``, for the K positions ``keys``. R and K may be 0.

    Returns:
        out ``[H, R, D]`` and lse ``[H, R]``, the logarithm of the sum of the exponentials of a row's scores ``q k / sqrt(D)``. A row that sees none of the keys
        has out 0 and lse -inf.
    """
    raise NotImplementedError("write attend here")


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
    raise NotImplementedError("write ring_attention here")
