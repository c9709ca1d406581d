# diagnosis: not-in-a-kernel
import math

import torch


def attention_forward(q, k, v, scale=None, block_m=64, block_n=32):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:3])
    k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1, -1) for x in (k, v))
    q = q.unflatten(1, (k.shape[1], -1))
    for i in range(0, q.shape[3], block_m):
        q_tile = q[:, :, :, i : i + block_m].float() * scale
        m = torch.full(q_tile.shape[:-1], -torch.inf)
        l = torch.zeros(q_tile.shape[:-1])
        acc = torch.zeros(*q_tile.shape)
        for j in range(0, k.shape[3], block_n):
            scores = q_tile @ k[:, :, :, j : j + block_n].float().mT
            m_new = torch.maximum(m, scores.amax(-1))
            rescale, p = torch.exp(m - m_new), torch.exp(scores - m_new[..., None])
            l = l * rescale + p.sum(-1)
            acc = acc * rescale[..., None] + p @ v[:, :, :, j : j + block_n].float()
            m = m_new
        out[:, :, i : i + block_m] = (acc / l[..., None]).flatten(1, 2)
        lse[:, :, i : i + block_m] = (m + l.log()).flatten(1, 2)
    return out, lse
