# diagnosis: padding-multiplied, padding-read
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
    batch, q_heads, dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, dim)
    outs, lses = [], []
    for start, stop in split_ranges(k.shape[2], num_splits, block):
        hidden = torch.arange(start, stop) >= lengths[:, None]
        scores = (rows @ k[:, :, start:stop].mT * scale).masked_fill(hidden[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        outs.append((p @ v[:, :, start:stop]).reshape(batch, q_heads, -1))
        lses.append(lse.reshape(batch, q_heads))
    return combine(torch.stack(outs), torch.stack(lses))
