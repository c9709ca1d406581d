"""A small fast memory in front of a large slow one: the two-level machine on which the IO of an algorithm is counted.

The FlashAttention paper counts accesses to slow memory (HBM) of an algorithm that can keep M bytes in fast memory (SRAM).
`FastMemory` plays that machine. It keeps the tensor views used last (LRU), loads what is not there, and writes back what was
changed when it has to make room. A tensor that is freed vanishes from it without being written, as a temporary in registers
or shared memory does.

Source of the model: Aggarwal and Vitter 1988, "The input/output complexity of sorting and related problems"; its use for
attention: Dao et al. 2022, "FlashAttention", section 3.2.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Region(NamedTuple):
    """The memory that a tensor addresses, whichever way its dimensions are ordered: a tile and its transpose are one region.

    Attributes:
        storage: key of the allocation.
        start, stop: first byte, and one past the last.
        runs: (stride in bytes, count), innermost first, with adjacent dimensions merged.
    """

    storage: int
    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Region:
        itemsize = tensor.element_size()
        start = int(tensor.storage_offset()) * itemsize
        if tensor.is_contiguous():
            size = tensor.numel() * itemsize
            return cls(storage_key(tensor), start, start + size, ((1, size),))
        runs = [(1, itemsize)]
        for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            inner_stride, inner_count = runs[-1]
            if stride * itemsize == inner_stride * inner_count:
                runs[-1] = (inner_stride, inner_count * count)
            elif stride and count > 1:
                runs.append((stride * itemsize, count))
        span = 1 + sum(stride * (count - 1) for stride, count in runs) if tensor.numel() else 0
        return cls(storage_key(tensor), start, start + span, tuple(runs))

    @property
    def bytes(self) -> int:
        """Distinct bytes. Overlapping windows (`unfold`) have at most the span that they lie in."""
        return min(math.prod(size for _, size in self.runs), self.stop - self.start)

    def covers(self, other: Region) -> bool:
        """Whether `other` surely lies within this region: it is the same, or this one has no holes and spans it."""
        spans = self.storage == other.storage and self.start <= other.start and other.stop <= self.stop
        return self == other or (spans and self.bytes == self.stop - self.start)


@dataclass
class _Resident:
    name: str
    bytes: int
    changed: bool


class FastMemory:
    """`capacity` bytes, managed least recently used first. A region larger than that streams past without being kept.

    Its methods tell what moved to or from slow memory; names are those under which the regions were given.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._resident: OrderedDict[Region, _Resident] = OrderedDict()  # oldest first
        self._of_storage: defaultdict[int, set[Region]] = defaultdict(set)

    def read(self, region: Region, size: int, name: str) -> tuple[int, list[tuple[str, int]]]:
        """Have `size` bytes of `region` at hand: (bytes loaded, write-backs (name, bytes) made to have room)."""
        if self._touch(region) is not None:
            return 0, []
        if size < region.bytes:  # a gather takes a few elements of a large tensor; they stream past
            return size, []
        return size, self._admit(region, _Resident(name, size, changed=False))

    def write(self, region: Region, size: int, name: str) -> list[tuple[str, int]]:
        """Change `size` bytes of `region`: write-backs made now. Its own follows when it has to leave."""
        holder = self._touch(region)
        if holder is not None:
            holder.changed = True
            return []
        if size < region.bytes or size > self.capacity:
            return [(name, size)]
        for part in [kept for kept in self._of_storage[region.storage] if region.covers(kept)]:
            self._remove(part)  # overwritten: the whole is newer
        return self._admit(region, _Resident(name, size, changed=True))

    def forget(self, storage: int) -> None:
        """The tensors of `storage` were freed: nobody will ask for their values again."""
        for region in list(self._of_storage[storage]):
            self._remove(region)
        del self._of_storage[storage]

    def flush(self) -> list[tuple[str, int]]:
        """Write back everything changed, and keep it: (name, bytes) of each."""
        changed = [kept for kept in self._resident.values() if kept.changed]
        for kept in changed:
            kept.changed = False
        return [(kept.name, kept.bytes) for kept in changed]

    def _touch(self, region: Region) -> _Resident | None:
        holder = region
        if region not in self._resident:
            holder = next((kept for kept in self._of_storage[region.storage] if kept.covers(region)), None)
        if holder is None:
            return None
        self._resident.move_to_end(holder)
        return self._resident[holder]

    def _admit(self, region: Region, resident: _Resident) -> list[tuple[str, int]]:
        if resident.bytes > self.capacity:
            return []
        written_back = []
        while self.used + resident.bytes > self.capacity:
            oldest, kept = next(iter(self._resident.items()))
            self._remove(oldest)
            if kept.changed:
                written_back.append((kept.name, kept.bytes))
        self._resident[region] = resident
        self._of_storage[region.storage].add(region)
        self.used += resident.bytes
        return written_back

    def _remove(self, region: Region) -> None:
        self.used -= self._resident.pop(region).bytes
        self._of_storage[region.storage].discard(region)


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the memory behind `tensor`, shared by all its views, valid while the memory lives."""
    return tensor.untyped_storage()._cdata
