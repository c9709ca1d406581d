"""Shared prefixes: many requests that begin alike read their common keys once.

A system prompt, a document asked about many times, the examples before a task: B requests begin with the same P tokens. Kept as
B caches, these tokens are held B times and read B times for every new token. But attention over a set of keys can be computed
in pieces (:mod:`flashlib.partial`), and the piece over the prefix is the same problem for every request, only with other
queries. So the queries of all requests are stacked as the rows of one long query, which passes over the prefix once; each
request attends to its own keys; and the two pieces are merged::

    rows     = B * group * Sq query rows per KV head
    prefix   = attention(rows, k_prefix, v_prefix)             one pass, P keys read once
    own      = attention(q, k, v), causal                      B short problems
    out      = merge(prefix, own)

On a GPU, few requests make few rows: then the keys are cut into pieces as well, so that every multiprocessor has some.

Every row sees all of a prefix, since a prefix lies in every row's past: no mask is needed there. Several levels work the same
way (a system prompt for everyone, below it a document for each group of requests): one pass per level, and one merge.

Keys carry their positions (RoPE is applied when they are cached), so nothing here knows about positions: the prefix's keys are
those at positions 0 .. P - 1, and a request's own keys begin at P.

Sources: Juravsky et al. 2024, "Hydragen" (arXiv 2402.05099), sections 3.1 and 3.2; Zheng et al. 2023, "SGLang" (arXiv
2312.07104), section 3, for trees of prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.inference.decode import combine_splits, decode_attention, no_combine_kernel
from flashlib.launch.decode import PackedSplits, combine_packed_launch
from flashlib.launch.start import interpreting
from flashlib.launch.tiles import multiprocessors
from flashlib.masks import Causal, KeyLengths, Mask
from flashlib.partial import Partial, fold

__all__ = ["SharedPrefix", "shared_prefix_attention"]

_ROW_BLOCK = 128  # rows of a tile of the forward kernels
_FEW_ROWS = 32  # of a head, which one tile of the decoding kernel holds
_LEAST_PIECE = 1024  # keys of a piece of a prefix: shorter ones cost more to merge than they gain


class SharedPrefix:
    """One level of sharing: P prefixes, and which one each request begins with.

    Args:
        k: ``[P, Hkv, S, D]``, the keys of P prefixes of up to S tokens. v: ``[P, Hkv, S, Dv]``. They are used where they lie.
        members: for each of the B requests the number of its prefix, ints ``[B]`` in any order. None if there is one prefix,
            which all have.
        lengths: integers ``[P]``, how many tokens of each prefix are real; what lies behind them is never read. None if all
            S are. A request without a prefix at this level has one of length 0. Lengths that cannot be: as in
            :func:`flashlib.inference.decode_attention`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, ``members`` names a prefix that is not there, or is missing where P is not 1.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        *,
        members: Sequence[int] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> None:
        for name, tensor in (("k", k), ("v", v)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
            if tensor.dim() != 4:
                raise ValueError(f"{name} must be [P, Hkv, S, head_dim]; got {list(tensor.shape)}")
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(f"k and v must agree in all but head_dim; got k {list(k.shape)} and v {list(v.shape)}")
        if 0 in k.shape[:2]:
            raise ValueError(f"k must hold at least one prefix and one head; got {list(k.shape)}")
        if members is None and k.shape[0] != 1:
            raise ValueError(f"members must say which of the {k.shape[0]} prefixes each request has; got None")
        self.k, self.v = k, v
        self.lengths = _lengths_on(k.device, lengths)
        if self.lengths is not None and len(self.lengths) != k.shape[0]:
            raise ValueError(f"lengths must be one per prefix, [{k.shape[0]}]; got {list(self.lengths.shape)}")
        self.members = None if members is None else _members(members, k.shape[0])
        if self.members is not None:
            self._request_at, self._slot_of = (x.to(k.device) for x in _places(self.members, k.shape[0]))

    def attend(self, q: Tensor, *, scale: float | None = None, softcap: float = 0.0, backend: str = "auto") -> Partial:
        """Attention of every request's queries over its prefix, in one pass over the prefixes.

        Args:
            q: ``[B, Hq, Sq, D]``.
            scale, softcap, backend: as in :func:`flashlib.attention`.

        Returns:
            out ``[B, Hq, Sq, Dv]`` in the dtype of q, lse ``[B, Hq, Sq]``.

        Raises:
            TypeError, ValueError: as :func:`flashlib.attention`; or there are not B members.
        """
        rows = self._attend_rows(q, scale=scale, softcap=softcap, backend=backend)
        return self._unpack(rows, q)

    def _attend_rows(self, q: Tensor, *, backend: str, **options) -> Partial:
        """The same with rows as :meth:`_pack` orders them: out ``[P, Hkv, n * G * Sq, Dv]``; or, of one prefix whose keys were cut into
        several pieces, a result for each: ``[pieces, Hkv, B * G * Sq, Dv]``."""
        _check_queries(q, self.k)
        if self.members is not None and len(self.members) != q.shape[0]:
            raise ValueError(f"members are {len(self.members)}, but q has batch {q.shape[0]}; expected one per request")
        of_a_head = self._most_requests(q) * (q.shape[1] // self.k.shape[1]) * q.shape[2]
        pieces = _pieces(q, self.k, self.v, of_a_head) if self.lengths is None else 1
        if pieces > 1:
            return _attend_in_pieces(self._pack(q, pieces), self.k, self.v, backend=backend, **options)
        return _attend(self._pack(q), self.k, self.v, self.lengths, causal=False, backend=backend, **options)

    def _splits(self, rows: Partial, q: Tensor) -> PackedSplits:
        """The rows of :meth:`_attend_rows` as the kernel that merges takes them: where they lie, if each request's follow one another."""
        if self.members is not None:
            return _splits(self._unpack(rows, q), self.k.shape[1])
        of_a_head = rows.lse.shape[2]
        return PackedSplits(*_flat(rows), request=of_a_head // max(q.shape[0], 1), head=of_a_head)

    def _most_requests(self, q: Tensor) -> int:
        """n, of the prefix that has most of them."""
        return q.shape[0] if self.members is None else self._request_at.shape[1]

    def _pack(self, q: Tensor, copies: int = -1) -> Tensor:
        """``[B, Hq, Sq, D]`` -> ``[P, Hkv, n * G * Sq, D]``: n requests per prefix, with the G heads of a group as rows.

        copies: of the rows of a lone prefix, ``[copies, Hkv, n * G * Sq, D]``; -1 for none.
        """
        grouped = q.unflatten(1, (self.k.shape[1], q.shape[1] // self.k.shape[1]))  # [B, Hkv, G, Sq, D]
        by_prefix = grouped[None] if self.members is None else grouped[self._request_at]  # [P, n, Hkv, G, Sq, D]
        return by_prefix.transpose(1, 2).expand(copies, *[-1] * 5).flatten(2, 4)

    def _unpack(self, rows: Partial, q: Tensor) -> Partial:
        """The way back: out ``[B, Hq, Sq, Dv]`` and lse ``[B, Hq, Sq]``, the pieces of a prefix merged."""
        if len(rows.lse) > len(self.k):
            rows = Partial(*combine_splits(rows.out.float()[:, None], rows.lse[:, None], dtype=q.dtype))
        return Partial(self._unpacked(rows.out, q), self._unpacked(rows.lse[..., None], q)[..., 0])

    def _unpacked(self, rows: Tensor, q: Tensor) -> Tensor:
        """``[P, Hkv, n * G * Sq, Dv]`` -> ``[B, Hq, Sq, Dv]``."""
        group, q_len = q.shape[1] // self.k.shape[1], q.shape[2]
        by_prefix = rows.unflatten(2, (self._most_requests(q), group, q_len)).transpose(1, 2)  # [P, n, Hkv, G, Sq, Dv]
        grouped = by_prefix.flatten(0, 1)
        if self.members is not None:
            grouped = grouped[self._slot_of]
        return grouped.flatten(1, 2)


def shared_prefix_attention(
    q: Tensor,
    prefixes: SharedPrefix | Sequence[SharedPrefix],
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of B requests, each over its shared prefixes followed by its own keys. Exact, and differentiable.

    The result is that of attention over ``cat([prefix of level 0, prefix of level 1, ..., own keys])`` for each request, which
    is never made: every prefix is read once per call, for all the requests that share it.

    Args:
        q: the newest tokens' queries ``[B, Hq, Sq, D]``.
        prefixes: one :class:`SharedPrefix`, or one for each level.
        k: each request's own keys ``[B, Hkv, S, D]``, the Sq newest included. v: ``[B, Hkv, S, Dv]``.
        lengths: integers ``[B]``: how many own tokens each request has, the Sq newest included. What lies behind them is
            never read. None if all S. Lengths that cannot be: as in :func:`flashlib.inference.decode_attention`.
        scale, softcap, return_lse, backend: as in :func:`flashlib.attention`.

    Returns:
        out ``[B, Hq, Sq, Dv]``, dtype of q; with ``return_lse`` also lse ``[B, Hq, Sq]``, natural log.

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.
    """
    levels = [prefixes] if isinstance(prefixes, SharedPrefix) else list(prefixes)
    for level in levels:
        if not isinstance(level, SharedPrefix):
            raise TypeError(f"prefixes must be SharedPrefix objects; got {type(level).__name__}")
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "backend": backend}
    own = _attend(q, k, v, _lengths_on(k.device, lengths), causal=True, **options)
    shared = [level._attend_rows(q, **options) for level in levels]
    if any(no_combine_kernel(part.out, part.lse) for part in [*shared, own]):
        partials = [level._unpack(rows, q) for level, rows in zip(levels, shared, strict=True)]
        whole = fold([_accumulated(part) for part in [*partials, own]])
        out, lse = whole.out.to(q.dtype), whole.lse
    else:
        splits = [level._splits(rows, q) for level, rows in zip(levels, shared, strict=True)]
        out, lse = _merge([*splits, _splits(own, k.shape[1])], own, k.shape[1])
    return (out, lse) if return_lse else out


def _merge(splits: Sequence[PackedSplits], own: Partial, kv_heads: int) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of all splits, first to last, shaped and typed as the own part's. One kernel for each level."""
    dtype = torch.float32 if interpreting() else own.out.dtype  # the interpreter cuts off what a GPU rounds to bf16
    merged = splits[0]
    for later in splits[1:]:
        out = own.out.new_empty(own.out.shape, dtype=dtype if later is splits[-1] else torch.float32)
        lse = own.lse.new_empty(own.lse.shape)
        combine_packed_launch(merged, later, out, lse, kv_heads).start()
        merged = _splits(Partial(out, lse), kv_heads)
    return merged.out.view(own.out.shape).to(own.out.dtype), merged.lse.view(own.lse.shape)


def _splits(partial: Partial, kv_heads: int) -> PackedSplits:
    """out ``[B, Hq, Sq, Dv]`` and lse ``[B, Hq, Sq]`` as one split."""
    request = partial.lse[:1].numel()
    return PackedSplits(
        *_flat(Partial(partial.out[None], partial.lse[None])), request=request, head=request // kv_heads
    )


def _flat(partial: Partial) -> tuple[Tensor, Tensor]:
    """``[splits, ..., Dv]`` and ``[splits, ...]`` as ``[splits, rows, Dv]`` and ``[splits, rows]``."""
    splits = len(partial.lse)
    return partial.out.reshape(splits, -1, partial.out.shape[-1]).contiguous(), partial.lse.reshape(
        splits, -1
    ).contiguous()


def _accumulated(partial: Partial) -> Partial:
    return Partial(partial.out.to(partial.lse.dtype), partial.lse)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *, causal: bool, backend: str, **options
) -> Partial:
    """Attention over the first ``lengths`` keys of each batch entry; if causal, the last row sits at the last of them."""
    if backend == "auto" and _splitting_pays(q, k, v):
        return Partial(*decode_attention(q, k, v, lengths=lengths, causal=causal, return_lse=True, **options))
    mask: Mask | None = Causal() if causal else None
    if lengths is not None:
        within = KeyLengths(lengths)
        mask = within & Causal(offset=lengths - q.shape[2]) if causal else within
    return Partial(*attention(q, k, v, mask=mask, return_lse=True, backend=backend, **options))


def _pieces(q: Tensor, k: Tensor, v: Tensor, of_a_head: int) -> int:
    """Into how many pieces of equal length to cut the keys of one prefix that ``of_a_head`` rows share: about one block of rows times
    piece for each multiprocessor. 1 where that is not to be done, as for few rows, which :func:`decode_attention` splits better."""
    if k.shape[0] != 1 or of_a_head <= _ROW_BLOCK or not _kernels_run(q, k, v):
        return 1
    wanted = min(multiprocessors(k.device) // _row_blocks(k, of_a_head), k.shape[2] // _LEAST_PIECE)
    return next((n for n in range(wanted, 1, -1) if k.shape[2] % n == 0), 1)


def _attend_in_pieces(rows: Tensor, k: Tensor, v: Tensor, **options) -> Partial:
    """Attention of ``[pieces, Hkv, R, D]``, copies of the same rows, over so many equal parts of the keys, as if they were a batch."""
    # [pieces, Hkv, S / pieces, D], where they lie
    parts = [x[0].unflatten(1, (len(rows), -1)).transpose(0, 1) for x in (k, v)]
    return Partial(*attention(rows, *parts, return_lse=True, **options))


def _splitting_pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`decode_attention` is the quicker way to attend.

    It packs the heads of a group into one tile of rows, so that a key is read once where all of them fit, and it splits the keys,
    for which a GPU has time if there are fewer blocks of rows than multiprocessors.
    """
    of_a_head = q.shape[1] // k.shape[1] * q.shape[2]
    return _kernels_run(q, k, v) and (of_a_head <= _FEW_ROWS or _row_blocks(k, of_a_head) < multiprocessors(q.device))


def _kernels_run(*tensors: Tensor) -> bool:
    """On a GPU, and where no gradient flows."""
    return tensors[0].is_cuda and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _row_blocks(k: Tensor, of_a_head: int) -> int:
    """How many blocks of rows there are, programs of the forward kernels, if each KV head of k has ``of_a_head`` rows."""
    return k.shape[0] * k.shape[1] * -(-of_a_head // _ROW_BLOCK)


def _lengths_on(device: torch.device, lengths: Tensor | Sequence[int] | None) -> Tensor | None:
    """int64 lengths where they are needed. Their values are looked at where that makes no GPU wait."""
    if lengths is None:
        return None
    lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    if lengths.numel() and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise TypeError(f"lengths must hold integers; got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"lengths must be one-dimensional; got {list(lengths.shape)}")
    return lengths.to(device, torch.int64)


def _check_queries(q: Tensor, k: Tensor) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a torch.Tensor; got {type(q).__name__}")
    if q.dim() != 4:
        raise ValueError(f"q must be [B, Hq, Sq, D]; got {list(q.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}; expected a multiple of the KV heads")


def _members(members: Sequence[int], prefixes: int) -> list[int]:
    chosen = members.tolist() if isinstance(members, Tensor) else list(members)
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"members must be ints, one per request; got {number!r}")
        if not 0 <= number < prefixes:
            raise ValueError(f"members must lie between 0 and {prefixes - 1}, the prefixes there are; got {number}")
    return chosen


def _places(members: list[int], prefixes: int) -> tuple[Tensor, Tensor]:
    """Where each request's rows go when requests are sorted by prefix.

    Returns:
        request_at ``[P, n]``: the request in each place; places behind a prefix's last member hold request 0, and what is
        computed there is not looked at. slot_of ``[B]``: each request's place, counted over all prefixes.
    """
    by_prefix = [[b for b, own in enumerate(members) if own == prefix] for prefix in range(prefixes)]
    most = max(map(len, by_prefix))
    request_at = torch.tensor(
        [group + [0] * (most - len(group)) for group in by_prefix], dtype=torch.int64, device="cpu"
    )
    slot_of = torch.empty(len(members), dtype=torch.int64, device="cpu")
    for prefix, group in enumerate(by_prefix):
        for slot, request in enumerate(group):
            slot_of[request] = prefix * most + slot
    return request_at, slot_of
