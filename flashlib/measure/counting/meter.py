"""Count what PyTorch code moves: the largest tensor it makes, its peak memory, the bytes it reads and writes.

FlashAttention is not an argument about arithmetic. It does the same multiplications as `softmax(QK^T)V`, and a few
more; what it saves is traffic between slow and fast memory. `TrafficMeter` makes that traffic visible on any machine,
with or without a GPU, because it counts at PyTorch's dispatcher: every operation passes there with its tensors.

**What is counted.** The meter takes each operation as a machine with a slow memory, and at first nothing else, would run
it:

- An operation that moves data reads each of its tensor inputs once and writes each of its outputs once. The same memory
  passed twice (`x * x`) is read once.
- A view costs nothing: an operation that writes nothing and whose results all share memory with its inputs (`view`,
  `transpose`, slicing, `expand`, `detach`, ...). So does a question about metadata, and memory that is only allocated
  (`empty`).
- A tensor counts the bytes it *addresses*: a slice counts its own elements, an expanded tensor each element once,
  however often it is repeated.
- An in-place operation (`x += y`) reads and writes its target. One that overwrites (`copy_`, `fill_`, `zero_`, random
  fills, any `out=`) only writes it. The target of an indexed write (`x[index] = y`) is written at the addressed places
  alone, and is not read unless the write adds up.
- A gather (`x[index]`, `index_select`, `gather`, `embedding`) reads as many elements of its source as it returns, and
  its index.
- `zeros_like(x)` and its kind read nothing: they look at the shape alone.
- A composite function (`matmul`, `softmax`, `linear`, `scaled_dot_product_attention` where PyTorch runs it as plain
  math) is counted as the operations it is made of. A *fused* one, a single kernel to the dispatcher such as SDPA's
  flash kernel, counts as one operation: inputs read once, outputs written once. What it does inside is not visible;
  that is the point of fusing, and also the limit of this meter.

A copy of K is another tensor: reading the copy is not reading K.

**With a fast memory.** `TrafficMeter(fast_memory=M)` puts M bytes of fast memory in front of the slow one (see
`flashlib.measure.counting.fast_memory`): what is still there is not read again, results are written back when they have to leave
it or at the end, and a temporary that is freed before is never written. Then the counts are the slow-memory accesses of
Dao et al. 2022, "FlashAttention", section 3.2, for the code as it is: naive attention moves its N x N matrices, tiled
attention moves K and V once for each block of rows that fits. Residency is tracked by view, so it is exact for code that
always cuts its tensors into the same tiles. An operation is still taken to read each input at most once: what a
matrix product moves when its operands do not fit is not modelled, which favors naive attention.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashlib.measure.counting.fast_memory import FastMemory, Region, storage_key
from flashlib.measure.records.tables import Table, format_bytes, table

MADE_INSIDE = "made inside"
ELSEWHERE = "elsewhere"

# Questions whose answer is a Python value, but which need the data. All others (sizes, dtypes, pinned or not) do not.
_READS_TO_ANSWER = {"_local_scalar_dense", "equal"}
# They write their target without looking at what was there.
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
# They read of their source only what the index names.
_GATHERS = {"index", "_unsafe_index", "index_select", "gather", "embedding", "take"}
# They write of their target only what the index names: one element per index, or one slice along a dimension.
_ELEMENT_SCATTERS = {"scatter_", "scatter_add_", "scatter_reduce_"}
_SLICE_SCATTERS = {"index_copy_", "index_add_", "index_fill_"}
_SCATTERS = _ELEMENT_SCATTERS | _SLICE_SCATTERS | {"index_put_", "_index_put_impl_", "_unsafe_index_put_"}
_ADDING_SCATTERS = {"index_add_", "scatter_add_", "scatter_reduce_"}
# They get memory and touch no element of it.
_ALLOCATES = ("empty", "new_empty")


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that an operation allocated: its element count, shape, dtype, and the operation (`"aten.bmm"`)."""

    elements: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    op: str

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize if self.dtype else 0

    def __str__(self) -> str:
        if self.dtype is None:
            return "none"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.elements:,} elements, {list(self.shape)} {dtype}, by {self.op}"


NOTHING_MADE = MadeTensor(elements=0, shape=(), dtype=None, op="nothing")


class TrafficMeter(TorchDispatchMode):
    """Count tensors made and bytes moved by the PyTorch code in a `with` block, forward and backward.

    Args:
        fast_memory: bytes of fast memory, M. 0, the default, has none: each operation reads and writes slow memory.
        **operands: tensors to follow by name, each with memory of its own. Reads and writes of a tensor that shares
            memory with one (the tensor itself, its slices, views and expansions) are booked under its name.

    Attributes:
        largest: the `MadeTensor` with the most elements (`.elements`, `.shape`, `.dtype`, `.op`, `.bytes`), counted by
            the memory it owns. Views are not made; a tensor that enters from NumPy is.
        peak_bytes: the most bytes alive at one moment in tensors made inside; memory shared by several views once.
        live_bytes: bytes in tensors made inside that are alive now.
        bytes_read, bytes_written: `Counter` by operand name, plus `"made inside"` (intermediates and results) and
            `"elsewhere"` (tensors that existed before and were not named). `.total()` sums them.
        calls: `Counter` of the operations that moved data, as in `{"aten.bmm": 2}`; views are not in it.

    Raises:
        TypeError: an operand is not a tensor.
        ValueError: two operands share memory (then their traffic cannot be told apart), an operand takes one of the
            two names above, or `fast_memory` is negative.

    A meter may be entered again; its counts add up. The module's docstring says exactly what counts as reading and
    writing.

    Example:
        >>> q, k = torch.ones(4, 8), torch.ones(6, 8)
        >>> with TrafficMeter(q=q, k=k) as meter:
        ...     scores = q @ k.T
        >>> meter.bytes_read["q"], meter.bytes_read["k"], meter.largest.elements
        (128, 192, 24)
    """

    def __init__(self, *, fast_memory: int = 0, **operands: torch.Tensor) -> None:
        super().__init__()
        if fast_memory < 0:
            raise ValueError(f"fast_memory must be a number of bytes, at least 0; got {fast_memory}")
        self.largest = NOTHING_MADE
        self.live_bytes = 0
        self.peak_bytes = 0
        self.bytes_read: Counter[str] = Counter()
        self.bytes_written: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._operands = operands
        self._owner: dict[int, str] = {}  # storage -> name, for as long as the storage lives
        self._made: dict[int, int] = {}  # storage made inside -> its bytes
        self._fast_memory = FastMemory(fast_memory)
        self._depth = 0
        for name, operand in operands.items():
            self._adopt(name, operand)

    @property
    def times_read(self) -> dict[str, float]:
        """How often each named operand was read, in multiples of its own size. An empty operand: 0."""
        return {name: self.bytes_read[name] / max(1, Region.of(t).bytes) for name, t in self._operands.items()}

    def report(self) -> Table:
        """Everything counted so far, as a table that prints as text and shows as HTML in a notebook."""
        rows: list[tuple] = []
        for name in [*self._operands, MADE_INSIDE, ELSEWHERE]:
            read, written = self.bytes_read[name], self.bytes_written[name]
            if name in self._operands:
                rows.append((name, Region.of(self._operands[name]).bytes, read, written, self.times_read[name]))
            elif read or written:
                rows.append((name, None, read, written, None))
        rows.append(("total", None, self.bytes_read.total(), self.bytes_written.total(), None))
        notes = [
            f"largest tensor made: {self.largest}",
            f"peak memory of tensors made: {self.peak_bytes:,} B",
            f"operations that moved data: {self.calls.total():,}",
        ]
        if self._fast_memory.capacity:
            notes.append(f"traffic with slow memory, behind {format_bytes(self._fast_memory.capacity)} of fast memory")
        return table(rows, ["operand", "size (B)", "read (B)", "written (B)", "times read"], notes=notes)

    def __enter__(self):
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if self._depth == 0:
            self._book_writes(self._fast_memory.flush())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The code is not compiled: without this answer PyTorch imports its compiler, which takes seconds, to be told so."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _traits(func).composite:
            # Inference mode hands over composite functions whole; take them apart, as autograd does outside of it.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self._record(_Operation(_traits(func), args, kwargs, out))
        return out

    def _adopt(self, name: str, operand: torch.Tensor) -> None:
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"operand {name!r} must be a torch.Tensor, got {type(operand).__name__}")
        if name in (MADE_INSIDE, ELSEWHERE):
            raise ValueError(f"operand name {name!r} is one of the meter's own headings; choose another")
        storage = storage_key(operand)
        if storage in self._owner:
            raise ValueError(
                f"operands {self._owner[storage]!r} and {name!r} share memory, so their traffic cannot be told apart; "
                "pass separate tensors (for example .clone() one of them)"
            )
        self._owner[storage] = name

    def _record(self, operation: _Operation) -> None:
        for tensor in operation.fresh:
            if storage_key(tensor) not in self._owner:
                self._follow(tensor, MADE_INSIDE)
        for tensor in [*operation.fresh, *operation.written]:
            self._note_size(tensor, operation.traits.label)
        if not operation.moves_data():
            return

        self.calls[operation.traits.label] += 1
        for tensor, region, size in operation.reads():
            owner = self._owner_of(tensor)
            loaded, written_back = self._fast_memory.read(region, size, owner)
            self.bytes_read[owner] += loaded
            self._book_writes(written_back)
        for tensor, region, size in operation.writes():
            self._book_writes(self._fast_memory.write(region, size, self._owner_of(tensor)))

    def _book_writes(self, written_back: list[tuple[str, int]]) -> None:
        for name, size in written_back:
            self.bytes_written[name] += size

    def _owner_of(self, tensor: torch.Tensor) -> str:
        if storage_key(tensor) not in self._owner:
            self._follow(tensor, ELSEWHERE)
        return self._owner[storage_key(tensor)]

    def _follow(self, tensor: torch.Tensor, owner: str) -> None:
        """Book the tensor's memory under `owner` until it is freed."""
        storage = tensor.untyped_storage()
        self._owner[storage._cdata] = owner
        if owner == MADE_INSIDE:
            self._made[storage._cdata] = 0
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        del self._owner[key]
        self.live_bytes -= self._made.pop(key, 0)
        self._fast_memory.forget(key)

    def _note_size(self, tensor: torch.Tensor, op: str) -> None:
        """Take account of memory that `op` allocated, or enlarged (`out=` may)."""
        key, size = storage_key(tensor), tensor.untyped_storage().nbytes()
        if key not in self._made:
            return
        self.live_bytes += size - self._made[key]
        self._made[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        elements = size // tensor.element_size()
        if elements > self.largest.elements:
            self.largest = MadeTensor(elements, tuple(tensor.shape), tensor.dtype, op)


@dataclass(frozen=True)
class _Traits:
    """What the dispatcher knows of an operation, whatever its arguments."""

    name: str  # "bmm"
    label: str  # "aten.bmm"
    composite: bool
    view: bool
    written: tuple[tuple[int, str], ...]  # position and name of the arguments it writes into
    out: frozenset[int]  # positions of those that are `out=` targets, which it does not read


@cache
def _traits(func) -> _Traits:
    arguments = list(enumerate(func._schema.arguments))
    return _Traits(
        name=func._schema.name.partition("::")[2],
        label=str(func.overloadpacket),
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        view=func.is_view or torch.Tag.inplace_view in func.tags,
        written=tuple((at, a.name) for at, a in arguments if a.alias_info is not None and a.alias_info.is_write),
        out=frozenset(at for at, a in arguments if a.is_out),
    )


class _Operation:
    """One dispatched operation, seen as the memory it touches.

    Attributes:
        traits: what is known of it beforehand.
        args: its positional arguments.
        inputs: its tensor arguments, in order.
        written: those of them that it writes into.
        fresh: tensors that did not exist before: results with memory of their own, and data that enters from outside.
    """

    def __init__(self, traits: _Traits, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        self.traits, self.args = traits, args
        self.inputs = [*_tensors(args), *_tensors(kwargs.values())]
        self.written: list[torch.Tensor] = []
        self._untouched: set[int] = set()
        for at, name in traits.written:
            targets = list(_tensors([args[at] if at < len(args) else kwargs.get(name)]))
            self.written += targets
            if at in traits.out:
                self._untouched.update(map(id, targets))
        known = {storage_key(tensor) for tensor in self.inputs}
        self.fresh = [tensor for tensor in _tensors([out]) if storage_key(tensor) not in known]
        if traits.name == "lift_fresh":  # torch.tensor(...), torch.from_numpy(...)
            self.fresh = self.inputs

    def moves_data(self) -> bool:
        if self.traits.view or self.traits.name.startswith(_ALLOCATES):
            return False
        return bool(self.written or self.fresh) or self.traits.name in _READS_TO_ANSWER

    def reads(self) -> Iterator[tuple[torch.Tensor, Region, int]]:
        """(tensor, its region, bytes) for each input that is read."""
        name = self.traits.name
        if name.endswith("_like") or name.startswith("new_"):
            return
        untouched = set(self._untouched)
        if name in _OVERWRITES or (name in _SCATTERS and not self._adds_up()):
            untouched.add(id(self.inputs[0]))
        seen = set()
        for tensor in self.inputs:
            region = Region.of(tensor)
            if id(tensor) in untouched or region in seen:
                continue
            seen.add(region)
            yield tensor, region, self._bytes_touched(tensor, region)

    def writes(self) -> Iterator[tuple[torch.Tensor, Region, int]]:
        """(tensor, its region, bytes) for each tensor that is written: arguments in place, then new outputs."""
        for tensor in [*self.written, *self.fresh]:
            region = Region.of(tensor)
            yield tensor, region, self._bytes_touched(tensor, region)

    def _bytes_touched(self, tensor: torch.Tensor, region: Region) -> int:
        whole = region.bytes
        if self.traits.name in _GATHERS and tensor is self.inputs[0]:
            return min(whole, self.fresh[0].numel() * tensor.element_size())
        if self.traits.name in _SCATTERS and tensor is self.inputs[0]:
            return min(whole, self._elements_scattered() * tensor.element_size())
        return whole

    def _adds_up(self) -> bool:
        if self.traits.name in _ELEMENT_SCATTERS | _SLICE_SCATTERS:
            return self.traits.name in _ADDING_SCATTERS
        return len(self.args) > 3 and bool(self.args[3])  # index_put_(target, index, values, accumulate)

    def _elements_scattered(self) -> int:
        target = self.inputs[0]
        if self.traits.name in _ELEMENT_SCATTERS:
            return self.args[2].numel()
        if self.traits.name in _SLICE_SCATTERS:
            return self.args[2].numel() * target.numel() // max(1, target.shape[self.args[1]])
        # x[index] = y writes what x[index] would read, so index something of x's shape that has no memory to copy.
        index = tuple(slice(None) if i is None else i for i in self.args[1])
        return target.new_empty(1).expand(target.shape)[index].numel()


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The strided tensors among `values` and the lists in them: an operator's arguments and results nest no deeper."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
