"""Plain Python over the rows and the tiles, and each tile's part merged by its lse."""

import torch
from torch import Tensor


def intervals(
    q_len: int, kv_len: int, left: int | None = None, right: int | None = None, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    lengths = [kv_len] if key_lengths is None else key_lengths.tolist()
    start = torch.zeros(len(lengths), q_len, dtype=torch.int64)
    stop = torch.zeros(len(lengths), q_len, dtype=torch.int64)
    for b, length in enumerate(lengths):
        for i in range(q_len):
            position = kv_len - q_len + i
            first = 0 if left is None else max(0, position - left)
            end = length if right is None else min(length, position + right + 1)
            if first < end:
                start[b, i], stop[b, i] = first, end
    return start, stop


def tile_map(start: Tensor, stop: Tensor, kv_len: int, block_q: int, block_k: int) -> Tensor:
    rows = start.shape[1]
    columns = []
    for first in range(0, kv_len, block_k):
        last = min(first + block_k, kv_len)
        full = (start <= first) & (stop >= last)
        empty = (stop <= first) | (start >= last) | (start == stop)
        column = []
        for row in range(0, rows, block_q):
            some = ~empty[:, row : row + block_q].all(1)
            column.append(some.to(torch.int8) + full[:, row : row + block_q].all(1).to(torch.int8))
        columns.append(torch.stack(column, dim=1))
    return torch.stack(columns, dim=2)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = q.shape
    out = torch.zeros(batch, heads, queries, v.shape[3])
    lse = torch.full((batch, heads, queries), -torch.inf)
    start, stop = start.expand(batch, queries), stop.expand(batch, queries)
    kinds = tile_map(start, stop, k.shape[2], block_q, block_k)
    for b, i, j in kinds.nonzero().tolist():
        row, key = i * block_q, j * block_k
        rows, keys = slice(row, row + block_q), slice(key, min(key + block_k, k.shape[2]))
        number = torch.arange(keys.start, keys.stop)
        seen = (number >= start[b, rows, None]) & (number < stop[b, rows, None])
        scores = torch.where(seen, q[b, :, rows] @ k[b, :, keys].transpose(-1, -2) * dim**-0.5, -torch.inf)
        part_lse = torch.logsumexp(scores, -1)
        new_lse = torch.logaddexp(lse[b, :, rows], part_lse)
        pivot = torch.where(new_lse == -torch.inf, 0.0, new_lse)
        values = torch.where(seen.any(0)[:, None], v[b, :, keys], 0.0)
        kept = torch.exp(lse[b, :, rows] - pivot)[..., None]
        out[b, :, rows] = out[b, :, rows] * kept + torch.exp(scores - pivot[..., None]) @ values
        lse[b, :, rows] = new_lse
    return out, lse
