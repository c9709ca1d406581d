"""Counters in which the programs of a launch count one another, zero before it and zero after."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flashlib.launch.forms import Form
from flashlib.launch.options import blocks

__all__ = ["arrivals", "counters", "counters_of"]

_capturing = torch._C._cuda_isCurrentStreamCapturing


class ArrivalCounters:
    """Zeros in which the programs of a launch count who has arrived; the kernel leaves zeros behind, so they are written once.

    Launches that may run at the same time must not share counters. Those of one stream follow one another, and share theirs. One
    captured into a CUDA graph may be replayed on any stream, so it has its own, cut from a reserve and never given back.
    """

    RESERVE = 1 << 18

    def __init__(self, device: torch.device):
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.reserve, self.left = self._zeros(0), 0
        self.given: list[Tensor] = []  # to graphs; a graph keeps no tensor alive that existed before it

    def take(self, count: int) -> Tensor:
        if self.device.type != "cuda":
            return self._of_stream(0, count)
        return self.take_on(torch._C._cuda_getCurrentRawStream(self.device.index), count)

    def take_on(self, stream: int, count: int) -> Tensor:
        """The same on the current stream, which is number ``stream``, of the current device."""
        if _capturing():
            return self._own(count)
        if self.left < self.RESERVE // 2:
            self.reserve, self.left = self._zeros(self.RESERVE), self.RESERVE
        return self._of_stream(stream, count)

    def _of_stream(self, stream: int, count: int) -> Tensor:
        counters = self.of_stream.get(stream)
        if counters is None or counters.shape[0] < count:
            counters = self.of_stream[stream] = self._zeros(max(count, 1024))
        return counters

    def _own(self, count: int) -> Tensor:
        if self.left < count:
            return self._zeros(count)  # zeroed by the graph, each time it is replayed: right, but one more node
        aligned = blocks(count, 4) * 4  # a pointer that is no multiple of 16 bytes would have the kernel compiled again
        own, self.reserve = self.reserve[:count], self.reserve[aligned:]
        self.left = len(self.reserve)
        self.given.append(own)
        return own

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)


@cache
def counters_of(device: torch.device) -> ArrivalCounters:
    """Those of a device, which is named with its index."""
    return ArrivalCounters(device)


def arrivals(count: int, device: torch.device) -> Tensor:
    """At least ``count`` counters that are zero, int32, for one launch on the current stream."""
    return counters_of(device).take(count)


def counters(x: Tensor | Form, count: int) -> Tensor | Form:
    """:func:`arrivals` where ``x`` lies; for a form the place where a plan will put them."""
    return x.new_counters(count) if isinstance(x, Form) else arrivals(count, x.device)
