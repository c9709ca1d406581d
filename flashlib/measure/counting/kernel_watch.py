"""Watch Triton kernels in the interpreter: what they load and store, and the faults that only a GPU would punish.

Triton's interpreter (``TRITON_INTERPRET=1``) runs the programs of a launch one after the other, with bare pointers into the
tensors' memory. That hides three things which decide whether a kernel works on a GPU, and how fast:

- **Out of bounds.** A load past the end of a tensor gives whatever lies there, a store overwrites it. Mostly nothing is seen.
- **Races.** Programs of a launch run at the same time on a GPU, in no order. Where one writes what another reads or writes,
  the result depends on which is first. In the interpreter it is always the same one.
- **Traffic.** How many bytes cross between memory and the programs, and in how many sectors: a GPU fetches 32 bytes at a time.

`KernelWatch` sees every address that a kernel loads from or stores to. The first two it raises, at the line of the kernel where
they happen; the third it counts.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from flashlib.measure.counting.meter import ELSEWHERE
from flashlib.measure.records.tables import Table, table

SECTOR_BYTES = 32  # what a GPU's memory moves at least: a quarter of a cache line. CUDA C++ Best Practices Guide, "Coalesced access"
_SEVERAL = -1  # stands for more than one program in a record of readers


class KernelFault(RuntimeError):
    """A kernel did what has no defined outcome on a GPU.

    Attributes:
        kind: `"out-of-bounds-load"`, `"out-of-bounds-store"` or `"race"`.
    """

    kind = ""


class OutOfBoundsLoad(KernelFault):
    """A load reached memory that belongs to none of the tensors passed to the kernel."""

    kind = "out-of-bounds-load"


class OutOfBoundsStore(KernelFault):
    """A store, or an atomic, reached memory that belongs to none of the tensors passed to the kernel."""

    kind = "out-of-bounds-store"


class Race(KernelFault):
    """Two programs of one launch met at an address, and at least one of them changed what is there."""

    kind = "race"


def interpreting() -> bool:
    """Whether triton has been imported and runs its kernels in the interpreter."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)


class KernelWatch:
    """Watch the Triton kernels launched in a `with` block, in the interpreter. Watches may be nested.

    A load counts the bytes of its lanes that are not masked out, each time it is executed: caches are not modelled. A store
    counts likewise, and an atomic counts as both.

    Two programs race where one loads or stores at an address at which the other has stored, or stores where the other has loaded.
    The addresses decide, never the values: two programs that compute the same number may differ in its last bit on another
    processor, and then it matters who is last. No store is benign because it repeats what is there. A kernel says that two
    programs may meet by an atomic operation (`tl.atomic_max` of equal values, say). A program that has executed one may also
    load what others stored: the atomic may have put them in order (it is not checked that it did).

    Args:
        **operands: tensors to follow by name; each with memory of its own.

    Attributes:
        bytes_read, bytes_written: `Counter` by operand name, and `"elsewhere"` for tensors that were not named.
        sectors_read, sectors_written: likewise, sectors of 32 bytes: for each load and store of a program, those in which its lanes
            have an address. Their bytes are what memory really moves; neighbors that share a sector move it once.
        launches: `Counter` of kernels by name.
        programs: how many programs ran.
        largest_block: elements of the largest block of pointers that was loaded or stored at once, masked lanes included.

    Raises:
        TypeError: an operand is not a tensor.
        ValueError: an operand is named "elsewhere".
        RuntimeError: on entry, if triton's interpreter is not on.
        OutOfBoundsLoad, OutOfBoundsStore, Race: inside a kernel. Triton wraps them: they are the `__cause__` of its
            `InterpreterError`, which `faults_raised` takes off.

    Example:
        >>> with KernelWatch(x=x) as watch:
        ...     kernel[(4,)](x, out, BLOCK=64)
        >>> watch.bytes_read["x"]
    """

    def __init__(self, **operands: torch.Tensor) -> None:
        for name, operand in operands.items():
            if not isinstance(operand, torch.Tensor):
                raise TypeError(f"operand {name!r} must be a torch.Tensor, got {type(operand).__name__}")
            if name == ELSEWHERE:
                raise ValueError(f"operand name {name!r} is the watch's own heading; choose another")
        self._operands = operands
        self.bytes_read: Counter[str] = Counter()
        self.bytes_written: Counter[str] = Counter()
        self.sectors_read: Counter[str] = Counter()
        self.sectors_written: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.programs = 0
        self.largest_block = 0

    @property
    def times_read(self) -> dict[str, float]:
        """How often each named operand was loaded, in multiples of its own size. An empty operand: 0."""
        return {name: self.bytes_read[name] / max(1, t.nbytes) for name, t in self._operands.items()}

    def report(self) -> Table:
        """Everything counted so far, as a table that prints as text and shows as HTML in a notebook."""
        rows: list[tuple] = []
        for name in [*self._operands, ELSEWHERE]:
            read, written = self.bytes_read[name], self.bytes_written[name]
            if name in self._operands:
                rows.append((name, self._operands[name].nbytes, read, written, self.times_read[name]))
            elif read or written:
                rows.append((name, None, read, written, None))
        rows.append(("total", None, self.bytes_read.total(), self.bytes_written.total(), None))
        launched = ", ".join(f"{name} x {count}" for name, count in self.launches.items()) or "none"
        notes = [f"kernels: {launched}; programs: {self.programs:,}; largest block: {self.largest_block:,} elements"]
        return table(rows, ["operand", "size (B)", "loaded (B)", "stored (B)", "times loaded"], notes=notes)

    def __enter__(self) -> KernelWatch:
        if not interpreting():
            raise RuntimeError(
                "KernelWatch sees kernels only in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
            )
        if not _watches:
            _install()
        _watches.append(self)
        return self

    def __exit__(self, *exception) -> None:
        _watches.remove(self)
        if not _watches:
            _uninstall()

    def _owner_of(self, address: int) -> str:
        for name, operand in self._operands.items():
            storage = operand.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                return name
        return ELSEWHERE


@contextlib.contextmanager
def faults_raised() -> Iterator[None]:
    """Raise a `KernelFault` as itself, out of the errors that Triton's interpreter wraps it in."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KernelFault):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


# ----------------------------------------------------------------------------------------------------------- one launch


@dataclass
class _Memory:
    """Memory that a kernel may touch: that of one tensor it was given, or of several that overlap.

    `writers` and `readers` hold for each element the last program that stored there and the one that loaded it; 0 for none.
    """

    name: str
    start: int
    stop: int
    itemsize: int
    writers: np.ndarray
    readers: np.ndarray


class _Launch:
    """What one launch has touched so far."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor], builder: Any) -> None:
        self.kernel, self.builder = kernel, builder
        self.memories = _memories(tensors)
        self.starts = np.array([memory.start for memory in self.memories], dtype=np.uint64)
        self.stops = np.array([memory.stop for memory in self.memories], dtype=np.uint64)
        self.owners = [[watch._owner_of(memory.start) for memory in self.memories] for watch in _watches]
        self.after_an_atomic = 0  # the last program that executed one
        self.prepared: set[Any] = set()  # functions for which Triton has replaced the language by what computes

    @property
    def program(self) -> int:
        (x, y, z), (nx, ny, _) = self.builder.grid_idx, self.builder.grid_dim
        return 1 + x + nx * (y + ny * z)

    def load(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        for memory, elements in self._touched("load", pointers, mask, itemsize):
            writers, readers = memory.writers[elements], memory.readers[elements]
            others = (writers != 0) & (writers != self.program)
            if others.any() and self.after_an_atomic != self.program:
                self._race(memory, "loads what", int(writers[others][0]), "has stored")
            memory.readers[elements] = np.where((readers == 0) | (readers == self.program), self.program, _SEVERAL)

    def store(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        for memory, elements in self._touched("store", pointers, mask, itemsize):
            for record, done in ((memory.writers, "has stored"), (memory.readers, "has loaded")):
                before = record[elements]
                others = (before != 0) & (before != self.program)
                if others.any():
                    self._race(memory, "stores where", int(before[others][0]), done)
            memory.writers[elements] = self.program

    def atomic(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        for _ in self._touched("load", pointers, mask, itemsize):
            pass
        for _ in self._touched("store", pointers, mask, itemsize):
            pass
        self.after_an_atomic = self.program

    def _touched(
        self, access: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> Iterator[tuple[_Memory, np.ndarray]]:
        """For each memory: the indices of its elements that are touched. Counts them, too."""
        lanes = np.broadcast_to(mask, pointers.shape).astype(bool)
        addresses = pointers[lanes]
        which = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = which >= 0
        if self.memories:
            inside &= addresses + np.uint64(itemsize) <= self.stops[which]
        if not inside.all():
            self._out_of_bounds(access, addresses, inside, which, itemsize)
        for index in np.unique(which):
            memory, here = self.memories[index], addresses[which == index]
            sectors = len(np.unique(here // SECTOR_BYTES))
            for watch, owners in zip(_watches, self.owners, strict=True):
                loads = access == "load"
                (watch.bytes_read if loads else watch.bytes_written)[owners[index]] += len(here) * itemsize
                (watch.sectors_read if loads else watch.sectors_written)[owners[index]] += sectors
            yield memory, ((here - np.uint64(memory.start)) // np.uint64(memory.itemsize)).astype(int)
        for watch in _watches:
            watch.largest_block = max(watch.largest_block, pointers.size)

    def _out_of_bounds(
        self, access: str, addresses: np.ndarray, inside: np.ndarray, which: np.ndarray, itemsize: int
    ) -> None:
        outside, first = int((~inside).sum()), int(addresses[~inside][0])
        fault = OutOfBoundsLoad if access == "load" else OutOfBoundsStore
        raise fault(
            f"{self.kernel}, program {self.builder.grid_idx}: {outside} of {len(addresses)} addresses to {access} are outside "
            f"of every tensor it was given; {self._place_of(first, which[inside], itemsize)}"
        )

    def _place_of(self, address: int, others: np.ndarray, itemsize: int) -> str:
        """Where an address lies, seen from the tensor that the other lanes are in, or else from the nearest one."""
        if not self.memories:
            return "it was given no memory at all"
        if len(others):
            memory = self.memories[np.bincount(others).argmax()]
        else:
            memory = min(self.memories, key=lambda memory: max(memory.start - address, address - memory.stop))
        if address < memory.start:
            return f"the first lies {_elements(-(-(memory.start - address) // itemsize))} before the start of {memory.name}"
        return f"the first lies {_elements((address - memory.stop) // itemsize + 1)} past the end of {memory.name}"

    def _race(self, memory: _Memory, does: str, other: int, did: str) -> None:
        earlier = "several others" if other == _SEVERAL else f"program {self._place(other)}"
        raise Race(
            f"{self.kernel}, program {self.builder.grid_idx} {does} {earlier} {did}, in {memory.name}: "
            "on a GPU nobody knows which comes first"
        )

    def _place(self, program: int) -> tuple[int, int, int]:
        nx, ny, _ = self.builder.grid_dim
        return (program - 1) % nx, (program - 1) // nx % ny, (program - 1) // (nx * ny)


def _elements(count: int) -> str:
    return "1 element" if count == 1 else f"{count} elements"


def _memories(tensors: dict[str, torch.Tensor]) -> list[_Memory]:
    """Their memories in the order of addresses; those that overlap as one."""
    spans = []
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes():
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), tensor.element_size(), name))
    merged: list[tuple[int, int, int, str]] = []
    for start, stop, itemsize, name in sorted(spans):
        if merged and start < merged[-1][1]:
            first, last, smaller, names = merged[-1]
            names = names if (first, last) == (start, stop) and names == name else f"{names}/{name}"
            merged[-1] = (first, max(last, stop), math.gcd(smaller, itemsize), names)
        else:
            merged.append((start, stop, itemsize, name))
    return [
        _Memory(name, start, stop, itemsize, *(np.zeros((stop - start) // itemsize, np.int32) for _ in range(2)))
        for start, stop, itemsize, name in merged
    ]


# -------------------------------------------------------------------------------------------- the hooks in the interpreter

_watches: list[KernelWatch] = []
_originals: dict[str, Any] = {}
_launch: list[_Launch] = []  # the one that runs, if any


def _install() -> None:
    """Let the interpreter's launches, loads, stores and atomics pass by here."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
        _originals[name] = getattr(builder, name)
    _originals["launch"] = interpreter.GridExecutor.__call__
    _originals["prepare"] = interpreter._patch_lang

    def launch(executor, *args, **kwargs):
        return _watched_launch(builder, executor, args, kwargs)

    def prepare(function):
        # Triton lets the language's functions compute anew at every call of a device function. Once a launch is enough.
        prepared = _launch[-1].prepared if _launch else set()
        if function in prepared:
            return None
        prepared.add(function)
        return _originals["prepare"](function)

    def masked_load(pointers, mask, *rest, **options):
        _launch[-1].load(pointers.data, mask.data, _itemsize(pointers))
        return _originals["create_masked_load"](pointers, mask, *rest, **options)

    def masked_store(pointers, value, mask, *rest, **options):
        _launch[-1].store(pointers.data, mask.data, _itemsize(pointers))
        return _originals["create_masked_store"](pointers, value, mask, *rest, **options)

    def atomic_rmw(operation, pointers, value, mask, *rest, **options):
        _launch[-1].atomic(pointers.data, mask.data, _itemsize(pointers))
        return _originals["create_atomic_rmw"](operation, pointers, value, mask, *rest, **options)

    def atomic_cas(pointers, *rest, **options):
        _launch[-1].atomic(pointers.data, np.ones_like(pointers.data, dtype=bool), _itemsize(pointers))
        return _originals["create_atomic_cas"](pointers, *rest, **options)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, prepare
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas


def _uninstall() -> None:
    from triton.runtime import interpreter

    interpreter.GridExecutor.__call__ = _originals.pop("launch")
    interpreter._patch_lang = _originals.pop("prepare")
    while _originals:
        delattr(interpreter.interpreter_builder, _originals.popitem()[0])  # the class's own method shows again


def _itemsize(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _watched_launch(builder: Any, executor: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    run = _originals["launch"]
    known = inspect.signature(executor.fn).parameters
    try:
        given = inspect.getcallargs(executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known})
    except TypeError:
        return run(executor, *args, **kwargs)  # wrong arguments: let the interpreter say so
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    _launch.append(_Launch(executor.fn.__name__, tensors, builder))
    for watch in _watches:
        watch.launches[executor.fn.__name__] += 1
    try:
        # The interpreter handles the tensors as it likes; no meter should count that. NumPy's warnings are not the reader's.
        with _disable_current_modes(), np.errstate(all="ignore"):
            result = run(executor, *args, **kwargs)
        for watch in _watches:
            watch.programs += math.prod(builder.grid_dim)
        return result
    finally:
        _launch.pop()
