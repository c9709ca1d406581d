# diagnosis: mutated-input, skips-nothing
import math

import torch
from torch import Tensor


def intervals(
    q_len: int, kv_len: int, left: int | None = None, right: int | None = None, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    position = torch.arange(q_len) + kv_len - q_len
    start = torch.zeros(q_len, dtype=torch.int64) if left is None else position - left
    stop = torch.full((q_len,), kv_len) if right is None else position + right + 1
    lengths = torch.tensor([kv_len]) if key_lengths is None else key_lengths
    start = start.clamp(min=0).expand(len(lengths), q_len)
    stop = torch.minimum(stop, lengths[:, None])
    sees_something = start < stop
    return torch.where(sees_something, start, 0), torch.where(sees_something, stop, 0)


def tile_map(start: Tensor, stop: Tensor, kv_len: int, block_q: int, block_k: int) -> Tensor:
    first = torch.arange(0, kv_len, block_k)
    last = (first + block_k).clamp(max=kv_len)
    kinds = []
    for rows_start, rows_stop in zip(start.split(block_q, dim=1), stop.split(block_q, dim=1), strict=True):
        overlap = torch.minimum(rows_stop[..., None], last) - torch.maximum(rows_start[..., None], first)
        seen = overlap.clamp(min=0)
        kind = 1 + (seen == last - first).all(1).to(torch.int8) - (seen == 0).all(1).to(torch.int8)
        kinds.append(kind)
    return torch.stack(kinds, dim=1)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    k[~k.isfinite()] = 0.0
    v[~v.isfinite()] = 0.0
    kinds = tile_map(start, stop, k.shape[2], block_q, block_k)
    needed, full = (kinds != 0).any(0), (kinds == 2).all(0)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    for i in range(needed.shape[0]):
        rows = slice(i * block_q, (i + 1) * block_q)
        q_tile = q[:, :, rows] / math.sqrt(q.shape[3])
        m = q.new_full(q_tile.shape[:3], -torch.inf)
        l, acc = torch.zeros_like(m), q.new_zeros(*m.shape, v.shape[3])
        for j in needed[i].nonzero().flatten().tolist():
            keys = slice(j * block_k, (j + 1) * block_k)
            scores, v_tile = q_tile @ k[:, :, keys].mT, v[:, :, keys]
            if not full[i, j]:
                key = keys.start + torch.arange(v_tile.shape[2])
                visible = (key >= start[:, rows, None]) & (key < stop[:, rows, None])
                scores = scores.masked_fill(~visible[:, None], -torch.inf)
                v_tile = v_tile.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
            m_new = torch.maximum(m, scores.amax(-1))
            pivot = m_new.masked_fill(m_new == -torch.inf, 0.0)
            weights, rescale = torch.exp(scores - pivot[..., None]), torch.exp(m - pivot)
            m, l, acc = m_new, l * rescale + weights.sum(-1), acc * rescale[..., None] + weights @ v_tile
        out[:, :, rows] = acc / l.masked_fill(l == 0, 1.0)[..., None]
        lse[:, :, rows] = m + l.log()
    return out, lse
