import math

import torch


def softmax(x):
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        visible = row > -math.inf
        out = torch.zeros_like(row)
        if visible.any():
            shifted = row[visible].double() - row[visible].max().double()
            out[visible] = (shifted.exp() / shifted.exp().sum()).to(row.dtype)
        rows.append(out)
    return torch.stack(rows).reshape(x.shape)


def naive_attention(q, k, v, scale=None, causal=False):
    scale = scale or q.shape[-1] ** -0.5
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=q.dtype)
    for i in range(queries):
        visible = i + keys - queries + 1 if causal else keys
        if visible <= 0:
            continue
        scores = scale * (k[:, :, :visible].float() * q[:, :, i : i + 1].float()).sum(-1)
        weights = softmax(scores)[..., None]
        out[:, :, i] = (weights * v[:, :, :visible].float()).sum(2).to(q.dtype)
    return out
