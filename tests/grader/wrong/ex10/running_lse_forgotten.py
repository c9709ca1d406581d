# diagnosis: running-lse-forgotten
import torch
from torch import Tensor


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    if lses.shape[0] == 0:
        return torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)
    out, lse = outs[0], lses[0]
    for piece, piece_lse in zip(outs[1:], lses[1:], strict=True):
        out, _ = _merge(out, lse, piece, piece_lse)
        lse = piece_lse
    return out, lse


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    m = torch.maximum(lse_a, lse_b)
    w_a = torch.where(lse_a == -torch.inf, 0.0, torch.exp(torch.where(lse_a == m, 0.0, lse_a - m)))
    w_b = torch.where(lse_b == -torch.inf, 0.0, torch.exp(torch.where(lse_b == m, 0.0, lse_b - m)))
    total = w_a + w_b
    out_a = torch.where(w_a[..., None] == 0, 0.0, out_a)
    out_b = torch.where(w_b[..., None] == 0, 0.0, out_b)
    out = (w_a[..., None] * out_a + w_b[..., None] * out_b) / torch.where(total == 0, 1.0, total)[..., None]
    out[(lse_a == torch.inf) & (lse_b == torch.inf)] = torch.nan
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
