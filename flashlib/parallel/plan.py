"""Who needs which keys: what each rank sends, what it attends to, and under which mask.

The mask of the whole sequence gives each row one interval of keys. A rank's keys are an increasing list of positions, and so are those among them that
another rank's rows see. What an interval leaves of an increasing list is an interval, found by two binary searches. So every pair of ranks is an
attention problem with a mask of ours; what it leaves out altogether is neither computed nor sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashlib.masks import Mask, RowIntervals, band_of

__all__ = ["Piece", "Plan", "Rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one rank, and what they see of the whole.

    Attributes:
        places: where the rows lie, int64 ``[n]``, increasing.
        start, stop: keys of the whole sequence that each row sees, int64 ``[B or 1, n]``.
        offsets: the key at which each row sits, int64 ``[B or 1, n]``: from there ALiBi measures.
    """

    places: Tensor
    start: Tensor
    stop: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, mask: Mask, batch: int, q_len: int, kv_len: int, every: Sequence[Tensor]) -> list[Rows]:
        """Those of each rank, whose places are ``every``. On the CPU."""
        band = mask.band()
        if band is not None:  # from the places alone: nothing as long as the whole is made
            left, right = band
            found = []
            for places in every:
                at = places + (kv_len - q_len)
                start = torch.zeros_like(at) if left is None else at - left
                stop = torch.full_like(at, kv_len) if right is None else at + right + 1
                start, stop = start.clamp(0, kv_len)[None], stop.clamp(0, kv_len)[None]
                sees = start < stop
                found.append(cls(places, torch.where(sees, start, 0), torch.where(sees, stop, 0), at[None]))
            return found
        intervals = mask.intervals(batch, q_len, kv_len, "cpu")
        offsets = mask.row_offsets(batch, q_len, kv_len, torch.device("cpu"))
        offsets = torch.full((1, 1), kv_len - q_len, device="cpu") if offsets is None else offsets
        offsets = offsets.expand(-1, q_len)
        return [cls(at, intervals.start[:, at], intervals.stop[:, at], offsets[:, at] + at) for at in every]

    def seen(self, keys: Tensor) -> RowIntervals:
        """What the rows see of some keys, given by their positions, increasing."""
        start, stop = (
            torch.searchsorted(keys, self.start.contiguous()),
            torch.searchsorted(keys, self.stop.contiguous()),
        )
        sees = start < stop
        return RowIntervals(torch.where(sees, start, 0), torch.where(sees, stop, 0), len(keys))


@dataclass(frozen=True, eq=False)
class Piece:
    """One attention problem of a rank: some of its rows, and keys that came from somewhere.

    Attributes:
        rows: which of the rank's rows, the fewest in a row that hold all which see something.
        keys: which of the keys at hand.
        seen: what each row sees of them.
        offsets: the key, among these, at which each row would sit; int64 ``[B or 1, rows]``; for ALiBi, None without.
    """

    rows: slice
    keys: slice
    seen: RowIntervals
    offsets: Tensor | None

    @property
    def pairs(self) -> int:
        """Visible pairs, summed over the batch entries of the mask."""
        return self.seen.visible_pairs()

    def numbers(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, int | None, int | None]:
        """``(start, stop, left, right)`` as :meth:`flashlib.AttentionSpec.numbers`: a band where it is one."""
        band = band_of(self.seen)
        if band is not None and self.offsets is None:
            return None, None, band.left, band.right
        return self.seen.start.to(device), self.seen.stop.to(device), None, None


@dataclass(frozen=True, eq=False)
class Plan:
    """What the members of one ring do for each other.

    Attributes:
        rows: of each member. keys: positions of each member's keys.
        batch: B.
        by_run: whether pieces must not reach across a gap between keys, as ALiBi's distances do not.
    """

    rows: list[Rows]
    keys: list[Tensor]
    batch: int
    by_run: bool
    _kept: dict[tuple, Any] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls, mask: Mask, batch: int, q_len: int, kv_len: int, rows: Sequence[Tensor], keys: Sequence[Tensor], *, by_run: bool = False
    ) -> Plan:  # fmt: skip
        """The plan of a mask over the whole. ``rows``, ``keys``: positions of those of each member, int64, increasing.

        Raises:
            ValueError: the mask was made for another batch size or length.
        """
        return cls(Rows.of(mask, batch, q_len, kv_len, rows), list(keys), batch, by_run)

    @property
    def members(self) -> int:
        return len(self.rows)

    def needed(self, receiver: int, sender: int) -> Tensor:
        """Which of the sender's keys some row of the receiver sees, in any batch entry: int64, increasing."""
        found = self._kept.get((receiver, sender))
        if found is None:
            seen = self.rows[receiver].seen(self.keys[sender]).seen_keys()
            found = self._kept[receiver, sender] = seen.any(0).nonzero().flatten()
        return found

    def at_hand(self, receiver: int, sender: int) -> Tensor:
        """The positions of those keys: all of a member's own, and what it is sent of another's."""
        keys = self.keys[sender]
        return keys if receiver == sender else keys[self.needed(receiver, sender)]

    def gathered(self, receiver: int) -> Tensor:
        """The positions of all keys that a member has in the end, in order."""
        return torch.cat([self.at_hand(receiver, sender) for sender in range(self.members)]).sort().values

    def pieces(self, receiver: int, sender: int | None) -> list[Piece]:
        """The problems of a member with the keys that it has of another one; None for those of all, gathered. None where it sees nothing."""
        key = (receiver, sender, "pieces")
        if key not in self._kept:
            keys = self.gathered(receiver) if sender is None else self.at_hand(receiver, sender)
            self._kept[key] = self._pieces(self.rows[receiver], keys)
        return self._kept[key]

    def _pieces(self, rows: Rows, keys: Tensor) -> list[Piece]:
        found = []
        for run in _runs(keys) if self.by_run else [slice(0, len(keys))]:
            seen = rows.seen(keys[run])
            looking = (~seen.empty_rows()).any(0).nonzero().flatten()
            if not len(looking):
                continue
            some = slice(int(looking[0]), int(looking[-1]) + 1)
            cut = RowIntervals(seen.start[:, some], seen.stop[:, some], seen.kv_len)
            offsets = None
            if self.by_run:
                offsets = rows.offsets[:, some] - int(keys[run][0]) - torch.arange(some.stop - some.start, device="cpu")
            found.append(Piece(some, run, cut, offsets))
        return found

    def sent(self, sender: int) -> int:
        """Keys that a member sends to all others, each as often as it is sent."""
        return sum(len(self.needed(receiver, sender)) for receiver in range(self.members) if receiver != sender)

    def pairs(self, receiver: int) -> int:
        """Visible pairs of a member's rows with all keys, over all batch entries."""
        rows = self.rows[receiver]
        entries = rows.start.shape[0]
        return int((rows.stop - rows.start).sum()) * (self.batch if entries == 1 else 1)

    def imbalance(self) -> float:
        """The most pairs of a member over the mean."""
        pairs = [self.pairs(member) for member in range(self.members)]
        return max(pairs) * len(pairs) / max(1, sum(pairs))


def _runs(keys: Tensor) -> list[slice]:
    """Where positions follow one another without a gap."""
    if not len(keys):
        return []
    cuts = [0, *((keys.diff() != 1).nonzero().flatten() + 1).tolist(), len(keys)]
    return [slice(a, b) for a, b in pairwise(cuts)]
