# diagnosis: untiled
import math

import torch
from torch import Tensor


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, sq, _ = q.shape
    out = torch.zeros(batch, heads, sq, v.shape[-1], dtype=q.dtype)
    lse = torch.zeros(batch, heads, sq)
    for i in range(0, sq, block_q):
        q_tile = q[:, :, i : i + block_q].float() * scale
        scores = q_tile @ k.float().mT
        m = scores.amax(-1)
        p = torch.exp(scores - m[..., None])
        l = p.sum(-1)
        acc = p @ v.float()
        out[:, :, i : i + block_q] = acc / l[..., None]
        lse[:, :, i : i + block_q] = m + l.log()
    return out, lse
