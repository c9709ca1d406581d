# diagnosis: last-split-dropped, tail-dropped
"""Split-KV decoding: one query, a long cache, and as many workers as the GPU has.

A token that is being written brings one query per head, and its whole cache must be read for it. With one program for each
request and KV head, most of a GPU has nothing to do. So the cache is cut into splits, each is attended to on its own, and the
results are combined. What makes that exact is one number per row, the log-sum-exp.
"""

import math

import torch
from torch import Tensor


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from the attention over P sets of them. No key is in two sets.

    Args:
        outs: float32 ``[P, ..., Dv]``, each normalized over the keys of its own set.
        lses: float32 ``[P, ...]``, the natural logarithm of the sum of exp(score) over the set. -inf: the set has no visible
            key; its out may then hold anything, even NaN. +inf: a score of the set overflowed, and the set outweighs every
            one whose lse is smaller. Change neither of the two. P may be 0.

    Returns:
        out ``[..., Dv]`` and lse ``[...]`` for all keys. It does not matter in which order the sets come, or if some have
        been combined before. Where no set has a key, out is 0 and lse -inf. Where two or more lse are +inf, nobody knows how
        the sets compare: out is NaN and lse +inf.
    """
    if not len(lses):
        return torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)
    pivot = lses.amax(0)
    # The difference of two equal infinities is NaN. Equal numbers differ by 0, whatever they are.
    weights = torch.exp(torch.where(lses == pivot, 0.0, lses - pivot))
    weights = weights.masked_fill(lses == -torch.inf, 0.0)
    total = weights.sum(0)
    # A weight of 0 does not hide a NaN: 0 * NaN is NaN.
    outs = outs.masked_fill((weights == 0)[..., None], 0.0)
    out = (weights[..., None] * outs).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    undecided = (lses == torch.inf).sum(0) > 1
    return out.masked_fill(undecided[..., None], torch.nan), pivot + total.log()


def split_ranges(length: int, num_splits: int, block: int) -> list[tuple[int, int]]:
    """Cut `length` keys into `num_splits` ranges of whole blocks, so that none takes longer than it must.

    Args:
        length: at least 0.
        num_splits: at least 1.
        block: keys that a program reads at a time, at least 1.

    Returns:
        `num_splits` pairs (start, stop), one behind the other, which cover 0 .. length - 1 without gap and without overlap.
        Every start and stop is a multiple of `block`, or `length`. No range takes more than
        ceil(ceil(length / block) / num_splits) blocks: all of them run at once, and the longest decides. If there are fewer
        blocks than splits, some ranges are empty: start == stop.
    """
    blocks = math.ceil(length / block)

    def bound(split: int) -> int:
        return min(split * blocks // num_splits * block, length)

    return [(bound(split), bound(split + 1)) for split in range(num_splits)]


def choose_num_splits(length: int, block: int, programs: int, sm_count: int) -> int:
    """Into how many splits to cut caches of `length` keys, so that the launch is done soonest.

    Unsplit, a launch has `programs` programs, one for each request and KV head. With n splits it has n times as many, and
    each takes ceil(ceil(length / block) / n) + 1 units of time: one for each block, and one to begin and to write its result.
    The GPU runs `sm_count` programs at a time, and the next `sm_count` begin when those have ended.

    Args:
        length: at least 0.
        block, programs, sm_count: at least 1.

    Returns:
        the smallest number of splits with the shortest time, among 1 .. ceil(length / block). 1 if there is no key.
    """
    blocks = math.ceil(length / block)

    def time(num_splits: int) -> int:
        return math.ceil(programs * num_splits / sm_count) * (math.ceil(blocks / num_splits) + 1)

    return min(range(1, max(1, blocks) + 1), key=time)  # of several equally short ones, min answers with the first


def split_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, num_splits: int, block: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each request's new token over its cache, cut into `num_splits` splits as `split_ranges` says.

    Args:
        q: ``[B, Hq, D]``, one query for each head.
        k: ``[B, Hkv, C, D]``, Hkv a divisor of Hq: query head h looks at KV head h // (Hq / Hkv).
        v: ``[B, Hkv, C, Dv]``. All three in float32, any strides; leave them as they are.
        lengths: int64 ``[B]``, 0 to C. Request b sees its keys 0 .. lengths[b] - 1. What lies behind them is left over from
            somebody else: it is not read, and may be NaN.
        num_splits: splits of each request's keys, at least 1. There may be more of them than keys.
        block: keys in a block, at least 1.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.

    Returns:
        out float32 ``[B, Hq, Dv]``, and lse float32 ``[B, Hq]``; 0 and -inf for a request without keys.

    Memory: the splits know nothing of each other. No tensor made on the way has more than twice as many elements as the
    largest of these: the keys, the values and the scores (of all query heads) of one split of one request, and the results
    of all splits, ``[num_splits, B, Hq, Dv]``.

    Traffic: every visible key and value is read once for all heads of its group, and nothing else of k and v is read.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    outs = torch.zeros(num_splits, *q.shape[:2], v.shape[-1])
    lses = torch.full(outs.shape[:-1], -torch.inf)
    for request, length in enumerate(lengths.tolist()):
        for split, (start, stop) in enumerate(split_ranges(length, num_splits, block)[:-1]):
            if start < stop:
                piece = q[request], k[request, :, start:stop], v[request, :, start:stop]
                outs[split, request], lses[split, request] = _attend(*piece, scale)
    return combine(outs, lses)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [Hq, Dv] and lse [Hq] of q [Hq, D] over the n >= 1 keys k [Hkv, n, D] with values v [Hkv, n, Dv]."""
    rows = q.reshape(k.shape[0], -1, q.shape[-1]) * scale  # the heads of a group are the rows of one matrix
    scores = rows @ k.mT
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse[..., None]) @ v
    return out.flatten(0, 1), lse.flatten()
