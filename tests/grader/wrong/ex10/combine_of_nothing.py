# diagnosis: no-pieces
import torch
from torch import Tensor


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
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
    batch, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    outs = torch.zeros(num_splits, batch, q_heads, v.shape[-1])
    lses = torch.full((num_splits, batch, q_heads), -torch.inf)
    for b in range(batch):
        rows = q[b].reshape(kv_heads, q_heads // kv_heads, dim)
        for s, (start, stop) in enumerate(split_ranges(int(lengths[b]), num_splits, block)):
            if start == stop:
                continue
            scores = rows @ k[b, :, start:stop].mT * scale
            m = scores.amax(-1, keepdim=True)
            p = torch.exp(scores - m)
            l = p.sum(-1, keepdim=True)
            outs[s, b] = (p @ v[b, :, start:stop] / l).reshape(q_heads, -1)
            lses[s, b] = (m + l.log()).reshape(q_heads)
    return combine(outs, lses)
