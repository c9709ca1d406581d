"""Pairs as complex numbers, heads by einsum with the group on an axis of its own, a cache that counts its free room."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    half = x.shape[-1] // 2
    exponents = torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1]
    angles = torch.outer(positions.float(), 1.0 / base**exponents)
    if x.dtype == torch.float64:
        angles = torch.outer(positions.double(), base ** -(torch.arange(half).double() / half))
    turns = torch.polar(torch.ones_like(angles), angles)
    wide = x.to(angles.dtype)
    points = torch.complex(wide[..., :half].contiguous(), wide[..., half:].contiguous()) * turns
    return torch.cat((points.real, points.imag), -1).type_as(x)


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    batch, heads, queries, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], queries, dim)
    scores = torch.einsum("bkgid,bkjd->bkgij", grouped, k) * dim**-0.5
    if causal:
        visible = torch.ones(queries, k.shape[2], dtype=torch.bool).tril(k.shape[2] - queries)
        scores = torch.where(visible, scores, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bkgij,bkjd->bkgid", weights, v).flatten(1, 2)


class KVCache:
    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        self.memory = torch.full((2, batch, kv_heads, capacity, head_dim), torch.nan)
        self.room = capacity

    @property
    def length(self) -> int:
        return self.memory.shape[3] - self.room

    @property
    def keys(self) -> Tensor:
        return self.memory[0].narrow(2, 0, self.length)

    @property
    def values(self) -> Tensor:
        return self.memory[1].narrow(2, 0, self.length)

    def append(self, k: Tensor, v: Tensor) -> None:
        count = k.shape[2]
        if count > self.room:
            raise ValueError(f"no room for {count} tokens, only for {self.room}")
        for memory, new in zip(self.memory, (k, v), strict=True):
            memory.narrow(2, self.length, count).copy_(new)
        self.room -= count


def decode(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, base: float = 10000.0) -> Tensor:
    before = cache.length
    positions = torch.arange(before, before + k.shape[2])
    q, k = (apply_rope(x, positions, base) for x in (q, k))
    cache.append(k, v)
    return gqa_attention(q, cache.keys, cache.values, True)
