# diagnosis: untiled, skips-nothing
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
    key = torch.arange(k.shape[2])
    visible = (key >= start[:, :, None]) & (key < stop[:, :, None])
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~visible[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return weights @ v.masked_fill(~visible.any(1)[:, None, :, None], 0.0), lse
