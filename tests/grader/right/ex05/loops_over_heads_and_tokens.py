"""One head at a time, and in decode one token at a time: each needs no mask, since the cache holds nothing of its future."""

import math

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions.double() * base ** (-2 * i / x.shape[-1])
        a, b = x[..., i].double(), x[..., i + half].double()
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + half] = b * angle.cos() + a * angle.sin()
    return out


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    group = q.shape[1] // k.shape[1]
    rows, keys = q.shape[2], k.shape[2]
    future = torch.triu(torch.ones(rows, keys, dtype=torch.bool), diagonal=keys - rows + 1)
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for h in range(q.shape[1]):
        scores = torch.matmul(q[:, h], k[:, h // group].transpose(1, 2)) / math.sqrt(q.shape[3])
        if causal:
            scores[:, future] = -torch.inf
        out[:, h] = torch.matmul(scores.softmax(2), v[:, h // group])
    return out


class KVCache:
    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        self.capacity = capacity
        self.stored = 0
        self.k = torch.zeros(batch, kv_heads, capacity, head_dim)
        self.v = torch.zeros(batch, kv_heads, capacity, head_dim)

    @property
    def length(self) -> int:
        return self.stored

    @property
    def keys(self) -> Tensor:
        return self.k[:, :, : self.stored].clone()

    @property
    def values(self) -> Tensor:
        return self.v[:, :, : self.stored].clone()

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.stored + k.shape[2] > self.capacity:
            raise ValueError("the cache is full")
        for s in range(k.shape[2]):
            self.k[:, :, self.stored + s] = k[:, :, s]
            self.v[:, :, self.stored + s] = v[:, :, s]
        self.stored += k.shape[2]


def decode(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, base: float = 10000.0) -> Tensor:
    if cache.length + k.shape[2] > cache.capacity:
        raise ValueError("the cache is full")
    outs = []
    for s in range(q.shape[2]):
        here = torch.tensor([cache.length])
        token = slice(s, s + 1)
        cache.append(apply_rope(k[:, :, token], here, base), v[:, :, token])
        outs.append(gqa_attention(apply_rope(q[:, :, token], here, base), cache.keys, cache.values))
    return torch.cat(outs, dim=2)
