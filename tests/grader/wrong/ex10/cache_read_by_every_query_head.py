# diagnosis: cache-read-too-often
import torch
from torch import Tensor


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    if lses.shape[0] == 0:
        return torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)
    m = lses.amax(0)
    shift = torch.where(lses == m, 0.0, lses - m)
    w = torch.where(lses == -torch.inf, 0.0, torch.exp(shift))
    total = w.sum(0)
    outs = torch.where(lses[..., None] == -torch.inf, 0.0, outs)
    out = (w[..., None] * outs).sum(0) / torch.where(total == 0, 1.0, total)[..., None]
    out[(lses == torch.inf).sum(0) > 1] = torch.nan
    return out, m + total.log()


def split_ranges(length: int, num_splits: int, block: int) -> list[tuple[int, int]]:
    blocks = -(-length // block)
    per_split = -(-blocks // num_splits) * block
    ranges = []
    for s in range(num_splits):
        ranges.append((min(s * per_split, length), min((s + 1) * per_split, length)))
    return ranges


def choose_num_splits(length: int, block: int, programs: int, sm_count: int) -> int:
    blocks = -(-length // block)
    best, best_time = 1, None
    for n in range(1, blocks + 1):
        waves = -(-programs * n // sm_count)
        time = waves * (1 - (-blocks // n))
        if best_time is None or time < best_time:
            best, best_time = n, time
    return best


def split_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, num_splits: int, block: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, q_heads = q.shape[:2]
    kv_heads = k.shape[1]
    outs = torch.zeros(num_splits, batch, q_heads, v.shape[-1])
    lses = torch.full((num_splits, batch, q_heads), -torch.inf)
    for b in range(batch):
        for s, (start, stop) in enumerate(split_ranges(int(lengths[b]), num_splits, block)):
            if start == stop:
                continue
            for h in range(q_heads):
                kv_head = h * kv_heads // q_heads
                scores = k[b, kv_head, start:stop] @ q[b, h] * scale
                lses[s, b, h] = scores.logsumexp(0)
                outs[s, b, h] = torch.softmax(scores, 0) @ v[b, kv_head, start:stop]
    return combine(outs, lses)
