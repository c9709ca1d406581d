"""The KV cache: keep the keys and values of the tokens read so far, so that each new token costs one row of attention.

Without it a model that has written n tokens computes the keys and values of all of them again for token n + 1. With it, it
computes one row, and pays in memory: :attr:`KVCache.bytes_per_token` for each token of each request, in every layer.

This cache is contiguous: one block of memory per layer, with room for ``capacity`` tokens for every request, used or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashlib.inference.checks import check_dtype, check_new_tokens, check_size, checked_counts, integers
from flashlib.masks import Causal, KeyLengths, Mask


class CacheFullError(RuntimeError):
    """There is no room for the tokens to be appended. Nothing was written."""


class KVCache:
    """The keys and values of one attention layer, for a batch of requests that may have different lengths.

    Memory is reserved once, ``[B, Hkv, capacity, D]`` for keys and ``[B, Hkv, capacity, Dv]`` for values. What lies beyond a
    request's length is whatever the memory held before; :meth:`mask` keeps attention away from it.

    A decoding step, whether the requests are equally long or not::

        cache.append(k, v)                                                   # k, v: [B, Hkv, 1, D]
        out = attention(q, cache.keys, cache.values, mask=cache.mask(q_len=1))

    The cache is for inference: it holds no gradient.

    Args:
        batch: number of requests, B.
        kv_heads: number of key and value heads, Hkv.
        capacity: how many tokens each request may hold.
        head_dim: channels of a key, D.
        v_head_dim: channels of a value, Dv; ``head_dim`` unless given.
        dtype: float64, float32, float16 or bfloat16.
        device: where the memory is; PyTorch's default device unless given.

    Raises:
        TypeError: a size is not an int, or ``dtype`` is not one of those above.
        ValueError: a size is below its minimum (0 for ``batch`` and ``capacity``, 1 for the others).
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        minimum = {"batch": 0, "kv_heads": 1, "capacity": 0, "head_dim": 1, "v_head_dim": 1}
        sizes = (batch, kv_heads, capacity, head_dim, v_head_dim)
        for (name, least), size in zip(minimum.items(), sizes, strict=True):
            check_size(name, size, least)
        check_dtype(dtype)
        self.key_buffer = torch.empty(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.value_buffer = torch.empty(batch, kv_heads, capacity, v_head_dim, dtype=dtype, device=device)
        # On the CPU whatever the device: a slice needs its length there, and asking a GPU for it would stall the GPU. One number while all
        # requests hold as many tokens, as in most programs: a step of decoding takes longer to add up tensors than to write.
        self._common: int | None = 0
        self._each: Tensor | None = None

    def __repr__(self) -> str:
        batch, kv_heads, capacity, head_dim = self.key_buffer.shape
        filled = f"{self.max_length}" if self.is_uniform else f"{self._lengths.tolist()}"
        return (
            f"KVCache(batch={batch}, kv_heads={kv_heads}, head_dim={head_dim}, {str(self.dtype).removeprefix('torch.')}, "
            f"{filled} of {capacity} tokens, {self.nbytes:,} bytes)"
        )

    # What it holds

    @property
    def lengths(self) -> Tensor:
        """How many tokens each request holds: int64 ``[B]``, on the CPU; a copy. ``cache_seqlens`` in flash_attn."""
        return self._lengths.clone()

    @property
    def _lengths(self) -> Tensor:
        if self._each is None:
            return torch.full((self.batch,), self._common or 0, dtype=torch.int64, device="cpu")
        return self._each

    @_lengths.setter
    def _lengths(self, lengths: Tensor) -> None:
        is_uniform = not len(lengths) or bool((lengths == lengths[0]).all())
        self._common, self._each = (int(lengths[0]) if len(lengths) else 0, None) if is_uniform else (None, lengths)

    @property
    def max_length(self) -> int:
        """How many tokens the longest request holds."""
        return int(self._lengths.max()) if self._common is None else self._common

    @property
    def is_uniform(self) -> bool:
        """Whether all requests hold equally many tokens."""
        return self._common is not None

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, max_length, D]``: a view of the cache's memory, not a copy."""
        return self.key_buffer[:, :, : self.max_length]

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, max_length, Dv]``: a view of the cache's memory, not a copy."""
        return self.value_buffer[:, :, : self.max_length]

    def mask(self, q_len: int, counts: Tensor | Sequence[int] | None = None) -> Mask:
        """Causal attention of the newest tokens over ``keys``: call it after their :meth:`append`.

        Args:
            q_len: number of query rows, Sq. In each request the last row is the newest token.
            counts: the ``counts`` given to :meth:`append`, if any: then row 0 of request ``b`` is the first of its
                ``counts[b]`` newest tokens, and the output of the rows behind them has no meaning.

        Returns:
            A mask for ``[B, Hq, q_len, D]`` queries and ``keys`` of ``max_length``.
        """
        check_size("q_len", q_len, 0)
        new = checked_counts(counts, self.batch, q_len, "q_len")
        if self.is_uniform and counts is None:
            return Causal()
        return KeyLengths(self.lengths) & Causal(offset=self._lengths - new)

    def next_positions(self, count: int) -> Tensor:
        """The positions that the next ``count`` tokens will have: int64 ``[B, count]``, as ``apply_rotary`` wants them."""
        check_size("count", count, 0)
        return (self._lengths[:, None] + torch.arange(count, device="cpu")).to(self.device)

    # How it changes

    def append(self, k: Tensor, v: Tensor, counts: Tensor | Sequence[int] | None = None) -> None:
        """Write new tokens behind those that are there, in place.

        Args:
            k: ``[B, Hkv, S, D]``, with the cache's dtype and device.
            v: ``[B, Hkv, S, Dv]``, likewise.
            counts: integers ``[B]``: of request ``b`` only the first ``counts[b]`` tokens are real, and the others are not
                stored. None if all S are.

        Raises:
            CacheFullError: a request would hold more than ``capacity`` tokens.
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape, device or count does not fit, or a gradient would be lost.
            In each case nothing was written.
        """
        check_new_tokens(k, v, self.batch, self.key_buffer, self.value_buffer)
        if counts is None and self._common is not None:
            start, end = self._common, self._common + k.shape[2]
            if end > self.capacity and self.batch:
                self._refuse(0, start, end)
            self.key_buffer[:, :, start:end] = k
            self.value_buffer[:, :, start:end] = v
            self._common = end if self.batch else 0
            return
        ends = self._lengths + checked_counts(counts, self.batch, k.shape[2], "S")
        places = [*enumerate(zip(self._lengths.tolist(), ends.tolist(), strict=True))]
        for request, (start, end) in places:
            if end > self.capacity:
                self._refuse(request, start, end)
        for request, (start, end) in places:
            self.key_buffer[request, :, start:end] = k[request, :, : end - start]
            self.value_buffer[request, :, start:end] = v[request, :, : end - start]
        self._lengths = ends

    def _refuse(self, request: int, start: int, end: int) -> None:
        raise CacheFullError(
            f"the cache is full: request {request} holds {start} tokens and {end - start} more do not fit into its capacity of {self.capacity}"
        )

    def truncate(self, lengths: int | Tensor | Sequence[int]) -> None:
        """Forget every token from position ``lengths`` on (one int for all requests, or integers ``[B]``).

        Used when drafted tokens are rejected, or to go back to a shared prompt. Nothing is erased: the memory is written
        over by the next :meth:`append`.

        Raises:
            ValueError: a request holds fewer tokens than that.
        """
        given: Any = [lengths] * self.batch if isinstance(lengths, int) and not isinstance(lengths, bool) else lengths
        wanted = integers("lengths", given, self.batch)
        if (wanted < 0).any() or (wanted > self._lengths).any():
            raise ValueError(
                f"lengths must lie between 0 and what each request holds, {self._lengths.tolist()}; got {wanted.tolist()}"
            )
        self._lengths = wanted

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self._lengths = torch.zeros_like(self._lengths)

    def select(self, requests: Tensor | Sequence[int]) -> KVCache:
        """A new cache whose request ``i`` is a copy of this one's request ``requests[i]``.

        Beam search continues a request several times; a server drops those that are finished.

        Raises:
            ValueError: there is no such request.
        """
        chosen = integers("requests", requests)
        if ((chosen < 0) | (chosen >= self.batch)).any():
            raise ValueError(f"requests must lie between 0 and {self.batch - 1}; got {chosen.tolist()}")
        _, kv_heads, capacity, head_dim = self.key_buffer.shape
        v_head_dim = self.value_buffer.shape[3]
        other = KVCache(
            len(chosen), kv_heads, capacity, head_dim, v_head_dim=v_head_dim, dtype=self.dtype, device=self.device
        )
        other.key_buffer[:, :, : self.max_length] = self.keys[chosen.to(self.device)]
        other.value_buffer[:, :, : self.max_length] = self.values[chosen.to(self.device)]
        other._lengths = self._lengths[chosen]
        return other

    # What it costs

    @property
    def batch(self) -> int:
        return self.key_buffer.shape[0]

    @property
    def capacity(self) -> int:
        """How many tokens each request may hold."""
        return self.key_buffer.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.key_buffer.dtype

    @property
    def device(self) -> torch.device:
        return self.key_buffer.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one request takes in this layer: ``Hkv * (D + Dv) * bytes per number``."""
        _, kv_heads, _, head_dim = self.key_buffer.shape
        return kv_heads * (head_dim + self.value_buffer.shape[3]) * self.key_buffer.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes reserved: ``B * capacity * bytes_per_token``."""
        return self.batch * self.capacity * self.bytes_per_token

    @property
    def nbytes_used(self) -> int:
        """Bytes that hold tokens: ``sum(lengths) * bytes_per_token``. The rest is the price of one block per request."""
        return int(self._lengths.sum()) * self.bytes_per_token
