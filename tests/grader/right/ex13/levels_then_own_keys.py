import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]) @ v, lse


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(a[1], b[1])
    out = torch.exp(a[1] - lse)[..., None] * a[0] + torch.exp(b[1] - lse)[..., None] * b[0]
    return out, lse


def over_level(q: Tensor, k_prefix: Tensor, v_prefix: Tensor, members: list[int]) -> tuple[Tensor, Tensor]:
    """Attention of all requests over their prefixes of one level. q: [B, Hkv, R, Sq, D]."""
    out, lse = q.new_zeros(*q.shape[:4], v_prefix.shape[-1]), q.new_zeros(q.shape[:4])
    kv_heads, heads, q_len = q.shape[1:4]
    for prefix in range(len(k_prefix)):
        mine = [b for b, own in enumerate(members) if own == prefix]
        if not mine:
            continue
        rows = q[mine].transpose(0, 1).reshape(kv_heads, len(mine) * heads * q_len, -1)
        piece = attend(rows, k_prefix[prefix], v_prefix[prefix])
        for whole, x in zip((out, lse), piece, strict=True):
            whole[mine] = x.reshape(kv_heads, len(mine), heads, q_len, *x.shape[2:]).transpose(0, 1)
    return out, lse


def shared_prefix_attention(
    q: Tensor,
    levels: list[tuple[Tensor, Tensor, list[int]]],
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    kv_heads, kv_len = k.shape[1:3]
    q_len = q.shape[2]
    q = q.reshape(q.shape[0], kv_heads, -1, *q.shape[2:])
    real = torch.arange(kv_len) < lengths[:, None]
    k, v = (torch.where(real[:, None, :, None], x, 0.0)[:, :, None] for x in (k, v))
    last = lengths[:, None, None] - q_len + torch.arange(q_len)[:, None]
    hidden = torch.arange(kv_len) > last
    result = attend(q, k, v, hidden[:, None, None])
    for k_prefix, v_prefix, members in levels:
        result = merge(result, over_level(q, k_prefix, v_prefix, members))
    return tuple(x.flatten(1, 2) for x in result)
