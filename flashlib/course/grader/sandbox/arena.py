"""Memory that the grader shares with one call: what is handed over in it, and whether it was written to."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from flashlib.course.grader.sandbox import wire
from flashlib.course.grader.sandbox.handout import PIECE, Guarded


class Arena:
    """The arguments of one call in memory that grader and child share.

    The child computes on these very bytes. So whether it changed its inputs is not its word: the grader reads the bytes
    back and compares them with its own. What is guarded is not put there: it is handed out during the call.
    """

    def __init__(
        self, tensors: list[torch.Tensor], guarded: Mapping[str, tuple[torch.Tensor, int]] | None = None
    ) -> None:
        guards = {tensor.untyped_storage()._cdata: (name, room) for name, (tensor, room) in (guarded or {}).items()}
        self.guarded: list[Guarded] = []
        self.descriptions: list[dict[str, Any]] = []
        self._pristine: dict[int, bytes] = {}  # position -> bytes of one storage
        self._positions: list[int] = []
        placed: dict[int, int] = {}
        end = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in placed:
                data = bytes(wire.storage_bytes(tensor.detach()))
                if storage._cdata in guards:
                    end = _whole_pieces(end)
                    self.guarded.append(Guarded(guards[storage._cdata][0], end, data, guards[storage._cdata][1]))
                else:
                    self._pristine[end] = data
                placed[storage._cdata] = end
                end += wire.padded(len(data))
                if storage._cdata in guards:
                    end = _whole_pieces(end)
            self._positions.append(placed[storage._cdata])
            self.descriptions.append(wire.describe(tensor, placed[storage._cdata]))
        self.fd = _shared_memory(max(end, mmap.PAGESIZE))
        for position, data in self._pristine.items():
            written = 0
            while written < len(data):
                written += os.pwrite(self.fd, data[written : written + (1 << 26)], position + written)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc) -> None:
        os.close(self.fd)

    def changed(self) -> list[int]:
        """Indices of the tensors whose storage no longer holds what was sent."""
        different = {
            position
            for position, data in self._pristine.items()
            if any(
                os.pread(self.fd, len(part), position + start) != part
                for start in range(0, len(data), 1 << 26)
                if (part := data[start : start + (1 << 26)])
            )
        }
        return [index for index, position in enumerate(self._positions) if position in different]

    def spoil(self) -> None:
        """Write NaN over the arguments: they are the caller's, and an object that holds on to them is seen to."""
        for position, data in self._pristine.items():
            os.pwrite(self.fd, b"\xff" * len(data), position)


def _whole_pieces(size: int) -> int:
    return -(-size // PIECE) * PIECE


def _shared_memory(size: int) -> int:
    """A file descriptor of anonymous shared memory. Sealed where it can be, so that nobody changes its size."""
    if hasattr(os, "memfd_create"):
        import fcntl

        fd = os.memfd_create("flashlib-arguments", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())
