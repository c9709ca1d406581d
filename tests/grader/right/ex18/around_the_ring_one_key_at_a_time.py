"""Rows loop in Python, the network is used in turns: even ranks send first, and a receive comes before each send elsewhere."""

import math

import torch


class Rank:
    def __init__(self, rank, q, k, v, places):
        self._steps = ring_attention(rank, q.clone(), k.clone(), v.clone(), places)

    def send(self, answer=None):
        try:
            return ["request", self._steps.send(None if answer is None else answer.clone())]
        except StopIteration as end:
            return ["done", end.value]


def balanced(length, ranks):
    parts = [[] for _ in range(ranks)]
    for at in range(length):  # striped, and every other stripe turned round
        stripe, place = divmod(at, ranks)
        parts[ranks - 1 - place if stripe % 2 else place].append(at)
    return parts


def attend(q, k, v, rows, keys):
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf)
    for n, row in enumerate(rows):
        count = sum(key <= row for key in keys)
        if count:
            scores = torch.einsum("hd,hkd->hk", q[:, n], k[:, :count]) / math.sqrt(q.shape[2])
            lse[:, n] = scores.logsumexp(1)
            out[:, n] = torch.einsum("hk,hkd->hd", torch.exp(scores - lse[:, n, None]), v[:, :count])
    return out, lse


def ring_attention(rank, q, k, v, places):
    out, lse = attend(q, k, v, places[rank], places[rank])
    # All pairs of ranks in one order that is the same everywhere: of those that wait, the first pair can always go on.
    for first in range(len(places)):
        for second in range(first + 1, len(places)):
            if rank not in (first, second):
                continue
            other = first + second - rank
            for sender, receiver in ((first, second), (second, first)):
                needed = [key for key in places[sender] if places[receiver] and key <= places[receiver][-1]]
                if not needed:
                    continue
                for what in (0, 1):
                    if rank == sender:
                        yield ("send", other, (k, v)[what][:, : len(needed)].contiguous())
                    elif what == 0:
                        keys = yield ("receive", other)
                    else:
                        values = yield ("receive", other)
                        more, more_lse = attend(q, keys, values, places[rank], needed)
                        del keys, values
                        total = torch.logaddexp(lse, more_lse)
                        finite = total.masked_fill(total == -math.inf, 0.0)
                        out = torch.exp(lse - finite)[..., None] * out + torch.exp(more_lse - finite)[..., None] * more
                        lse = total
    return out, lse
