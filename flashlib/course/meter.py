"""Count what PyTorch code moves: the largest tensor it makes, its peak memory, the bytes it reads and writes.

FlashAttention is not an argument about arithmetic. It does the same multiplications as `softmax(QK^T)V`, and a few
more; what it saves is traffic between slow and fast memory. `TrafficMeter` makes that traffic visible on any machine,
with or without a GPU, because it counts at PyTorch's dispatcher: every operation passes there with its tensors.

**What is counted.** The meter takes each operation as a machine without any cache would run it:

- An operation that moves data reads each of its tensor inputs once and writes each of its outputs once. The same view
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

So for tiled code written in PyTorch, the first operation on a tile is its load from slow memory, and
`bytes_read["k"]` is the traffic that the paper counts (Dao et al. 2022, "FlashAttention", section 3.2). A copy of K is
another tensor: reading the copy is not reading K.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashlib.course.display import Table, table

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
        ValueError: two operands share memory (then their traffic cannot be told apart), or an operand takes one of the
            two names above.

    A meter may be entered again; its counts add up. The module's docstring says exactly what counts as reading and
    writing.

    Example:
        >>> q, k = torch.ones(4, 8), torch.ones(6, 8)
        >>> with TrafficMeter(q=q, k=k) as meter:
        ...     scores = q @ k.T
        >>> meter.bytes_read["q"], meter.bytes_read["k"], meter.largest.elements
        (128, 192, 24)
    """

    def __init__(self, **operands: torch.Tensor) -> None:
        super().__init__()
        self.largest = NOTHING_MADE
        self.live_bytes = 0
        self.peak_bytes = 0
        self.bytes_read: Counter[str] = Counter()
        self.bytes_written: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._operands = operands
        self._owner: dict[int, str] = {}  # storage -> name, for as long as the storage lives
        self._made: dict[int, int] = {}  # storage made inside -> its bytes
        for name, operand in operands.items():
            self._adopt(name, operand)

    @property
    def times_read(self) -> dict[str, float]:
        """How often each named operand was read, in multiples of its own size. An empty operand: 0."""
        return {name: self.bytes_read[name] / max(1, addressed_bytes(t)) for name, t in self._operands.items()}

    def report(self) -> Table:
        """Everything counted so far, as a table that prints as text and shows as HTML in a notebook."""
        rows = []
        for name in [*self._operands, MADE_INSIDE, ELSEWHERE]:
            read, written = self.bytes_read[name], self.bytes_written[name]
            if name in self._operands:
                rows.append((name, addressed_bytes(self._operands[name]), read, written, self.times_read[name]))
            elif read or written:
                rows.append((name, None, read, written, None))
        rows.append(("total", None, self.bytes_read.total(), self.bytes_written.total(), None))
        notes = [
            f"largest tensor made: {self.largest}",
            f"peak memory of tensors made: {self.peak_bytes:,} B",
            f"operations that moved data: {self.calls.total():,}",
        ]
        return table(rows, ["operand", "size (B)", "read (B)", "written (B)", "times read"], notes=notes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Inference mode hands over composite functions whole; take them apart, as autograd does outside of it.
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _adopt(self, name: str, operand: torch.Tensor) -> None:
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"operand {name!r} must be a torch.Tensor, got {type(operand).__name__}")
        if name in (MADE_INSIDE, ELSEWHERE):
            raise ValueError(f"operand name {name!r} is one of the meter's own headings; choose another")
        storage = _storage_key(operand)
        if storage in self._owner:
            raise ValueError(
                f"operands {self._owner[storage]!r} and {name!r} share memory, so their traffic cannot be told apart; "
                "pass separate tensors (for example .clone() one of them)"
            )
        self._owner[storage] = name

    def _record(self, func, args, kwargs, out) -> None:
        name = func._schema.name.partition("::")[2]
        inputs = list(_tensors((args, kwargs)))
        written, out_targets = _written_arguments(func, args, kwargs)
        fresh = _not_sharing_memory(_tensors(out), inputs)

        enters_from_outside = name == "lift_fresh"  # torch.tensor(...), torch.from_numpy(...)
        self._note_made(func, inputs if enters_from_outside else [*fresh, *written])
        moves_data = fresh or written or name in _READS_TO_ANSWER
        if not moves_data or torch.Tag.inplace_view in func.tags or name.startswith(_ALLOCATES):
            return

        self.calls[str(func.overloadpacket)] += 1
        operation = _Operation(name, args, inputs, written, out_targets, fresh)
        for tensor, size in operation.reads():
            self.bytes_read[self._owner_of(tensor)] += size
        for tensor, size in operation.writes():
            self.bytes_written[self._owner_of(tensor)] += size

    def _owner_of(self, tensor: torch.Tensor) -> str:
        return self._owner.get(_storage_key(tensor), ELSEWHERE)

    def _note_made(self, func, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._owner:
                self._owner[key] = MADE_INSIDE
                self._made[key] = 0
                weakref.finalize(storage, self._free, key).atexit = False
            if key not in self._made:
                continue
            self.live_bytes += size - self._made[key]
            self._made[key] = size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            elements = size // tensor.element_size()
            if elements > self.largest.elements:
                self.largest = MadeTensor(elements, tuple(tensor.shape), tensor.dtype, str(func.overloadpacket))

    def _free(self, key: int) -> None:
        self.live_bytes -= self._made.pop(key)
        del self._owner[key]


def addressed_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory that `tensor` addresses. An expanded dimension (stride 0) counts once."""
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride or not size else 1
    # Overlapping windows (`unfold`) address at most the memory behind them.
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return min(distinct, span) * tensor.element_size() if tensor.numel() else 0


@dataclass(frozen=True)
class _Operation:
    """One dispatched operation, seen as the memory it touches."""

    name: str
    args: tuple
    inputs: list[torch.Tensor]
    written: list[torch.Tensor]
    out_targets: list[torch.Tensor]
    fresh: list[torch.Tensor]

    def reads(self) -> Iterator[tuple[torch.Tensor, int]]:
        """(tensor, bytes) for each input that is read."""
        if self.name.endswith("_like") or self.name.startswith("new_"):
            return
        untouched = {id(t) for t in self.out_targets}
        if self.name in _OVERWRITES or (self.name in _SCATTERS and not self._adds_up()):
            untouched.add(id(self.inputs[0]))
        seen = set()
        for tensor in self.inputs:
            view = (_storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            if id(tensor) in untouched or view in seen:
                continue
            seen.add(view)
            yield tensor, self._bytes_touched(tensor)

    def writes(self) -> Iterator[tuple[torch.Tensor, int]]:
        """(tensor, bytes) for each tensor that is written: arguments in place, then new outputs."""
        for tensor in [*self.written, *self.fresh]:
            yield tensor, self._bytes_touched(tensor)

    def _bytes_touched(self, tensor: torch.Tensor) -> int:
        whole = addressed_bytes(tensor)
        if self.name in _GATHERS and tensor is self.inputs[0]:
            return min(whole, self.fresh[0].numel() * tensor.element_size())
        if self.name in _SCATTERS and tensor is self.inputs[0]:
            return min(whole, self._elements_scattered() * tensor.element_size())
        return whole

    def _adds_up(self) -> bool:
        accumulates = self.name not in _ELEMENT_SCATTERS | _SLICE_SCATTERS and len(self.args) > 3 and bool(self.args[3])
        return self.name in _ADDING_SCATTERS or accumulates

    def _elements_scattered(self) -> int:
        target = self.inputs[0]
        if self.name in _ELEMENT_SCATTERS:
            return self.args[2].numel()
        if self.name in _SLICE_SCATTERS:
            return self.args[2].numel() * target.numel() // max(1, target.shape[self.args[1]])
        # x[index] = y writes what x[index] would read, so index something of x's shape that has no memory to copy.
        index = tuple(slice(None) if i is None else i for i in self.args[1])
        return target.new_empty(1).expand(target.shape)[index].numel()


def _written_arguments(func, args, kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that `func` writes into, and those among them that are `out=` targets, which it does not read."""
    written, out_targets = [], []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        targets = list(_tensors(args[position] if position < len(args) else kwargs.get(argument.name)))
        written += targets
        if argument.is_out:
            out_targets += targets
    return written, out_targets


def _not_sharing_memory(outputs, inputs) -> list[torch.Tensor]:
    known = {_storage_key(t) for t in inputs}
    return [t for t in outputs if _storage_key(t) not in known]


def _tensors(tree) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided)


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
