# diagnosis: turned-backwards
import math

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(compute_dtype), angles.sin().to(compute_dtype)
    first, second = x.to(compute_dtype).split(half, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    rows = q.reshape(batch, kv_heads, -1, head_dim)
    scores = (rows @ k.mT / math.sqrt(head_dim)).unflatten(2, (-1, q_len))
    if causal:
        position = torch.arange(q_len)[:, None] + kv_len - q_len
        scores = scores.masked_fill(torch.arange(kv_len) > position, -torch.inf)
    out = torch.softmax(scores, dim=-1).flatten(2, 3) @ v
    return out.reshape(batch, q_heads, q_len, head_dim)


class KVCache:
    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        self._keys = torch.empty(batch, kv_heads, capacity, head_dim)
        self._values = torch.empty(batch, kv_heads, capacity, head_dim)
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self._length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self._length]

    def append(self, k: Tensor, v: Tensor) -> None:
        capacity, end = self._keys.shape[2], self._length + k.shape[2]
        if end > capacity:
            raise ValueError(f"the cache has room for {capacity} tokens; it would have to hold {end}")
        self._keys[:, :, self._length : end] = k
        self._values[:, :, self._length : end] = v
        self._length = end


def decode(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, base: float = 10000.0) -> Tensor:
    positions = cache.length + torch.arange(q.shape[2])
    cache.append(apply_rope(k, positions, base), v)
    return gqa_attention(apply_rope(q, positions, base), cache.keys, cache.values, causal=True)
