"""Hand a call's tensors out piece by piece, so that the grader sees what is read, whatever the student's process says of it.

The memory that a guarded tensor lies in is empty when the call begins. A thread that touches a piece of it is stopped by the
kernel until the grader has put that piece there. Only so many pieces of a tensor lie there at a time: before another comes, the
oldest is taken away again. So what is read, how often and in which order is the grader's own record: that of a slow memory which
a fast one of a given size reads from. A private copy is no way around it: it takes memory, which is seen from outside too.

Linux only, by userfaultfd: https://docs.kernel.org/admin-guide/mm/userfaultfd.html. Where a system has none, or forbids it (a
container may), nothing is handed out in pieces, and what a check counts stays the process's own word.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import struct
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

PIECE = 1 << 16  # bytes at most, and what guarded memory is aligned to
_SYSTEM_CALL = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1  # faults of the kernel's own reads are errors there, and no privilege is needed
_API, _SHARED_MEMORY, _MISSING, _PAGEFAULT = 0xAA, 1 << 5, 1, 0x12
_DO_API, _DO_REGISTER, _DO_UNREGISTER, _DO_WAKE, _DO_COPY = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0x8010AA02, 0xC028AA03
_MESSAGE = struct.Struct("=B7xQQ8x")  # event, flags, address
_PUNCH_HOLE, _KEEP_SIZE = 2, 1


def open_faults() -> int | None:
    """In the child, before it is fenced in: a descriptor for this process's page faults, or None where there is no such thing."""
    number = _SYSTEM_CALL.get(platform.machine())
    if sys.platform != "linux" or number is None or mmap.PAGESIZE > PIECE:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
    if fd < 0:
        return None
    try:
        fcntl.ioctl(fd, _DO_API, bytearray(struct.pack("=QQQ", _API, _SHARED_MEMORY, 0)))
    except OSError:
        os.close(fd)
        return None
    return fd


@dataclass(frozen=True)
class Guarded:
    """One tensor that is handed out in pieces.

    Attributes:
        name: in the record.
        offset: of its memory in that of the call, in bytes; a multiple of `PIECE`.
        data: its bytes.
        room: how many bytes of it may lie in the child's memory at a time, and a piece more, since a tile may begin within one.
    """

    name: str
    offset: int
    data: bytes
    room: int

    @property
    def piece(self) -> int:
        """Bytes: a fraction of the room, so that it can be cut as tiles are, in whole pages."""
        return min(PIECE, max(mmap.PAGESIZE, 1 << (self.room // 16).bit_length() - 1))

    @property
    def size(self) -> int:
        """Bytes of memory, in whole pieces."""
        return -(-len(self.data) // self.piece) * self.piece


@dataclass(frozen=True)
class Seen:
    """What was handed out during a call.

    Attributes:
        order: each piece, as it was asked for: the tensor's name, and the piece's number in it.
        counts: how many pieces each tensor has.
        piece: how many bytes a piece of each has.
        changed: the tensors that were written to.
    """

    order: tuple[tuple[str, int], ...]
    counts: dict[str, int]
    piece: dict[str, int]
    changed: tuple[str, ...] = ()

    def times(self, name: str) -> float:
        """How often all of a tensor was handed out."""
        return sum(each == name for each, _ in self.order) / self.counts[name]

    def pieces(self, name: str) -> set[int]:
        """Which pieces of it were handed out at all."""
        return {number for each, number in self.order if each == name}

    def runs(self, name: str) -> list[int]:
        """Between pieces of other tensors, how many of this one were handed out, run by run."""
        found, last = [], None
        for each, _ in self.order:
            if each == name:
                if last == name:
                    found[-1] += 1
                else:
                    found.append(1)
            last = each
        return found


@dataclass
class Handout:
    """The grader's side of one call.

    Attributes:
        faults: the descriptor of the child's page faults.
        memory: that of the memory that both share.
        guarded: what is handed out.
        together: whether all of it shares one room, the largest, so that one tensor drives another out.
    """

    faults: int
    memory: int
    guarded: Sequence[Guarded]
    together: bool = False
    _base: int = 0
    _order: list[tuple[str, int]] = field(default_factory=list)
    _changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._buffers = [ctypes.create_string_buffer(each.data, each.size) for each in self.guarded]
        own = [deque() for _ in self.guarded]
        self._present: list[deque[tuple[int, int]]] = [own[0]] * len(own) if self.together else own  # which, number
        self._room = [max(each.room for each in self.guarded) if self.together else each.room for each in self.guarded]
        self._libc = ctypes.CDLL(None, use_errno=True)

    def begin(self, base: int) -> None:
        """The child has the memory at this address, it says.

        Raises:
            OSError: it has not.
        """
        self._base = base
        for start, size in self._ranges():
            fcntl.ioctl(self.faults, _DO_REGISTER, bytearray(struct.pack("=QQQQ", start, size, _MISSING, 0)))

    def serve(self) -> None:
        """Hand out what is waited for.

        Raises:
            OSError: the child is gone, or its memory is no longer what it was.
        """
        while True:
            try:
                message = os.read(self.faults, 32)
            except BlockingIOError:
                return
            event, _, address = _MESSAGE.unpack(message)
            if event == _PAGEFAULT:
                self._hand_out(address - self._base)

    def _hand_out(self, place: int) -> None:
        at = next((i for i, each in enumerate(self.guarded) if 0 <= place - each.offset < each.size), None)
        if at is None:
            raise OSError(f"a page fault at byte {place}, where nothing is guarded")
        guarded, present = self.guarded[at], self._present[at]
        piece = guarded.piece
        number = (place - guarded.offset) // piece
        if (at, number) not in present:  # two threads may wait for the same
            while sum(self.guarded[which].piece for which, _ in present) >= self._room[at] + piece:
                self._take_away(*present.popleft())
            present.append((at, number))
            self._order.append((guarded.name, number))
        offset = guarded.offset + number * piece
        source, target = ctypes.addressof(self._buffers[at]) + number * piece, self._base + offset
        try:
            fcntl.ioctl(self.faults, _DO_COPY, bytearray(struct.pack("=QQQQq", target, source, piece, 0, 0)))
        except FileExistsError:  # by now it is there
            fcntl.ioctl(self.faults, _DO_WAKE, bytearray(struct.pack("=QQ", target, piece)))

    def _take_away(self, which: int, number: int) -> None:
        piece = self.guarded[which].piece
        offset = self.guarded[which].offset + number * piece
        self._look_for_changes(which, number)
        if self._libc.fallocate(self.memory, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(piece)):
            raise OSError(ctypes.get_errno(), "fallocate failed")

    def _look_for_changes(self, which: int, number: int) -> None:
        guarded, piece = self.guarded[which], self.guarded[which].piece
        held = memoryview(self._buffers[which]).cast("B")[number * piece : (number + 1) * piece]
        if os.pread(self.memory, piece, guarded.offset + number * piece) != held:
            self._changed.add(guarded.name)

    def end(self) -> Seen:
        """Hand nothing out any more; answers what was."""
        for present in self._present[:1] if self.together else self._present:
            for which, number in present:
                self._look_for_changes(which, number)
        for start, size in self._ranges():
            with contextlib.suppress(OSError):  # the child may have given the memory back
                fcntl.ioctl(self.faults, _DO_UNREGISTER, bytearray(struct.pack("=QQ", start, size)))
        counts = {each.name: each.size // each.piece for each in self.guarded}
        pieces = {each.name: each.piece for each in self.guarded}
        return Seen(tuple(self._order), counts, pieces, tuple(sorted(self._changed)))

    def _ranges(self) -> list[tuple[int, int]]:
        return [(self._base + each.offset, each.size) for each in self.guarded]
