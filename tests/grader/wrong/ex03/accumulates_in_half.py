# diagnosis: accumulated-in-half
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
        q_tile = q[:, :, i : i + block_q] * scale
        rows = q_tile.shape[2]
        m = torch.full((batch, heads, rows), -torch.inf, dtype=q.dtype)
        l = torch.zeros(batch, heads, rows, dtype=q.dtype)
        acc = torch.zeros(batch, heads, rows, dv, dtype=q.dtype)
        for j in range(0, sk, block_k):
            k_tile = k[:, :, j : j + block_k]
            v_tile = v[:, :, j : j + block_k]
            scores = q_tile @ k_tile.transpose(-1, -2)
            m_new = torch.maximum(m, scores.amax(-1))
            rescale = torch.exp(m - m_new)
            p = torch.exp(scores - m_new[..., None])
            l = l * rescale + p.sum(-1)
            acc = acc * rescale[..., None] + p @ v_tile
            m = m_new
        out[:, :, i : i + block_q] = acc / l[..., None]
        lse[:, :, i : i + block_q] = m + l.log()
    return out, lse
