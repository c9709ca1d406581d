"""Masks that hold tensors, as one kernel lays them out (:mod:`flashlib.kernels.intervals`).

A mask is laid out anew for every call, from what its tensors hold then, so that lengths may change in place between calls. The kernel takes 4 us to
launch; PyTorch's operators, of which :meth:`flashlib.masks.Mask.intervals` takes some 25, take ten times as long as the attention of a small batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from flashlib.launch import packets
from flashlib.launch.forms import Memory, NotPlannable
from flashlib.launch.options import KernelOptions, blocks
from flashlib.launch.run import best_forward_launches
from flashlib.launch.start import Launch
from flashlib.masks import NO_LIMIT, Intersection, KeyLengths, Mask, Varlen, Window

__all__ = [
    "Rule",
    "RuledOptions",
    "packed_rule",
    "rule_launch",
    "rule_of",
    "ruled_forward_launches",
    "ruled_launches_kept",
    "why_not_planned",
]

ROWS = 128  # that a program of the kernel lays out
ENDS_AT_ONCE = 64
FROM_THE_END, NUMBER, TENSOR, IN_SEQUENCE = range(4)  # as in flashlib.kernels.intervals
MOST_BANDS = 2


@dataclass(frozen=True)
class Band:
    """A band of a rule: ``left`` and ``right`` as in :class:`flashlib.masks.Window`, where its rows sit, and the offset if that is a number."""

    left: int | None
    right: int | None
    kind: int
    offset: int | None = None

    @property
    def is_given(self) -> bool:
        return self.kind == TENSOR


@dataclass(frozen=True)
class Rule:
    """What of a mask is no tensor. Its tensors, in order: lengths; cumulative lengths of queries and of keys; offsets of the bands."""

    has_lengths: bool
    has_ends: bool
    bands: tuple[Band, ...]


def rule_of(mask: Mask, causal: bool) -> tuple[Rule, list[Tensor]] | None:
    """A mask, and the future hidden besides if ``causal``, as a rule and its tensors; None if it is no such intersection.

    It is kept with the mask, whose parts never become others; what its tensors hold may.
    """
    kept = mask.__dict__.setdefault("_rules", {})
    if causal not in kept:
        kept[causal] = _rule_of(mask, causal)
    return kept[causal]


def _rule_of(mask: Mask, causal: bool) -> tuple[Rule, list[Tensor]] | None:
    lengths: list[Any] = []
    ends: list[Any] = []
    bands, offsets, packed = [], [], None
    for part in mask.parts if type(mask) is Intersection else (mask,):
        if type(part) is KeyLengths:
            lengths.append(part.lengths)
        elif type(part) is Varlen:
            packed = part
            ends += (part.cu_seqlens_q, part.cu_seqlens_k)  # not part.ends, which converts them
        elif isinstance(part, Window):
            offset = part.offset
            if isinstance(offset, Tensor):
                offsets.append(offset)
                bands.append(Band(part.left, part.right, TENSOR))
            elif isinstance(offset, Varlen):
                if offset is not packed:
                    return None
                bands.append(Band(part.left, part.right, IN_SEQUENCE))
            else:
                bands.append(Band(part.left, part.right, FROM_THE_END if offset is None else NUMBER, offset))
        else:
            return None
    if causal:
        bands.append(_CAUSAL)
    if len(lengths) > 1 or len(ends) > 2 or len(bands) > MOST_BANDS:
        return None
    return Rule(bool(lengths), bool(ends), tuple(bands)), [*lengths, *ends, *offsets]


_CAUSAL = Band(None, 0, FROM_THE_END)


@lru_cache(maxsize=256)
def packed_rule(left: int | None, right: int | None) -> Rule:
    """The rule of packed sequences under a window that is aligned in each: that of ``packed & Window(left, right, packed)``."""
    return Rule(False, True, () if left is None and right is None else (Band(left, right, IN_SEQUENCE),))


@dataclass(frozen=True)
class RuledOptions:
    """:class:`flashlib.launch.options.KernelOptions` whose intervals are still to be laid out by a rule."""

    options: KernelOptions
    rule: Rule
    given: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        return [*self.given, *self.options.tensors()]

    def with_tensors(self, tensors: Iterable[Tensor]) -> RuledOptions:
        given, rest = list(tensors)[: len(self.given)], list(tensors)[len(self.given) :]
        return replace(self, given=tuple(given), options=self.options.with_tensors(rest))

    def key(self) -> tuple:
        return (self.rule, *self.options.key())

    def kind(self) -> tuple:
        return (self.rule, *self.options.kind())

    def numbers_by_name(self) -> dict[str, float]:
        return self.options.numbers_by_name()

    def with_numbers(self, numbers: Mapping[str, Any]) -> RuledOptions:
        return replace(self, options=self.options.with_numbers(numbers))


def fits(rule: Rule, tensors: list[Tensor], q_len: int, kv_len: int) -> bool:
    """Whether the kernel's numbers are large enough for all sums."""
    widths = [x for band in rule.bands for x in (band.left, band.right, band.offset) if x is not None]
    numbers_fit = all(-NO_LIMIT <= x <= NO_LIMIT for x in (*widths, q_len, kv_len))
    return numbers_fit and all(x.dtype in (torch.int32, torch.int64) for x in tensors)


def rule_launch(q: Tensor, k: Tensor, ruled: RuledOptions) -> tuple[Launch, Tensor, Tensor]:
    """The launch that lays out a rule, and the int32 ``[B or 1, Sq]`` start and stop that it writes."""
    from flashlib.kernels.intervals import row_intervals

    rule, given = ruled.rule, iter(ruled.given)
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    lengths = next(given) if rule.has_lengths else None
    ends_q, ends_k = (next(given), next(given)) if rule.has_ends else (None, None)
    offsets = [next(given) if band.is_given else None for band in rule.bands]
    by_entry = [x for x in (lengths, *offsets) if x is not None and x.shape[0] == batch]
    entries = batch if by_entry else 1
    start, stop = (q.new_empty(entries, q_len, dtype=torch.int32) for _ in range(2))
    arguments: dict[str, Any] = {
        **{"p_start": start, "p_stop": stop, "p_lengths": lengths, "p_ends_q": ends_q, "p_ends_k": ends_k},
        **{
            "stride_length": 0 if lengths is None else lengths.stride(0),
            "n_ends": 0 if ends_q is None else ends_q.shape[0],
        },
        **{
            "q_len": q_len,
            "kv_len": kv_len,
            "LENGTHS": rule.has_lengths,
            "ENDS": rule.has_ends,
            "BANDS": len(rule.bands),
        },
        **{"ROWS": ROWS, "AT_ONCE": ENDS_AT_ONCE},
    }
    sides = [*zip(rule.bands, offsets, strict=True), *[(Band(None, None, FROM_THE_END), None)] * MOST_BANDS]
    for side, (band, offset) in zip("ab", sides, strict=False):
        by_row = offset is not None and offset.dim() == 2
        arguments |= {
            f"p_offset_{side}": offset,
            f"stride_{side}b": 0 if offset is None or offset.shape[0] == 1 else offset.stride(0),
            f"stride_{side}s": offset.stride(1) if offset is not None and by_row else 0,
            f"offset_{side}": band.offset or 0,
            f"left_{side}": band.left or 0,
            f"right_{side}": band.right or 0,
            f"OFFSET_{side.upper()}": band.kind,
            f"HAS_LEFT_{side.upper()}": band.left is not None,
            f"HAS_RIGHT_{side.upper()}": band.right is not None,
        }
    return Launch(row_intervals, (entries * blocks(q_len, ROWS),), arguments), start, stop


def why_not_planned(device: torch.device) -> str | None:
    """What a small kernel, compiled for ``device``, has against being launched by plan; None if nothing."""
    if packets.library() is None:
        return packets.why_missing()
    memory = Memory(device)
    q, lengths = memory.input((1, 1, 16, 16), (256, 256, 16, 1), torch.float16), memory.input((1,), (1,), torch.int64)
    options = KernelOptions(None, None, None, None, None, None, 1.0, 0.0)
    given: Any = (lengths,)
    launch, _, _ = rule_launch(cast(Any, q), cast(Any, q), RuledOptions(options, Rule(True, False, ()), given))
    try:
        packets.packet(launch, packets.Places({form.source: (form.source, 0) for form in memory.made}))
    except NotPlannable as why_not:
        return f"by Triton's own launcher, which takes longer: {why_not}"
    return None


def ruled_forward_launches(
    q: Tensor, k: Tensor, v: Tensor, ruled: RuledOptions
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches of the forward under a rule, and ``(out, lse)``."""
    launches, (out, lse, *_) = ruled_launches_kept(q, k, v, ruled)
    return launches, (out, lse)


def ruled_launches_kept(
    q: Tensor, k: Tensor, v: Tensor, ruled: RuledOptions
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """The same, and ``(out, lse, start, stop)``, for a backward pass under the intervals of its forward."""
    launch, start, stop = rule_launch(q, k, ruled)
    launches, (out, lse) = best_forward_launches(q, k, v, replace(ruled.options, start=start, stop=stop))
    return [launch, *launches], (out, lse, start, stop)
