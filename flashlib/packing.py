"""Packed sequences moved apart, so that every sequence begins where a tile begins.

Tiles follow the pack: a sequence that begins at token 37 of it is cut at other places than one that begins at 0, its sums are formed in another order, and
the last bits of its result depend on its neighbours. Where that must not be (batch-invariant training or serving, exact tests), ``packing="aligned"`` in the
configuration copies q, k and v to where each sequence begins at a multiple of :data:`ALIGNMENT` tokens. A sequence is then cut as it would be in a pack of
its own, forward and backward, and gives the same bits. The tiled algorithm and our kernels promise that; other backends are not taken. The price is the copies, and at most ``ALIGNMENT - 1`` tokens of room per sequence.

How much room is needed follows from shapes alone, so nothing is read from the device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlib.masks import Intersection, Intervals, Mask, RowIntervals, Varlen
from flashlib.spec import AttentionSpec

__all__ = ["ALIGNMENT", "PACKINGS", "AlignedPack", "sequences_of"]

PACKINGS = ("dense", "aligned")
ALIGNMENT = 128  # tokens: a multiple of every kernel's tile of rows that share their keys, and of every tile of keys


def sequences_of(mask: Mask) -> Varlen | None:
    """The packed sequences that a mask keeps apart; None if it names none."""
    parts = mask.parts if isinstance(mask, Intersection) else (mask,)
    return next((part for part in parts if isinstance(part, Varlen)), None)


@dataclass(frozen=True, eq=False)
class AlignedPack:
    """One packed problem moved apart.

    Attributes:
        q, k, v, spec: the problem as it is computed; tokens between the sequences see nothing and are seen by nobody.
        places: where each query went, int64 ``[Sq]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spec: AttentionSpec
    places: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sequences: Varlen) -> AlignedPack:
        """The problem with each sequence of ``sequences`` at a multiple of :data:`ALIGNMENT` tokens."""
        ends_q, ends_k = (x.to(spec.device, torch.int64) for x in sequences.ends)
        shift_q, shift_k = _shifts(ends_q), _shifts(ends_k)
        number = sequences.sequence_of_rows(spec.q_len, spec.device)[0].clamp(min=0)
        places_q = torch.arange(spec.q_len, device=spec.device) + shift_q[number]
        key = torch.arange(spec.kv_len, device=spec.device)
        places_k = key + shift_k[(torch.searchsorted(ends_k, key, right=True) - 1).clamp(min=0)]
        count = len(ends_k) - 1
        q_len, kv_len = (_room(length, count) for length in (spec.q_len, spec.kv_len))

        moved = shift_k[number][None]
        seen = spec.intervals
        nothing = seen.start >= seen.stop
        ends = (torch.where(nothing, 0, x + moved) for x in (seen.start, seen.stop))
        start, stop = (_spread(x, places_q, q_len, dim=1) for x in ends)
        intervals = RowIntervals(start, stop, kv_len)
        offsets, slopes = None, spec.alibi_slopes
        if slopes is not None:
            before = (
                spec.row_offsets
                if spec.row_offsets is not None
                else places_q.new_full((1, spec.q_len), spec.kv_len - spec.q_len)
            )
            offsets = _spread(before + moved - shift_q[number][None], places_q, q_len, dim=1)
            slopes = slopes if slopes.dim() == 2 else _spread(slopes, places_q, q_len, dim=2)
        changed: dict[str, Any] = {
            "q_len": q_len,
            "kv_len": kv_len,
            "mask": Intervals(intervals, offsets),
            "alibi_slopes": slopes,
        }
        return cls(
            _spread(q, places_q, q_len, dim=2),
            _spread(k, places_k, kv_len, dim=2),
            _spread(v, places_k, kv_len, dim=2),
            dataclasses.replace(spec, **changed),
            places_q,
        )

    def gathered(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Results of the moved problem, put back to where the queries came from."""
        return out.index_select(2, self.places), None if lse is None else lse.index_select(2, self.places)


def _shifts(ends: Tensor) -> Tensor:
    """By how much each sequence moves, and, last, what is behind them all: int64 ``[N + 1]``."""
    lengths = ends.diff()
    padded = (lengths + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return torch.nn.functional.pad((padded - lengths).cumsum(0), (1, 0))


def _room(length: int, count: int) -> int:
    """Tokens that ``count`` sequences of ``length`` tokens together take at most, whatever their lengths; whole tiles."""
    return (length + (ALIGNMENT - 1) * (count + 1)) // ALIGNMENT * ALIGNMENT


def _spread(x: Tensor, places: Tensor, length: int, *, dim: int) -> Tensor:
    """``x`` with entry i of dimension ``dim`` at ``places[i]`` of ``length``, and zeros between; laid out as ``x``."""
    if x.dim() == 4 and x.stride(1) < x.stride(2):  # tokens first, as in flash_attn
        room = x.new_zeros(x.shape[0], length, x.shape[1], x.shape[3]).transpose(1, 2)
    else:
        room = x.new_zeros(*x.shape[:dim], length, *x.shape[dim + 1 :])
    return room.index_copy(dim, places, x)
