# Exercise 05: Grouped heads, RoPE and cached decoding
# difficulty 3/5 · importance 5/5 · about 75 minutes
# Chapter: notebooks/05_heads_positions_cache.ipynb
#
# Check your work with `flashlib grade ex05`, or in a notebook with `check("ex05")`.

"""Grouped heads, rotary positions and the KV cache: what attention in a language model has beyond the formula.

A model that writes computes one new token at a time. It keeps the keys and values of the earlier ones, with few heads for
them so that they stay small, and it writes each token's position into its query and key by turning them.
"""

import torch  # noqa: F401
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
    raise NotImplementedError("write apply_rope here")


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
    raise NotImplementedError("write gqa_attention here")


class KVCache:
    """The keys and values of the tokens seen so far, for one layer. All sequences of the batch are equally long.

    Memory for `capacity` tokens is reserved once, in float32. To append n tokens costs n tokens' worth of writing, however
    many the cache holds already.

    Args:
        batch, kv_heads, capacity, head_dim: the sizes B, Hkv, C and D, each at least 1.
    """

    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        raise NotImplementedError("write __init__ here")

    @property
    def length(self) -> int:
        """How many tokens it holds: 0 at first."""
        raise NotImplementedError("write length here")

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, length, D]``: the keys of the tokens it holds, in the order in which they came, and nothing else."""
        raise NotImplementedError("write keys here")

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, length, D]``: likewise the values."""
        raise NotImplementedError("write values here")

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put n more tokens behind those that it holds.

        Args:
            k, v: ``[B, Hkv, n, D]``, n >= 1; they are copied, and may be changed by the caller afterwards.

        Raises:
            ValueError: there is no room for all n. The cache is then as it was before.
        """
        raise NotImplementedError("write append here")


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
    raise NotImplementedError("write decode here")
