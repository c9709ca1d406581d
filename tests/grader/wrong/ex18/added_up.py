# diagnosis: added-up
import torch
from torch import Tensor


class Rank:
    def __init__(self, rank, q, k, v, places) -> None:
        self._steps = ring_attention(rank, q.clone(), k.clone(), v.clone(), places)

    def send(self, answer=None) -> list:
        try:
            return ["request", self._steps.send(None if answer is None else answer.clone())]
        except StopIteration as end:
            return ["done", end.value]


def balanced(length: int, ranks: int) -> list[list[int]]:
    cuts = [length * part // (2 * ranks) for part in range(2 * ranks + 1)]
    runs = [list(range(cuts[part], cuts[part + 1])) for part in range(2 * ranks)]
    return [runs[rank] + runs[-1 - rank] for rank in range(ranks)]


def attend(q: Tensor, k: Tensor, v: Tensor, rows: list[int], keys: list[int]) -> tuple[Tensor, Tensor]:
    here, there = (torch.tensor(places, dtype=torch.int64) for places in (rows, keys))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(there > here[:, None], float("-inf"))
    if not keys:
        return (torch.zeros_like(q), q.new_full(q.shape[:2], float("-inf")))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log())[..., 0]
    return (weights @ v / total.masked_fill(total == 0, 1.0), lse)


def ring_attention(rank: int, q: Tensor, k: Tensor, v: Tensor, places: list[list[int]]):
    ranks, mine = (len(places), places[rank])
    out, lse = attend(q, k, v, mine, mine)
    for step in range(1, ranks):
        to, source = ((rank + step) % ranks, (rank - step) % ranks)
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
    return (out, lse)


def _seen(rows, keys):
    return [key for key in keys if rows and key <= rows[-1]]


def _merged(out, lse, other_out, other_lse):
    top = torch.maximum(lse, other_lse)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weight, other = (torch.exp(lse - top), torch.exp(other_lse - top))
    total = weight + other
    return (out + other_out, top + total.log())
