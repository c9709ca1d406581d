# diagnosis: blocks-averaged
import math

import torch
from torch import Tensor


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, sq, _ = q.shape
    sk, dv = v.shape[2:]
    out = torch.zeros(batch, heads, sq, dv, dtype=q.dtype)
    lse = torch.zeros(batch, heads, sq)
    for i in range(0, sq, block_q):
        q_tile = q[:, :, i : i + block_q].float() * scale
        rows = q_tile.shape[2]
        acc = torch.zeros(batch, heads, rows, dv)
        total = torch.full((batch, heads, rows), -torch.inf)
        tiles = range(0, sk, block_k)
        for j in tiles:
            scores = q_tile @ k[:, :, j : j + block_k].float().mT
            acc += torch.softmax(scores, -1) @ v[:, :, j : j + block_k].float() / len(tiles)
            total = torch.logaddexp(total, scores.logsumexp(-1))
        out[:, :, i : i + block_q] = acc
        lse[:, :, i : i + block_q] = total
    return out, lse
