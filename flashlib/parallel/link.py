"""What ranks say to each other: data from rank to rank, a word on what they are about to do, and what has gone wrong.

All of it goes through process groups of ``torch.distributed`` that are our own, made at the first use of a mesh: a group of gloo for words and for
tensors on a CPU, one of NCCL for tensors on GPUs. NCCL works on a stream of its own, so that what is sent overlaps what is computed.

**No call hangs.** Before anything is sent, all ranks say what they were given (:meth:`Link.agree`); whoever refuses says so, and all end with an
error that names who and what. A rank on which something is raised later leaves word in the store and closes its connections: the others notice
at once, look the word up, and end with it. A rank that dies leaves no word, and is named for that.
"""

from __future__ import annotations

import datetime
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh

__all__ = ["Link", "ParallelError", "Pending", "eager", "link_of", "pack", "place_of", "unpack"]

CALLS = (
    "parallel_attention",
    "the backward pass of parallel_attention",
    "parallel_decode_attention",
    "merge_over_ranks",
    "unshard",
)
FIELDS = 40  # int64 numbers of what a rank says before a call
GRACE = 6.0  # seconds that ranks which have noticed a failure have to leave word of it
POLL = 0.05
LOST = "lost another rank"

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

    def __init__(self, mesh: DeviceMesh, generation: int) -> None:
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        self.rank = self.ranks.index(dist.get_rank())
        self.timeout = _timeout_of(mesh.get_group(0))
        self.generation = generation
        self.closed = False
        self._calls = self._depth = 0
        self._what, self._alone = CALLS[0], False
        self._groups: dict[str, Any] = {}
        self._pending: WeakSet[Pending] = WeakSet()
        if self.size > 1:
            name = f"flashlib/{generation}/{'_'.join(map(str, self.ranks))}"
            self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
            self._meet()
            self._group("cpu")

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
        if self.size == 1:
            return [dict(describe())]
        refusal: BaseException | None = None
        said: dict[str, int] = {}
        try:
            said = {name: int(value) for name, value in describe().items()}
        except Exception as error:
            refusal = error
            self._leave_word(f"{type(error).__name__}: {_first_line(error)}", "refused")
        names = list(said)
        head = [0 if refusal else 1, CALLS.index(self._what), self._calls]
        numbers = torch.zeros(FIELDS, dtype=torch.int64, device="cpu")
        numbers[: 3 + len(names)] = torch.tensor(head + [_signed(value) for value in said.values()], device="cpu")
        every = [torch.empty_like(numbers) for _ in self.ranks]
        with _noticing():
            self._group("cpu").allgather([every], [numbers]).wait(self.timeout)
        rows = torch.stack(every).tolist()
        if any(row[0] == 0 for row in rows):
            if refusal:
                raise refusal
            refused = {self.ranks[rank]: self._word(rank, "refused") for rank, row in enumerate(rows) if row[0] == 0}
            told = "; ".join(f"rank {rank} refused the call: {word}" for rank, word in refused.items())
            raise ParallelError(told, sorted(refused))
        for at, name in enumerate(["what to call", "the number of calls", *names], start=1):
            column = [row[at] for row in rows]
            if name not in own and len(set(column)) > 1:
                if at <= 2:  # they are not at the same place, and would not find together again
                    self.close()
                raise _disagreement(name, column, self.ranks)
        return [dict(zip(names, row[3:], strict=False)) for row in rows]

    # Data

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, int], device: torch.device) -> Pending:
        """Begin to send bytes to some ranks and to receive from some.

        Args:
            sends: uint8 tensors by the place of the receiver. receives: bytes to come, by the place of the sender. Nothing is sent where there are none.
        """
        buffers = {rank: torch.empty(size, dtype=torch.uint8, device=device) for rank, size in receives.items()}
        kept = [message for message in sends.values() if message.numel()]
        if not kept and not any(receives.values()):
            return Pending([], buffers, [], self.timeout)
        group = self._group(device.type)
        with _noticing(), _together(group, device) as works:
            for rank, buffer in buffers.items():
                if buffer.numel():
                    works.append(group.recv([buffer], rank, 0))
            for rank, message in sends.items():
                if message.numel():
                    works.append(group.send([message], rank, 0))
        pending = Pending(works, buffers, kept, self.timeout)
        self._pending.add(pending)
        return pending

    def _group(self, kind: str) -> Any:
        """The process group for tensors on such devices. Not by ``new_group``, whose names follow from how many groups a rank happens to have."""
        if kind not in self._groups:
            self._groups[kind] = _new_group(
                dist.PrefixStore(kind, self._store), self.rank, self.size, kind, self.timeout
            )
        return self._groups[kind]

    # What goes wrong

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """The block of one call, one of :data:`CALLS`: whatever ends it early ends it on all ranks.

        Raises:
            ParallelError: another rank is the reason; names it.
        """
        if self._depth or self.size == 1:  # the call has begun, or there is nobody to tell
            yield
            return
        if self.closed:
            raise ParallelError(f"{what}: ranks {self.ranks} lost each other after the call that this one belongs to")
        self._calls += 1
        self._depth += 1
        self._alone, self._what = False, what
        try:
            yield
        except _Lost as lost:
            raise self._diagnosed(what, str(lost)) from lost
        except ParallelError:
            raise  # all ranks have heard the same
        except BaseException as error:
            if self._alone or not isinstance(error, Exception):
                self._leave_word(f"{type(error).__name__}: {_first_line(error)}")
                self.close()
            raise
        finally:
            self._depth -= 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """The block, inside of a call, in which what is raised is raised on this rank alone: the others are told.

        Outside of it checkpoints end a call early, on all ranks alike, by an exception of their own.
        """
        self._alone = True
        yield
        self._alone = False

    def close(self) -> None:
        """End the connections: whoever waits for this rank notices. The next call makes new ones."""
        self.closed = True
        for pending in list(self._pending):
            pending.drop()  # what is under way holds on to its connection
        self._groups.clear()

    def _leave_word(self, word: str, about: str = "failed") -> None:
        try:
            self._store.set(f"{about}/{self._calls}/{self.rank}", word)
        except Exception:  # the store is gone with whoever kept it, and the others will notice that
            return

    def _word(self, rank: int, about: str = "failed") -> str | None:
        """What a rank has left word of in this call; None if it has not."""
        key = f"{about}/{self._calls}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _diagnosed(self, what: str, noticed: str) -> ParallelError:
        """Who ended the call: whoever left word of an error of its own, or else whoever left no word at all."""
        me = self.ranks[self.rank]
        self._leave_word(LOST)
        self.close()
        waiting = {rank for rank in range(self.size) if rank != self.rank}
        guilty: dict[int, str] = {}
        deadline = time.monotonic() + GRACE
        while waiting and time.monotonic() < deadline:
            try:
                for rank in sorted(waiting):
                    word = self._word(rank)
                    if word is not None:
                        waiting.discard(rank)
                        if word != LOST:
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
        with _noticing():
            for work in self._works:
                work.wait(self._timeout)
        self._works, self._kept = [], []
        return self._buffers

    def drop(self) -> None:
        self._works, self._kept, self._buffers = [], [], {}


@contextmanager
def _noticing() -> Iterator[None]:
    """The block of what fails when another rank cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise _Lost(_first_line(error)) from None  # its frames would hold on to connections


@contextmanager
def _together(group: Any, device: torch.device) -> Iterator[list[Any]]:
    """The block in which sends and receives are begun: for NCCL they are one call, or each would wait for the one before."""
    works: list[Any] = []
    if device.type == "cpu":
        yield works
        return
    group._start_coalescing(device)
    yield works
    last = group._end_coalescing(device)
    works[:] = [last] if last is not None else works


def _new_group(store: Any, rank: int, ranks: int, kind: str, timeout: datetime.timedelta) -> Any:
    """A process group of its own name, for tensors on one kind of device: gloo for CPUs, NCCL for GPUs."""
    c10d = dist.distributed_c10d
    group: Any = c10d.ProcessGroup(store, rank, ranks)
    backend: Any
    if kind == "cpu":
        backend, named = c10d.ProcessGroupGloo(store, rank, ranks, timeout), c10d.ProcessGroup.BackendType.GLOO
    elif kind == "cuda":
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        backend, named = c10d.ProcessGroupNCCL(store, rank, ranks, options), c10d.ProcessGroup.BackendType.NCCL
        backend._set_sequence_number_for_group()
    else:
        raise ValueError(f"q, k and v must be on CPUs or on GPUs of CUDA; got tensors on {kind}")
    group._set_default_backend(named)
    group._register_backend(torch.device(kind), named, backend)
    return group


Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Have torch.compile leave a call of it, and all that it calls, as it is: no graph holds what ranks say to each other.

    What torch.compiler.disable does, without importing the compiler for those who do not compile.
    """
    disabled: list[Any] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    vars(call)["_torchdynamo_disable"] = True
    return call  # type: ignore[return-value]


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


# By mesh, with the default process group of its time: to ask a mesh for its ranks takes as long as a small kernel.
_known: WeakKeyDictionary[DeviceMesh, tuple[Any, Link]] = WeakKeyDictionary()
# By the default process group, with which they end, and by ranks.
_links: WeakKeyDictionary[Any, dict[tuple[int, ...], Link]] = WeakKeyDictionary()


def place_of(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among the ranks of a mesh, and how many there are. Asks nobody.

    Raises:
        TypeError: ``mesh`` is not a DeviceMesh.
        ValueError: this rank is not part of it.
    """
    if not isinstance(mesh, DeviceMesh):
        hint = " (torch.distributed.device_mesh.init_device_mesh makes one)"
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh; got {type(mesh).__name__}{hint}")
    ranks = mesh.mesh.flatten().tolist()
    if not dist.is_initialized() or dist.get_rank() not in ranks:
        raise ValueError(f"mesh must have this rank in it; got ranks {ranks}")
    return ranks.index(dist.get_rank()), len(ranks)


def link_of(mesh: DeviceMesh) -> Link:
    """The link between the ranks of a mesh, made at its first use, on all of them together.

    Raises:
        TypeError: ``mesh`` is not a DeviceMesh.
        ValueError: this rank is not part of it.
        ParallelError: some rank cannot be reached.
    """
    known = _known.get(mesh) if isinstance(mesh, DeviceMesh) else None
    if known is not None and not known[1].closed and dist.is_initialized() and known[0]() is dist.group.WORLD:
        return known[1]
    place_of(mesh)
    ranks = tuple(mesh.mesh.flatten().tolist())
    links = _links.setdefault(dist.group.WORLD, {})
    link = links.get(ranks)
    if link is None or link.closed:
        link = links[ranks] = Link(mesh, 0 if link is None else link.generation + 1)
    _known[mesh] = (ref(dist.group.WORLD), link)
    return link


def _timeout_of(group: Any) -> datetime.timedelta:
    for kind in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(kind)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return dist.default_pg_timeout


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


NAMED: dict[str, Callable[[int], str]] = {"what to call": lambda value: CALLS[value]}
DIGESTS = ("mask", "alibi_slopes", "shape", "scale", "softcap")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _signed(value: int) -> int:
    """``value`` as an int64, whatever its size: only its equality matters where it is a digest."""
    return (value + 2**63) % 2**64 - 2**63


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
