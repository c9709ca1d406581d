"""Which query may look at which key.

One idea carries every mask here: **each query row sees one interval of keys**, ``[start, stop)``. Causal attention is
``[0, i + offset + 1)``, a sliding window is ``[i + offset - left, i + offset + right + 1)``, a padded batch is
``[0, length)``, and so on. Three things follow:

* ``a & b`` is exact and costs nothing: the intersection of two intervals is an interval.
* Whether a tile of rows x keys is empty, full or mixed is decided from two integers per row, never from the N x N mask.
* A kernel needs two integers per row to apply any mask, however many were combined.

Rows and keys are aligned **bottom-right** when their counts differ: the last query sits at the last key, as in decoding,
where one new query looks back on a long cache. (PyTorch's ``is_causal`` aligns top-left; chapter 4 shows the difference.)
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from flashlib.values import may_read

__all__ = [
    "Causal",
    "Documents",
    "Intersection",
    "Intervals",
    "KeyLengths",
    "Mask",
    "Prefix",
    "RowIntervals",
    "Tile",
    "Unmasked",
    "Varlen",
    "Window",
]

# Tokens. No tensor is that long, so a window that reaches so far has no end: as None. What remains of a band leaves room in the int32
# in which the kernels add a length, an offset and a width.
NO_LIMIT = 2**30
INT64 = torch.iinfo(torch.int64)


class Tile(enum.IntEnum):
    """What a mask leaves of a tile of query rows x keys."""

    SKIP = 0  # no pair is visible: the tile need not be loaded
    PARTIAL = 1  # some pairs are visible: the mask must be applied
    FULL = 2  # every pair is visible: no mask arithmetic is needed


@dataclass(frozen=True, eq=False)
class RowIntervals:
    """A mask made concrete: row ``i`` of batch entry ``b`` sees the keys ``start[b, i] <= j < stop[b, i]``.

    Attributes:
        start, stop: int64 ``[B or 1, Sq]``, ``0 <= start <= stop <= kv_len``. A row that sees nothing has ``start == stop``.
        kv_len: number of keys, Sk.
    """

    start: Tensor
    stop: Tensor
    kv_len: int

    @property
    def q_len(self) -> int:
        return self.start.shape[1]

    def dense(self) -> Tensor:
        """The mask as a boolean matrix ``[B or 1, Sq, Sk]``, True where visible. Makes Sq * Sk elements."""
        return self.tile(slice(0, self.q_len), slice(0, self.kv_len))

    def tile(self, rows: slice, keys: slice) -> Tensor:
        """The part of :meth:`dense` in one tile: bool ``[B or 1, rows, keys]``."""
        key = torch.arange(keys.start, keys.stop, device=self.start.device)
        return (key >= self.start[:, rows, None]) & (key < self.stop[:, rows, None])

    def classify(self, rows: slice, keys: slice) -> Tile:
        """What is left of one tile, over all batch entries together: SKIP or FULL only if it is so in every entry."""
        first, last = torch.tensor([[keys.start], [keys.stop]], device=self.start.device)
        seen = self._keys_seen(rows, first, last)
        if not seen.numel():  # no rows, or no batch entries
            return Tile.SKIP
        return _tile_kind(int(seen.min()), int(seen.max()), keys.stop - keys.start)

    def tile_map(self, block_q: int, block_k: int) -> Tensor:
        """Every tile's :class:`Tile` value: int8 ``[B or 1, ceil(Sq / block_q), ceil(Sk / block_k)]``.

        The last tile of a row or column may be smaller; it is FULL when everything it really holds is visible. Work is
        O(Sq * Sk / block_k), memory O(block_q * Sk / block_k).
        """
        first = torch.arange(0, self.kv_len, _positive("block_k", block_k), device=self.start.device)
        last = (first + block_k).clamp(max=self.kv_len)
        columns = []
        for row in range(0, self.q_len, _positive("block_q", block_q)):
            seen = self._keys_seen(slice(row, min(row + block_q, self.q_len)), first, last)
            kind = torch.full_like(seen[:, 0], Tile.PARTIAL, dtype=torch.int8)
            kind[(seen == last - first).all(1)] = Tile.FULL
            kind[(seen == 0).all(1)] = Tile.SKIP
            columns.append(kind)
        empty = torch.empty(self.start.shape[0], 0, len(first), dtype=torch.int8, device=self.start.device)
        return torch.stack(columns, dim=1) if columns else empty

    def visible_pairs(self) -> int:
        """Exact number of visible (row, key) pairs, summed over the batch entries held here (1 if the mask is shared)."""
        return int((self.stop - self.start).sum())

    def empty_rows(self) -> Tensor:
        """Rows that see no key at all: bool ``[B or 1, Sq]``."""
        return self.stop == self.start

    def seen_keys(self) -> Tensor:
        """Keys that at least one row sees: bool ``[B or 1, Sk]``. What is False here is never read, whatever it holds."""
        # +1 where a row's interval opens, -1 where it closes; the running sum counts the rows that see each key.
        change = torch.zeros(self.start.shape[0], self.kv_len + 1, dtype=torch.int64, device=self.start.device)
        ones = torch.ones_like(self.start)
        change = change.scatter_add(1, self.start, ones).scatter_add(1, self.stop, -ones)
        return change.cumsum(1)[:, :-1] > 0

    def _keys_seen(self, rows: slice, first: Tensor, last: Tensor) -> Tensor:
        """How many keys of each range [first, last) each row sees: int64 ``[B or 1, rows, ranges]``."""
        start, stop = self.start[:, rows, None], self.stop[:, rows, None]
        return (torch.minimum(stop, last) - torch.maximum(start, first)).clamp(min=0)


def _tile_kind(fewest: int, most: int, width: int) -> Tile:
    if most == 0:
        return Tile.SKIP
    return Tile.FULL if fewest == width else Tile.PARTIAL


class Mask:
    """A rule saying which keys each query row sees. Combine rules with ``&``: a pair must be allowed by both."""

    def bounds(self, batch: int, q_len: int, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(start, stop)``, each broadcastable to ``[batch, q_len]``; may lie outside ``[0, kv_len]``."""
        raise NotImplementedError

    def band(self) -> tuple[int | None, int | None] | None:
        """``(left, right)`` if the mask is a plain diagonal band, bottom-right aligned, with None for "unbounded".

        Kernels that know bands (``window_size`` in flash_attn) need nothing else. None if the mask is more than a band.
        """
        return None

    def row_offsets(self, batch: int, q_len: int, kv_len: int, device: torch.device) -> Tensor | None:
        """The key at which each row sits, less the row: integers broadcastable to ``[batch, q_len]``.

        From there ALiBi measures its distances. None if the mask does not say: then it is ``Sk - Sq``, bottom-right.
        """
        return None

    def intervals(self, batch: int, q_len: int, kv_len: int, device: torch.device | str | None = None) -> RowIntervals:
        """The mask for ``batch`` sequences of ``q_len`` queries and ``kv_len`` keys.

        Raises:
            ValueError: the mask was made for another batch size or length; says which.
        """
        device = torch.device(device or "cpu")
        start, stop = self.bounds(batch, q_len, kv_len, device)
        # 0 for a mask of no sequences. Not torch.broadcast_shapes, which imports PyTorch's compiler.
        entries = stop.shape[0] if start.shape[0] == 1 else start.shape[0]
        start = start.clamp(0, kv_len).expand(entries, q_len)
        stop = stop.clamp(0, kv_len).expand(entries, q_len)
        sees_something = start < stop
        return RowIntervals(torch.where(sees_something, start, 0), torch.where(sees_something, stop, 0), kv_len)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            raise TypeError(f"a mask combines with another flashlib mask by &; got {type(other).__name__}")
        parts = [part for mask in (self, other) for part in (mask.parts if isinstance(mask, Intersection) else (mask,))]
        parts = [part for part in parts if not isinstance(part, Unmasked)]
        if len(parts) > 1:
            return Intersection(tuple(parts))
        return parts[0] if parts else Unmasked()


@dataclass(frozen=True, eq=False)
class Unmasked(Mask):
    """Every row sees every key."""

    def bounds(self, batch, q_len, kv_len, device):
        return _row(0, device), _row(kv_len, device)

    def band(self):
        return None, None


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """A sliding window: row ``i`` sees keys ``i + offset - left .. i + offset + right``, both ends included.

    Args:
        left, right: how many keys before and after its own position a row sees; None for no limit. Any number will do, however large
            (``sys.maxsize``): what lies beyond the first or the last key is not there.
        offset: the key position at which row 0 sits. None aligns bottom-right: ``Sk - Sq``. An int, or an integer tensor
            ``[B]`` (one per sequence) or ``[B, Sq]`` (one per row) for batches whose sequences start at different places. Or a
            :class:`Varlen`, to align bottom-right inside each of its sequences.

    Source: Beltagy et al. 2020, Longformer (arXiv 2004.05150), section 3.1; ``window_size`` in flash_attn.
    """

    left: int | None = None
    right: int | None = None
    offset: int | Tensor | Varlen | None = None

    def __post_init__(self):
        for name in ("left", "right"):
            width = getattr(self, name)
            if width is not None:
                object.__setattr__(self, name, _count(f"Window: {name}", width, "or None for no limit"))
        if self.offset is not None and not isinstance(self.offset, int | Varlen):
            object.__setattr__(self, "offset", _integers("offset", self.offset, ndims=(1, 2)))

    def bounds(self, batch, q_len, kv_len, device):
        shape, offset = (batch, q_len, kv_len, device), self._offset(q_len, device)
        start = _row(0, device) if self.left is None else _keys_from_rows(offset, -self.left, *shape)
        stop = _row(kv_len, device) if self.right is None else _keys_from_rows(offset, self.right + 1, *shape)
        return start, stop

    def _offset(self, q_len: int, device: torch.device) -> int | Tensor | None:
        return self.offset.offset(q_len, device) if isinstance(self.offset, Varlen) else self.offset

    def band(self):
        if self.offset is not None:
            return None
        return tuple(None if width is None or width >= NO_LIMIT else width for width in (self.left, self.right))

    def row_offsets(self, batch, q_len, kv_len, device):
        offset = self._offset(q_len, device)
        return None if offset is None else _held_row_offsets(offset, batch, q_len, device)


class Causal(Window):
    """No row sees its future: row ``i`` sees keys ``j <= i + offset``. A window without a left end.

    Args:
        offset: as in :class:`Window`. None aligns bottom-right, so that the last row sees every key. For a batch of caches
            filled to different lengths: ``KeyLengths(lengths) & Causal(offset=lengths - q_len)``.
    """

    def __init__(self, offset: int | Tensor | Varlen | None = None):
        super().__init__(left=None, right=0, offset=offset)

    def __repr__(self):
        return f"Causal(offset={self.offset})"


@dataclass(frozen=True, eq=False)
class KeyLengths(Mask):
    """A padded batch: sequence ``b`` has ``lengths[b]`` real keys, and what lies behind them is never read.

    Args:
        lengths: integers ``[B]``, ``0 <= lengths <= Sk``. Where nobody looks at them (:mod:`flashlib.values`), a length below counts as 0 and one
            above as Sk.
    """

    lengths: Tensor | Sequence[int]

    def __post_init__(self):
        object.__setattr__(self, "lengths", _integers("lengths", self.lengths, ndims=(1,), minimum=0))

    def bounds(self, batch, q_len, kv_len, device):
        _expect_batch("KeyLengths", self.lengths, batch)
        if may_read(self.lengths) and batch and int(self.lengths.max()) > kv_len:
            raise ValueError(
                f"KeyLengths: lengths go up to {int(self.lengths.max())}, but there are only {kv_len} keys"
            )
        return _row(0, device), self.lengths.to(device)[:, None]


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Several documents packed into one sequence: a row sees only the keys of its own document.

    Args:
        q_ids: integers ``[Sq]`` or ``[B, Sq]``: the document each query row belongs to. A negative id marks padding: it sees
            nothing and nobody sees it.
        k_ids: the same for keys, ``[Sk]`` or ``[B, Sk]``. None if keys and queries are the same tokens.

    Raises:
        ValueError: the keys of one document are not next to each other (each document must be one run). Where nobody looks at the ids
            (:mod:`flashlib.values`), a document counts as one run of its size that begins with its first key.
    """

    q_ids: Tensor | Sequence[int]
    k_ids: Tensor | Sequence[int] | None = None

    def __post_init__(self):
        for name in ("q_ids", "k_ids"):
            ids = getattr(self, name)
            if ids is not None:
                ids = _integers(name, ids, ndims=(1, 2))
                object.__setattr__(self, name, ids[None] if ids.dim() == 1 else ids)
        k_ids = self.q_ids if self.k_ids is None else self.k_ids
        if not may_read(k_ids):
            return
        ids, order = k_ids.sort(dim=1, stable=True)
        same_document = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        broken = same_document & (order[:, 1:] != order[:, :-1] + 1)
        if broken.any():
            raise ValueError(
                f"Documents: document {int(ids[:, 1:][broken][0])} occurs in several places; "
                "the keys of one document must be next to each other"
            )

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor) -> Documents:
        """Documents of these lengths packed one after another into a single sequence of ``sum(lengths)`` tokens."""
        lengths = _integers("lengths", lengths, ndims=(1,), minimum=0)
        return cls(torch.arange(len(lengths), device="cpu").repeat_interleave(lengths.cpu()))

    def bounds(self, batch, q_len, kv_len, device):
        k_ids = self.q_ids if self.k_ids is None else self.k_ids
        for name, ids, length in (("q_ids", self.q_ids, q_len), ("k_ids", k_ids, kv_len)):
            if ids.shape[0] not in (1, batch) or ids.shape[1] != length:
                hint = "; give k_ids when there are more or fewer keys than queries" if self.k_ids is None else ""
                raise ValueError(
                    f"Documents: {name} has shape {tuple(ids.shape)}, but there are {batch} sequences of {length} tokens{hint}"
                )
        entries = max(self.q_ids.shape[0], k_ids.shape[0])
        q_ids = self.q_ids.to(device).expand(entries, q_len).contiguous()
        ids, order = k_ids.to(device).expand(entries, kv_len).sort(dim=1, stable=True)
        ids = ids.contiguous()
        # Each document is one run of keys, so its first key and its size say where the run is.
        first = torch.searchsorted(ids, q_ids, side="left")
        size = torch.searchsorted(ids, q_ids, side="right") - first
        size = torch.where(q_ids < 0, 0, size)
        start = order.gather(1, first.clamp(max=kv_len - 1)) if kv_len else first
        return start, start + size


@dataclass(frozen=True, eq=False)
class Varlen(Mask):
    """Sequences of different lengths packed one after another: a row sees only the keys of its own sequence.

    As :class:`Documents`, but told by the boundaries, and a sequence may have more or fewer queries than keys. Causal attention
    and windows inside each sequence, aligned bottom-right there: ``packed & Causal(packed)``.

    Args:
        cu_seqlens_q: cumulative lengths, integers ``[N + 1]``: sequence n has the rows ``cu_seqlens_q[n] <= i <
            cu_seqlens_q[n + 1]``, none if the two are equal. Rows behind the last sequence are padding: they see nothing.
        cu_seqlens_k: the same for keys; None if keys and queries are the same tokens.

    Attributes:
        lengths_q, lengths_k: how many queries and keys each sequence has, int64 ``[N]``, on the CPU: asking for them waits for the GPU.

    Raises:
        ValueError: cumulative lengths are not equally many for queries and keys; or they do not begin with 0, or fall, or go beyond the tokens
            there are. Where nobody looks at them (:mod:`flashlib.values`), the rows of such sequences see some of the keys there are.

    Source: ``cu_seqlens_q`` and ``cu_seqlens_k`` in flash_attn.
    """

    cu_seqlens_q: Tensor | Sequence[int]
    cu_seqlens_k: Tensor | Sequence[int] | None = None

    def __post_init__(self):
        if self.cu_seqlens_k is None:
            object.__setattr__(self, "cu_seqlens_k", self.cu_seqlens_q)
        for side in ("q", "k"):
            name = f"cu_seqlens_{side}"
            object.__setattr__(self, name, _cumulative(name, getattr(self, name)))
        if len(self.cu_seqlens_q) != len(self.cu_seqlens_k):
            raise ValueError(
                f"Varlen: cu_seqlens_q has {len(self.cu_seqlens_q) - 1} sequences, but cu_seqlens_k has {len(self.cu_seqlens_k) - 1}"
            )

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Both cumulative lengths, int64."""
        ends: Any = self.cu_seqlens_q, self.cu_seqlens_k
        return ends[0].to(torch.int64), ends[1].to(torch.int64)

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens_q) - 1

    @property
    def lengths_q(self) -> Tensor:
        return self.ends[0].cpu().diff()

    @property
    def lengths_k(self) -> Tensor:
        return self.ends[1].cpu().diff()

    def offset(self, q_len: int, device: torch.device | str | None = None) -> Tensor:
        """The key at which each row sits, less the row: int64 ``[1, q_len]``. In each sequence, the last row sits at the last key."""
        ends_q, ends_k, sequence = self._sequences(q_len, device)
        end = (sequence + 1).clamp(max=len(ends_q) - 1)
        return (ends_k - ends_q)[end]

    def row_offsets(self, batch, q_len, kv_len, device):
        return self.offset(q_len, device)

    def sequence_of_rows(self, q_len: int, device: torch.device | str | None = None) -> Tensor:
        """The number of the sequence to which each row belongs: int64 ``[1, q_len]``; N for rows behind the last one."""
        return self._sequences(q_len, device)[2]

    def bounds(self, batch, q_len, kv_len, device):
        for side, length, ends in (("q", q_len, self.cu_seqlens_q), ("k", kv_len, self.cu_seqlens_k)):
            if may_read(ends) and int(ends[-1]) > length:
                raise ValueError(
                    f"Varlen: cu_seqlens_{side} goes up to {int(ends[-1])}, but there are only {length} tokens"
                )
        _, ends_k, sequence = self._sequences(q_len, device)
        # Rows behind the last sequence come out as sequence N, which begins and ends where the last one ends.
        return ends_k[sequence], ends_k[(sequence + 1).clamp(max=len(ends_k) - 1)]

    def _sequences(self, q_len: int, device: torch.device | str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Both cumulative lengths on ``device``, and the number of the sequence to which each row belongs: ``[1, q_len]``."""
        ends_q, ends_k = (x.to(device or x.device) for x in self.ends)
        rows = torch.arange(q_len, device=ends_q.device)[None]
        sequence = torch.searchsorted(ends_q, rows, right=True) - 1
        return ends_q, ends_k, sequence.clamp(min=0)  # below 0 only where cumulative lengths do not begin with 0


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Prefix-LM: every row sees the first ``lengths`` keys, and beyond them only its past (``j <= i + offset``).

    It holds its own causal part: combining it with :class:`Causal` removes the prefix again, since ``&`` means both.

    Args:
        lengths: prefix length, one int or integers ``[B]``.
        offset: as in :class:`Window`.

    Source: Raffel et al. 2020, T5 (arXiv 1910.10683), figure 4.
    """

    lengths: int | Tensor | Sequence[int]
    offset: int | Tensor | None = None

    def __post_init__(self):
        lengths = [self.lengths] if isinstance(self.lengths, int) else self.lengths
        object.__setattr__(self, "lengths", _integers("lengths", lengths, ndims=(1,), minimum=0))
        if self.offset is not None and not isinstance(self.offset, int):
            object.__setattr__(self, "offset", _integers("offset", self.offset, ndims=(1, 2)))

    def bounds(self, batch, q_len, kv_len, device):
        if len(self.lengths) != 1:
            _expect_batch("Prefix", self.lengths, batch)
        past = _keys_from_rows(self.offset, 1, batch, q_len, kv_len, device)
        return _row(0, device), torch.maximum(self.lengths.to(device)[:, None], past)

    def row_offsets(self, batch, q_len, kv_len, device):
        return None if self.offset is None else _held_row_offsets(self.offset, batch, q_len, device)


@dataclass(frozen=True, eq=False)
class Intervals(Mask):
    """A mask given as its row intervals, for one batch and one pair of lengths.

    Args:
        given: what each row sees.
        offsets: the key at which each row sits, less the row: integers ``[B or 1, Sq]``, from where ALiBi measures; None: Sk - Sq.
    """

    given: RowIntervals
    offsets: Tensor | None = None

    def bounds(self, batch, q_len, kv_len, device):
        entries = self.given.start.shape[0]
        if entries not in (1, batch) or (self.given.q_len, self.given.kv_len) != (q_len, kv_len):
            raise ValueError(
                f"the mask was made for {entries} sequences of {self.given.q_len} queries and {self.given.kv_len} keys; "
                f"got {batch} sequences of {q_len} queries and {kv_len} keys"
            )
        return self.given.start.to(device), self.given.stop.to(device)

    def row_offsets(self, batch, q_len, kv_len, device):
        return None if self.offsets is None else self.offsets.to(device)


@dataclass(frozen=True, eq=False)
class Intersection(Mask):
    """Several masks at once: a pair is visible if every part allows it. Written ``a & b``.

    Rows sit where the first part that says so puts them.
    """

    parts: tuple[Mask, ...]

    def bounds(self, batch, q_len, kv_len, device):
        starts, stops = zip(*(part.bounds(batch, q_len, kv_len, device) for part in self.parts), strict=True)
        return reduce(torch.maximum, starts), reduce(torch.minimum, stops)

    def band(self):
        bands = [part.band() for part in self.parts]
        if any(band is None for band in bands):
            return None
        return tuple(
            min((width for width in side if width is not None), default=None) for side in zip(*bands, strict=True)
        )

    def row_offsets(self, batch, q_len, kv_len, device):
        said = (part.row_offsets(batch, q_len, kv_len, device) for part in self.parts)
        return next((offsets for offsets in said if offsets is not None), None)


def band_of(intervals: RowIntervals) -> Window | None:
    """The band that these rows are, if they are one. Looks at numbers: on a GPU it waits.

    The first row's end and the last row's beginning say which band it can be.
    """
    q_len, kv_len = intervals.q_len, intervals.kv_len
    if 0 in (q_len, kv_len) or intervals.start.shape[0] == 0:
        return None
    first_stop, last_start = int(intervals.stop[0, 0]), int(intervals.start[0, -1])
    left = None if last_start == 0 else kv_len - 1 - last_start
    right = None if first_stop == kv_len else first_stop - 1 - (kv_len - q_len)
    if right is not None and right < 0:
        return None
    band = Window(left, right)
    expected = band.intervals(1, q_len, kv_len, intervals.start.device)
    same = (expected.start == intervals.start).all() & (expected.stop == intervals.stop).all()
    return band if bool(same) else None


def _row(value: int, device: torch.device) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.int64, device=device)


def _keys_from_rows(
    offset: int | Tensor | None, reach: int, batch: int, q_len: int, kv_len: int, device: torch.device
) -> Tensor:
    """The key ``reach`` away from the position of each row: int64 ``[B or 1, Sq]``.

    Exact where it lies between 0 and ``kv_len``, and else on the right side of both: no sum of large numbers wraps around.
    """
    rows = torch.arange(q_len, device=device)[None]
    if offset is None:
        offset, reach = kv_len - q_len, min(max(reach, -NO_LIMIT), NO_LIMIT)
    if not isinstance(offset, Tensor):
        return rows + max(min(offset + reach, kv_len), -q_len)
    return rows + _added(_row_offsets(offset, batch, q_len, device), reach, -q_len, kv_len)


def _added(x: Tensor, number: int, least: int, most: int) -> Tensor:
    """``x + number`` held between two bounds, as exact as if integers had no largest one."""
    low, high = least - number, most - number  # where x meets the bounds
    if abs(number) > NO_LIMIT:
        if low > INT64.max or high < INT64.min:
            return torch.full_like(x, least if low > INT64.max else most)
        low, high = max(low, INT64.min), min(high, INT64.max)
    half = number // 2  # the whole of it may be no int64
    return x.clamp(low, high) + half + (number - half)


def _held_row_offsets(offset: int | Tensor, batch: int, q_len: int, device: torch.device) -> Tensor:
    """:func:`_row_offsets` within what an int32 holds with a length added. So far from all keys, distances differ as they do further away."""
    if isinstance(offset, Tensor):
        return _row_offsets(offset, batch, q_len, device).clamp(-NO_LIMIT, NO_LIMIT)
    return _row(min(max(offset, -NO_LIMIT), NO_LIMIT), device)


def _row_offsets(offset: Tensor, batch: int, q_len: int, device: torch.device) -> Tensor:
    """The key position at which each row sits, less the row: ``[B or 1, Sq or 1]``."""
    if offset.shape not in ((batch,), (1, q_len), (batch, q_len)):
        raise ValueError(
            f"offset has shape {tuple(offset.shape)}; expected ({batch},) or ({batch}, {q_len}): one per sequence or row"
        )
    return offset.to(device)[:, None] if offset.dim() == 1 else offset.to(device)


def _expect_batch(mask: str, lengths: Tensor, batch: int) -> None:
    if len(lengths) != batch:
        raise ValueError(f"{mask}: {len(lengths)} lengths for a batch of {batch}; expected one length per sequence")


def _cumulative(name: str, cu_seqlens: Tensor | Sequence[int]) -> Tensor:
    """Cumulative lengths as int64, looked at where that waits for nobody."""
    ends = _tensor(cu_seqlens)
    if (
        ends.dtype != torch.int32 or ends.dim() != 1
    ):  # int32, as flash_attn has them, is left as it is: a conversion is a kernel
        ends = _integers(name, cu_seqlens, ndims=(1,))
    if not len(ends):
        raise ValueError(f"{name} must begin with 0; got []")
    if not may_read(ends):
        return ends
    if ends[0] != 0:
        raise ValueError(f"{name} must begin with 0; got {ends.tolist()[:1]}")
    falls = ends[1:] < ends[:-1]
    if falls.any():
        n = int(falls.nonzero()[0])
        raise ValueError(f"{name} must never fall; got {int(ends[n])} and then {int(ends[n + 1])}, at entry {n + 1}")
    return ends


def _count(name: str, value: int, hint: str = "") -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number {hint}; got {value!r}".replace("  ", " ")) from None
    if count < 0:
        raise ValueError(f"{name} must be at least 0 {hint}; got {count}")
    return count


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    return value


def _tensor(values: Tensor | Sequence[int]) -> Tensor:
    """What is no tensor yet becomes one on the CPU, whatever PyTorch's default device."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def _integers(name: str, values: Tensor | Sequence[int], ndims: tuple[int, ...], minimum: int | None = None) -> Tensor:
    """``values`` as an int64 tensor, or an error that says what came."""
    given = _tensor(values)
    if given.dtype == torch.uint64:
        raise TypeError(f"{name} must hold integers that fit into int64; got {given.dtype}")
    if (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool) and given.numel():
        raise TypeError(f"{name} must hold integers; got {given.dtype}")
    if given.dim() not in ndims:
        expected = " or ".join(f"{n}-dimensional" for n in ndims)
        raise ValueError(f"{name} must be {expected}; got shape {tuple(given.shape)}")
    if minimum is not None and may_read(given) and given.numel() and int(given.min()) < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {int(given.min())}")
    return given.to(torch.int64)
