"""What ranks say to each other: data from rank to rank, a word on what they are about to do, and what has gone wrong.

All of it goes through process groups of ``torch.distributed`` that are our own, made at the first use of a mesh: a group of gloo for words and for
tensors on a CPU, one of NCCL for tensors on GPUs. NCCL works on a stream of its own, so that what is sent overlaps what is computed.

**No call hangs.** Before anything is sent, all ranks say what they were given (:meth:`Link.agree`); whoever refuses says so, and all end with an
error that names who and what. A rank on which something is raised later leaves word in the store and closes its connections: the others notice
at once, look the word up, and end with it. A rank that dies leaves no word, and is named for that.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh

__all__ = ["Link", "ParallelError", "Pending", "link_of", "pack", "unpack"]

FIELDS = 40  # int64 numbers of what a rank says before a call
GRACE = 6.0  # seconds that ranks which have noticed a failure have to leave word of it
POLL = 0.05

Shape = tuple[tuple[int, ...], torch.dtype]


class ParallelError(RuntimeError):
    """A call on several ranks cannot go on. The message says which ranks it is about, and what they did.

    Attributes:
        ranks: those ranks, by their global number.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)

    def __reduce__(self):
        return type(self), (self.args[0], self.ranks)


class _Lost(Exception):
    """Another rank was not reached."""


class Link:
    """The ranks of a mesh, in its order.

    Attributes:
        ranks: their global numbers. rank: this one's place among them. size: how many there are.
        timeout: how long a rank waits for another one: that of the mesh's process group.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        self.rank = self.ranks.index(dist.get_rank())
        self.timeout = _timeout_of(mesh.get_group(0))
        self.closed = False
        self._calls = 0
        self._device_groups: dict[str, Any] = {}
        self._control: Any = None
        self._depth = 0
        self._agreed = False
        if self.size > 1:
            self._store = dist.PrefixStore(f"flashlib/{'_'.join(map(str, self.ranks))}", _default_store())
            self._meet()
            self._control = dist.new_group(
                self.ranks, timeout=self.timeout, backend="gloo", use_local_synchronization=True
            )

    @property
    def size(self) -> int:
        return len(self.ranks)

    def _meet(self) -> None:
        """Wait until all ranks are here."""
        here = [f"here/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + self.timeout.total_seconds()
        try:
            self._store.set(here[self.rank], "")
            missing = list(here)
            while missing and time.monotonic() < deadline:
                missing = [key for key in missing if not self._store.check([key])]
                time.sleep(POLL if missing else 0)
        except RuntimeError as error:
            raise ParallelError(
                f"the first use of a mesh: rank 0 is gone, and with it the store ({_first_line(error)})", [0]
            ) from error
        if missing:
            absent = [self.ranks[here.index(key)] for key in missing]
            raise ParallelError(
                f"the first use of a mesh of ranks {self.ranks}: {_ranks(absent)} died, hang, or never used it: waited "
                f"{self.timeout.total_seconds():.0f} s for them",
                absent,
            )

    # Words

    def agree(self, describe: Callable[[], Mapping[str, int]], own: Sequence[str] = ()) -> list[dict[str, int]]:
        """What every rank says of a call, after it was seen that all say the same but for what is each rank's ``own``.

        Args:
            describe: what this rank says, whole numbers by name, in the same order on every rank; at most :data:`FIELDS` - 3. What it raises is
                raised here, and told to the others.

        Raises:
            ParallelError: another rank refused, or they disagree; says about what.
        """
        refusal: BaseException | None = None
        said: dict[str, int] = {}
        try:
            said = {name: int(value) for name, value in describe().items()}
        except Exception as error:
            refusal = error
        if self.size == 1:
            if refusal:
                raise refusal
            return [said]
        names = list(said)
        head = [0 if refusal else 1, self._calls, len(names)]
        numbers = torch.zeros(FIELDS, dtype=torch.int64, device="cpu")
        numbers[: 3 + len(names)] = torch.tensor(head + [_signed(value) for value in said.values()], device="cpu")
        every = [torch.empty_like(numbers) for _ in self.ranks]
        self._collective(lambda: dist.all_gather(every, numbers, group=self._control))
        rows = torch.stack(every).tolist()
        if any(row[0] == 0 for row in rows):
            words: list[Any] = [None] * self.size
            told = None if refusal is None else f"{type(refusal).__name__}: {refusal}"
            self._collective(lambda: dist.all_gather_object(words, told, group=self._control))
            if refusal:
                raise refusal
            refused = [(rank, word) for rank, word in zip(self.ranks, words, strict=True) if word]
            raise ParallelError(
                "; ".join(f"rank {rank} refused the call: {word}" for rank, word in refused), [r for r, _ in refused]
            )
        for at, name in enumerate(["call number", "arguments", *names], start=1):
            column = [row[at] for row in rows]
            if name not in own and len(set(column)) > 1:
                raise _disagreement(name, column, self.ranks)
        return [dict(zip(names, row[3:], strict=False)) for row in rows]

    def _collective(self, run: Callable[[], Any]) -> None:
        try:
            run()
        except RuntimeError as error:
            raise _Lost(_first_line(error)) from error

    # Data

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, int], device: torch.device) -> Pending:
        """Begin to send bytes to some ranks and to receive from some.

        Args:
            sends: uint8 tensors by the place of the receiver. receives: bytes to come, by the place of the sender. Nothing is sent where there are none.
        """
        group = self._group(device)
        buffers = {rank: torch.empty(size, dtype=torch.uint8, device=device) for rank, size in receives.items()}
        operations = []
        for rank, buffer in buffers.items():
            if buffer.numel():
                operations.append(dist.P2POp(dist.irecv, buffer, group=group, group_peer=rank))
        kept = []
        for rank, message in sends.items():
            if message.numel():
                kept.append(message)
                operations.append(dist.P2POp(dist.isend, message, group=group, group_peer=rank))
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise _Lost(_first_line(error)) from error
        return Pending(works, buffers, kept, self.timeout)

    def _group(self, device: torch.device) -> Any:
        if device.type == "cpu":
            return self._control
        if device.type not in self._device_groups:
            backend = dist.Backend.default_device_backend_map.get(device.type, "nccl")
            self._device_groups[device.type] = dist.new_group(
                self.ranks, timeout=self.timeout, backend=backend, use_local_synchronization=True
            )
        return self._device_groups[device.type]

    # What goes wrong

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """The block of one call: whatever ends it early ends it on all ranks.

        Raises:
            ParallelError: another rank is the reason; names it.
        """
        if self._depth or self.size == 1:  # the call has begun, or there is nobody to tell
            yield
            return
        if self.closed:
            raise ParallelError(
                f"{what}: ranks {self.ranks} lost each other in an earlier call; end the process groups (destroy_process_group) and begin anew"
            )
        self._calls += 1
        self._depth += 1
        self._agreed = False
        try:
            yield
        except _Lost as lost:
            raise self._diagnosed(what, str(lost)) from lost
        except ParallelError:
            raise  # all ranks have heard the same
        except BaseException as error:
            if self._agreed or not isinstance(error, Exception):
                self._leave_word(f"{type(error).__name__}: {_first_line(error)}")
                self.close()
            raise
        finally:
            self._depth -= 1

    def begun(self) -> None:
        """From here on, what is raised in the block of a call is raised on this rank alone."""
        self._agreed = True

    def close(self) -> None:
        """End the connections: whoever waits for this rank notices."""
        if self.closed:
            return
        self.closed = True
        for group in (self._control, *self._device_groups.values()):
            if group is not None:
                try:
                    dist.destroy_process_group(group)
                except Exception:  # what is broken already need not be closed in order
                    continue
        self._control = None
        self._device_groups = {}

    def _leave_word(self, word: str) -> None:
        try:
            self._store.set(f"{self._calls}/{self.rank}", word)
        except Exception:  # the store is gone with whoever kept it, and the others will notice that
            return

    def _diagnosed(self, what: str, noticed: str) -> ParallelError:
        """Who ended the call: whoever left word of an error of its own, or else whoever left no word at all."""
        me = self.ranks[self.rank]
        self._leave_word("lost")
        self.close()
        waiting = {rank for rank in range(self.size) if rank != self.rank}
        guilty: dict[int, str] = {}
        deadline = time.monotonic() + GRACE
        while waiting and time.monotonic() < deadline:
            try:
                for rank in sorted(waiting):
                    key = f"{self._calls}/{rank}"
                    if self._store.check([key]):
                        waiting.discard(rank)
                        word = self._store.get(key).decode()
                        if word != "lost":
                            guilty[self.ranks[rank]] = word
            except RuntimeError as error:
                return ParallelError(
                    f"{what}: rank 0 is gone, and with it the store that it kept (on rank {me}: {noticed}; {_first_line(error)})",
                    [0],
                )
            if guilty:
                break
            time.sleep(POLL)
        if guilty:
            told = "; ".join(f"rank {rank} raised {word}" for rank, word in guilty.items())
            return ParallelError(f"{what}: {told}", sorted(guilty))
        silent = [self.ranks[rank] for rank in sorted(waiting)]
        if silent:
            return ParallelError(
                f"{what}: {_ranks(silent)} died, hang, or never made this call: nothing was heard for {GRACE:.0f} s (on rank {me}: {noticed})",
                silent,
            )
        return ParallelError(f"{what}: a connection was lost, though all ranks live (on rank {me}: {noticed})")


class Pending:
    """An exchange that has begun."""

    def __init__(
        self, works: list, buffers: dict[int, Tensor], kept: list[Tensor], timeout: datetime.timedelta
    ) -> None:
        self._works, self._buffers, self._kept, self._timeout = works, buffers, kept, timeout

    def wait(self) -> dict[int, Tensor]:
        """What was received, uint8 by the sender's place, once all is sent and received. On a GPU its stream waits, the host does not."""
        try:
            for work in self._works:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise _Lost(_first_line(error)) from error
        self._works, self._kept = [], []
        return self._buffers


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of some tensors one after another, uint8; those with the widest numbers first, so that they can be read where they lie."""
    flat = [x.detach().contiguous().view(-1) for x in tensors]
    flat = [x.view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8) for x in flat]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpack(message: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The inverse of :func:`pack`: views of the message."""
    found, at = [], 0
    for shape, dtype in shapes:
        size = nbytes([(shape, dtype)])
        found.append(message[at : at + size].view(dtype).view(shape))
        at += size
    return found


def nbytes(shapes: Sequence[Shape]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


# By the default process group, with which they end, and by ranks.
_links: WeakKeyDictionary[Any, dict[tuple[int, ...], Link]] = WeakKeyDictionary()


def link_of(mesh: DeviceMesh) -> Link:
    """The link between the ranks of a mesh, made at its first use, on all of them together.

    Raises:
        TypeError: ``mesh`` is not a DeviceMesh.
        ValueError: this rank is not part of it.
        ParallelError: some rank cannot be reached.
    """
    if not isinstance(mesh, DeviceMesh):
        hint = " (torch.distributed.device_mesh.init_device_mesh makes one)"
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh; got {type(mesh).__name__}{hint}")
    ranks = tuple(mesh.mesh.flatten().tolist())
    if not dist.is_initialized() or dist.get_rank() not in ranks:
        raise ValueError(f"mesh must have this rank in it; got ranks {list(ranks)}")
    links = _links.setdefault(dist.group.WORLD, {})
    if ranks not in links:
        links[ranks] = Link(mesh)
    return links[ranks]


def _timeout_of(group: Any) -> datetime.timedelta:
    for kind in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(kind)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return dist.default_pg_timeout


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _disagreement(name: str, column: Sequence[int], ranks: Sequence[int]) -> ParallelError:
    by_value: dict[int, list[int]] = {}
    for rank, value in zip(ranks, column, strict=True):
        by_value.setdefault(value, []).append(rank)
    groups = sorted(by_value.values(), key=len)
    named = NAMED.get(name)

    def shown(value: int) -> str:
        if named is not None:
            return named(value)
        return f"#{value & 0xFFFF:04x}" if name in DIGESTS else str(value)

    told = "; ".join(
        f"{shown(value)} on {_ranks(held)}" for value, held in sorted(by_value.items(), key=lambda item: -len(item[1]))
    )
    odd = (
        groups[0]
        if len(groups) > 1 and len(groups[0]) < len(groups[-1])
        else [rank for held in groups for rank in held]
    )
    return ParallelError(f"the ranks disagree about {name}: {told}", odd)


NAMED: dict[str, Callable[[int], str]] = {}
DIGESTS = ("mask", "alibi_slopes", "shape", "scale", "softcap")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _signed(value: int) -> int:
    """``value`` as an int64, whatever its size: only its equality matters where it is a digest."""
    return (value + 2**63) % 2**64 - 2**63


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
