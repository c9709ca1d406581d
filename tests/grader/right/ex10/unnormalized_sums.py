import math

import torch


def combine(outs, lses):
    """In float64, with the softmax of PyTorch over the pieces."""
    if outs.size(0) == 0:
        return outs.new_zeros(outs.shape[1:]), lses.new_full(lses.shape[1:], float("-inf"))
    outs, lses = outs.double(), lses.double()
    seen = lses > float("-inf")
    overflowed = (lses == float("inf")).double()
    count = overflowed.sum(dim=0)
    shares = torch.softmax(lses, dim=0)
    shares = torch.where(count > 0, overflowed / count, torch.where(seen.any(dim=0), shares, 0.0))
    outs = torch.where(seen.unsqueeze(-1), outs, 0.0)
    out = torch.einsum("p...,p...d->...d", shares, outs)
    out[count > 1] = float("nan")
    return out.float(), torch.logsumexp(lses, dim=0).float()


def split_ranges(length, num_splits, block):
    blocks = math.ceil(length / block)
    ends = [min(length, block * math.ceil(blocks * (s + 1) / num_splits)) for s in range(num_splits)]
    return [(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def choose_num_splits(length, block, programs, sm_count):
    blocks = max(1, math.ceil(length / block))
    best = 1
    for n in range(2, blocks + 1):
        if _time(n, blocks, programs, sm_count) < _time(best, blocks, programs, sm_count):
            best = n
    return best


def _time(n, blocks, programs, sm_count):
    return math.ceil(n * programs / sm_count) * (1 + math.ceil(blocks / n))


def split_decode(q, k, v, lengths, num_splits, block, scale=None):
    """Each split keeps a maximum, a sum and an unnormalized out; they are divided before they are combined."""
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for split in range(num_splits):
        out = torch.full((*q.shape[:2], v.shape[-1]), float("nan"))  # of an empty split, it may hold anything
        lse = torch.full(q.shape[:2], float("-inf"))
        for b in range(q.shape[0]):
            start, stop = split_ranges(int(lengths[b]), num_splits, block)[split]
            if stop > start:
                scores = torch.stack(
                    [q[b, h * group : (h + 1) * group] @ k[b, h, start:stop].t() for h in range(k.shape[1])]
                )
                scores = scores.mul(factor)
                peak = scores.max(dim=2, keepdim=True).values
                weights = (scores - peak).exp()
                total = weights.sum(dim=2, keepdim=True)
                out[b] = (torch.bmm(weights, v[b, :, start:stop]) / total).flatten(0, 1)
                lse[b] = (peak + total.log()).flatten()
        outs.append(out)
        lses.append(lse)
    return combine(torch.stack(outs), torch.stack(lses))
