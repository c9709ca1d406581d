"""KV caches of which each rank holds every W-th token: memory for W times as long a context, and every rank's part equally long.

Every rank is given all new tokens, as a model that all ranks run has them, and keeps its own. Token t lies on rank ``t % W``: a cache that grows token by token
stays balanced, and what a row sees of a rank's tokens is always those before some point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DeviceMesh

from flashlib.inference.cache import CacheFullError, KVCache
from flashlib.inference.checks import check_size, checked_counts
from flashlib.inference.paged import PagedKVCache
from flashlib.masks import Mask
from flashlib.parallel.decode import parallel_decode_attention
from flashlib.parallel.link import place_of

__all__ = ["ShardedKVCache", "ShardedPagedKVCache"]


class _Striped:
    """Which of the tokens of each request are this rank's."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.rank, self.ranks = place_of(mesh)

    def count(self, lengths: Tensor) -> Tensor:
        """How many of the first ``lengths`` tokens."""
        return (lengths + self.ranks - 1 - self.rank).div(self.ranks, rounding_mode="floor")

    def chosen(self, x: Tensor, starts: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Of new tokens ``[B, H, S, D]``, of which request b's begin at position ``starts[b]``: this rank's, ``[B, H, most, D]``, and how many of each."""
        first = (self.rank - starts) % self.ranks
        counts = self.count(starts + new) - self.count(starts)
        most = int(counts.max()) if len(counts) else 0
        at = (first[:, None] + self.ranks * torch.arange(most, device="cpu")).clamp(max=max(0, x.shape[2] - 1))
        at = at.to(x.device)[:, None, :, None]
        return x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])), counts

    def seen(self, lengths: Tensor, q_len: int, device: torch.device) -> Tensor:
        """How many of this rank's tokens each of the newest ``q_len`` rows sees: int64 ``[B, q_len]``."""
        rows = lengths[:, None] - q_len + 1 + torch.arange(q_len, device="cpu")
        return self.count(rows.clamp(min=0)).to(device)


class ShardedKVCache:
    """A :class:`flashlib.inference.KVCache` over the ranks of a mesh. Every rank makes the same calls with the same tokens.

    A decoding step::

        cache.append(k, v)                        # k, v: [B, Hkv, 1, D], on every rank
        out = cache.attend(q)                     # q: [B, Hq, 1, D]; the same on every rank

    Args:
        mesh: the ranks.
        batch, kv_heads, capacity, head_dim, v_head_dim, dtype, device: as :class:`flashlib.inference.KVCache`. ``capacity`` counts the tokens of a request on
            all ranks together, and takes a W-th of it on each, rounded up.

    Attributes:
        local: this rank's KVCache.

    Raises:
        TypeError, ValueError: as :class:`flashlib.inference.KVCache`; ``mesh`` is no DeviceMesh with this rank in it.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self._stripes = _Striped(mesh)
        check_size("capacity", capacity, 0)
        own = -(-capacity // self._stripes.ranks)
        self.local = KVCache(batch, kv_heads, own, head_dim, v_head_dim=v_head_dim, dtype=dtype, device=device)
        self.capacity = capacity
        self._lengths = torch.zeros(batch, dtype=torch.int64, device="cpu")

    @property
    def lengths(self) -> Tensor:
        """How many tokens each request holds on all ranks together: int64 ``[B]``, on the CPU; a copy."""
        return self._lengths.clone()

    @property
    def max_length(self) -> int:
        """How many tokens the longest request holds, on all ranks together."""
        return int(self._lengths.max()) if self.batch else 0

    @property
    def batch(self) -> int:
        return len(self._lengths)

    @property
    def is_uniform(self) -> bool:
        """Whether all requests hold equally many tokens."""
        return bool((self._lengths == self.max_length).all())

    @property
    def keys(self) -> Tensor:
        """This rank's: ``[B, Hkv, its most tokens, D]``."""
        return self.local.keys

    @property
    def values(self) -> Tensor:
        """This rank's: ``[B, Hkv, its most tokens, Dv]``."""
        return self.local.values

    @property
    def nbytes(self) -> int:
        """Bytes reserved on this rank."""
        return self.local.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one request takes, on the rank that holds it."""
        return self.local.bytes_per_token

    def append(self, k: Tensor, v: Tensor, counts: Tensor | Sequence[int] | None = None) -> None:
        """Write this rank's share of new tokens; arguments as :meth:`flashlib.inference.KVCache.append`, the same on every rank.

        Raises:
            flashlib.inference.CacheFullError: a request would hold more than ``capacity`` tokens. Nothing was written, on any rank.
            TypeError, ValueError: as there.
        """
        new = checked_counts(counts, len(self._lengths), k.shape[2], "S")
        if (self._lengths + new > self.capacity).any():
            request = int((self._lengths + new > self.capacity).nonzero()[0])
            raise CacheFullError(
                f"the cache is full: request {request} holds {int(self._lengths[request])} tokens and {int(new[request])} more do not fit into "
                f"its capacity of {self.capacity}"
            )
        (k, own), (v, _) = (self._stripes.chosen(x, self._lengths, new) for x in (k, v))
        self.local.append(k, v, own)
        self._lengths = self._lengths + new

    def attend(self, q: Tensor, *, mask: Mask | None = None, **options: Any) -> Any:
        """Attention over what all ranks hold, causal unless there is a mask: row i of q is the i-th of the newest Sq tokens of each request.

        Call it after their :meth:`append`.

        Args:
            q: ``[B, Hq, Sq, D]``, the same on every rank.
            mask: what the rows see of the first :attr:`max_length` tokens, in their order, the same on every rank. None: what came before, and themselves.
            options: as :func:`flashlib.parallel.parallel_decode_attention`.
        """
        held, stripes = self.local, self._stripes
        if mask is None:
            seen: dict[str, Any] = {"lengths": stripes.seen(self._lengths, q.shape[2], q.device)}
        else:
            rows = mask.intervals(self.batch, q.shape[2], self.max_length, "cpu")
            ends = (stripes.count(x).expand(self.batch, -1).contiguous().to(q.device) for x in (rows.start, rows.stop))
            seen = dict(zip(("starts", "lengths"), ends, strict=True))
        return parallel_decode_attention(q, held.key_buffer, held.value_buffer, mesh=stripes.mesh, **seen, **options)

    def truncate(self, lengths: int | Tensor | Sequence[int]) -> None:
        """Forget every token from position ``lengths`` on, as :meth:`flashlib.inference.KVCache.truncate`."""
        given: Any = [lengths] * len(self._lengths) if isinstance(lengths, int) else lengths
        wanted = torch.as_tensor(given, dtype=torch.int64, device="cpu")
        if wanted.shape != self._lengths.shape or (wanted < 0).any() or (wanted > self._lengths).any():
            raise ValueError(
                f"lengths must lie between 0 and what each request holds, {self._lengths.tolist()}; got {wanted.tolist()}"
            )
        self.local.truncate(self._stripes.count(wanted))
        self._lengths = wanted.clone()

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.local.reset()
        self._lengths = torch.zeros_like(self._lengths)

    def select(self, requests: Tensor | Sequence[int]) -> ShardedKVCache:
        """A new cache whose request ``i`` is a copy of this one's request ``requests[i]``."""
        other = object.__new__(ShardedKVCache)
        other._stripes, other.capacity = self._stripes, self.capacity
        other.local = self.local.select(requests)
        other._lengths = self._lengths[torch.as_tensor(requests, device="cpu")]
        return other


class ShardedPagedKVCache:
    """A :class:`flashlib.inference.PagedKVCache` over the ranks of a mesh. Every rank makes the same calls with the same tokens.

    Args:
        mesh: the ranks.
        num_pages, page_size, kv_heads, head_dim, v_head_dim, dtype, device: as :class:`flashlib.inference.PagedKVCache`, of each rank.

    Attributes:
        local: this rank's PagedKVCache.

    Raises:
        TypeError, ValueError: as :class:`flashlib.inference.PagedKVCache`; ``mesh`` is no DeviceMesh with this rank in it.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self._stripes = _Striped(mesh)
        self.local = PagedKVCache(
            num_pages, page_size, kv_heads, head_dim, v_head_dim=v_head_dim, dtype=dtype, device=device
        )
        self._lengths: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes reserved on this rank."""
        return self.local.nbytes

    def add(self) -> int:
        """A new request, of no tokens. The same number on every rank."""
        request = self.local.add()
        self._lengths[request] = 0
        return request

    def free(self, request: int) -> None:
        """Forget a request, as :meth:`flashlib.inference.PagedKVCache.free`."""
        self.local.free(request)
        del self._lengths[request]

    def lengths(self, requests: Sequence[int]) -> Tensor:
        """How many tokens each request holds on all ranks together: int64 ``[n]``, on the CPU."""
        missing = [request for request in requests if request not in self._lengths]
        if missing:
            raise ValueError(
                f"there is no request {missing[0]}: it was freed, or never added; there are {self.local.requests}"
            )
        return torch.tensor([self._lengths[request] for request in requests], dtype=torch.int64, device="cpu")

    def append(
        self, requests: Sequence[int], k: Tensor, v: Tensor, counts: Tensor | Sequence[int] | None = None
    ) -> None:
        """Write this rank's share of new tokens ``[n, Hkv, S, D]``, as :meth:`flashlib.inference.PagedKVCache.append`.

        Raises:
            flashlib.inference.OutOfPagesError: this rank has too few free pages. Nothing was written here.
            TypeError, ValueError: as there.
        """
        starts = self.lengths(requests)
        new = checked_counts(counts, len(starts), k.shape[2], "S")
        (k, own), (v, _) = (self._stripes.chosen(x, starts, new) for x in (k, v))
        self.local.append(requests, k, v, own)
        for request, length in zip(requests, (starts + new).tolist(), strict=True):
            self._lengths[request] = length

    def attend(self, requests: Sequence[int], q: Tensor, **options: Any) -> Any:
        """Causal attention of the newest tokens of some requests, after their :meth:`append`; as :meth:`ShardedKVCache.attend`."""
        lengths = self._stripes.seen(self.lengths(requests), q.shape[2], q.device).to(torch.int32)
        table = self.local.block_table(requests)
        if table.shape[1] == 0:  # no token of these requests is here; a table has at least one column
            table = table.new_full((len(table), 1), -1)
        return parallel_decode_attention(
            q, self.local.key_pages, self.local.value_pages, mesh=self._stripes.mesh, lengths=lengths, block_table=table, **options
        )  # fmt: skip
