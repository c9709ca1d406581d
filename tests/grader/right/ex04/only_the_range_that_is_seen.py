"""Each block of rows goes through the tiles between its first and its last visible key, and masks every one of them."""

import torch
from torch import Tensor


def intervals(
    q_len: int, kv_len: int, left: int | None = None, right: int | None = None, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    lengths = torch.full((1,), kv_len) if key_lengths is None else key_lengths
    position = torch.arange(kv_len - q_len, kv_len).repeat(lengths.shape[0], 1)
    start = torch.clamp(position - (kv_len + q_len if left is None else left), min=0)
    stop = torch.clamp(position + 1 + (kv_len + q_len if right is None else right), min=0)
    stop = torch.minimum(stop, lengths.unsqueeze(1))
    empty = stop <= start
    start[empty] = 0
    stop[empty] = 0
    return start, stop


def tile_map(start: Tensor, stop: Tensor, kv_len: int, block_q: int, block_k: int) -> Tensor:
    batch, rows = start.shape
    tiles_q, tiles_k = -(-rows // block_q), -(-kv_len // block_k)
    kinds = torch.empty(batch, tiles_q, tiles_k, dtype=torch.int8)
    for j in range(tiles_k):
        first, last = j * block_k, min((j + 1) * block_k, kv_len)
        seen = stop.clamp(first, last) - start.clamp(first, last)
        for i in range(tiles_q):
            block = seen[:, i * block_q : (i + 1) * block_q]
            kinds[:, i, j] = 1
            kinds[block.amax(1) == 0, i, j] = 0
            kinds[block.amin(1) == last - first, i, j] = 2
    return kinds


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for q_rows, begin, end in zip(q.split(block_q, 2), start.split(block_q, 1), stop.split(block_q, 1), strict=True):
        shape = q_rows.shape[:3]
        top, total = torch.full((*shape, 1), -torch.inf), torch.zeros(*shape, 1)
        mixed = torch.zeros(*shape, v.shape[3])
        sees = end > begin
        tiles = [
            key for key in range(0, k.shape[2], block_k) if bool((sees & (begin < key + block_k) & (end > key)).any())
        ]
        for key in tiles:
            keys = torch.arange(key, min(key + block_k, k.shape[2]))
            hidden = ((keys < begin[..., None]) | (keys >= end[..., None])).unsqueeze(1)
            k_tile = torch.where(hidden.all(2).unsqueeze(-1), 0.0, k[:, :, key : key + block_k])
            v_tile = torch.where(hidden.all(2).unsqueeze(-1), 0.0, v[:, :, key : key + block_k])
            scores = torch.einsum("bhid,bhjd->bhij", q_rows, k_tile) * q.shape[3] ** -0.5
            scores = torch.where(hidden, -torch.inf, scores)
            higher = torch.maximum(top, scores.max(-1, keepdim=True).values)
            safe = torch.where(higher.isinf(), 0.0, higher)
            p = (scores - safe).exp()
            shrink = (top - safe).exp()
            total = total * shrink + p.sum(-1, keepdim=True)
            mixed = mixed * shrink + torch.einsum("bhij,bhjd->bhid", p, v_tile)
            top = higher
        outs.append(torch.where(total == 0, 0.0, mixed / total))
        lses.append((top + total.log()).squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)
