# diagnosis: scaled-by-another-size
"""Grouped heads, rotary positions and the KV cache: what attention in a language model has beyond the formula.

A model that writes computes one new token at a time. It keeps the keys and values of the earlier ones, with few heads for
them so that they stay small, and it writes each token's position into its query and key by turning them.
"""

import math

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn pairs of channels by angles that grow with the position (rotary position embedding).

    Channel i, 0 <= i < D / 2, makes a pair with channel i + D / 2, as in Llama. Seen as a point in the plane, (x[i],
    x[i + D / 2]) is turned counterclockwise by ``position * base ** (-2 * i / D)`` radians: a point (1, 0) turned by a goes
    to (cos a, sin a).

    Args:
        x: queries or keys, ``[B, H, S, D]``, D even, float16, bfloat16, float32 or float64. Do not change it.
        positions: int64 ``[S]``: token s of each sequence stands at ``positions[s]``, at least 0, in any order.
        base: greater than 1.

    Returns:
        ``[B, H, S, D]`` in x's dtype. The angles, at least, are computed in float32: float16 cannot hold the integers
        above 2048.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies  # [S, D / 2]
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(compute_dtype), angles.sin().to(compute_dtype)
    first, second = x.to(compute_dtype).split(half, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Grouped-query attention: softmax(Q K^T / sqrt(D)) V, with several query heads to one head of keys and values.

    With ``G = Hq / Hkv`` query heads in a group, the query heads 0 .. G - 1 look at KV head 0, the next G at KV head 1, and
    so on. The keys and values of a head are in memory once: no tensor is made that holds them once for each query head.

    Args:
        q: ``[B, Hq, Sq, D]``.
        k: ``[B, Hkv, Sk, D]``, Hkv a divisor of Hq.
        v: ``[B, Hkv, Sk, D]``. All three in float32, any strides. Do not change them.
        causal: a query sees only keys up to its own position. The queries are the last Sq of Sk positions, Sq <= Sk.

    Returns:
        float32 ``[B, Hq, Sq, D]``.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    # All queries of a group, one head after another, are the rows of one matrix: row g * Sq + i is query i of head g.
    rows = q.reshape(batch, kv_heads, -1, head_dim)
    scores = (rows @ k.mT / math.sqrt(kv_len)).unflatten(2, (-1, q_len))  # [B, Hkv, G, Sq, Sk]
    if causal:
        position = torch.arange(q_len)[:, None] + kv_len - q_len
        scores = scores.masked_fill(torch.arange(kv_len) > position, -torch.inf)
    out = torch.softmax(scores, dim=-1).flatten(2, 3) @ v
    return out.reshape(batch, q_heads, q_len, head_dim)


class KVCache:
    """The keys and values of the tokens seen so far, for one layer. All sequences of the batch are equally long.

    Memory for `capacity` tokens is reserved once, in float32. To append n tokens costs n tokens' worth of writing, however
    many the cache holds already.

    Args:
        batch, kv_heads, capacity, head_dim: the sizes B, Hkv, C and D, each at least 1.
    """

    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        self._keys = torch.empty(batch, kv_heads, capacity, head_dim)
        self._values = torch.empty(batch, kv_heads, capacity, head_dim)
        self._length = 0

    @property
    def length(self) -> int:
        """How many tokens it holds: 0 at first."""
        return self._length

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, length, D]``: the keys of the tokens it holds, in the order in which they came, and nothing else."""
        return self._keys[:, :, : self._length]

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, length, D]``: likewise the values."""
        return self._values[:, :, : self._length]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put n more tokens behind those that it holds.

        Args:
            k, v: ``[B, Hkv, n, D]``, n >= 1; they are copied, and may be changed by the caller afterwards.

        Raises:
            ValueError: there is no room for all n. The cache is then as it was before.
        """
        capacity, end = self._keys.shape[2], self._length + k.shape[2]
        if end > capacity:
            raise ValueError(f"the cache has room for {capacity} tokens; it would have to hold {end}")
        self._keys[:, :, self._length : end] = k
        self._values[:, :, self._length : end] = v
        self._length = end


def decode(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, base: float = 10000.0) -> Tensor:
    """Causal attention of the next n tokens over everything so far: those in the cache, and themselves.

    The new tokens stand at the positions behind those in the cache, which counts from 0. n > 1 is a piece of a prompt
    ("prefill"), n = 1 one step of writing. However a text is cut into pieces, each token gets what it would get if the
    whole text were read at once.

    Args:
        q: ``[B, Hq, n, D]``, queries of the new tokens, not turned yet.
        k, v: ``[B, Hkv, n, D]``, their keys (not turned yet) and values. All float32. Do not change any of the three.
        cache: holds the *turned* keys of the earlier tokens, and their values. The new tokens' are appended, so that no
            key is ever turned a second time.
        base: of the rotary embedding.

    Returns:
        float32 ``[B, Hq, n, D]``.

    Raises:
        ValueError: the cache has no room for the new tokens.
    """
    positions = cache.length + torch.arange(q.shape[2])
    cache.append(apply_rope(k, positions, base), v)
    return gqa_attention(apply_rope(q, positions, base), cache.keys, cache.values, causal=True)
