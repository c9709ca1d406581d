"""One call of decoding, checked, and the two ways to run it that an operator has too: in plain PyTorch, and by the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real

import torch
from torch import Tensor

from flashlib.launch.checks import check_decoding
from flashlib.launch.decode import DecodeOptions, launch_decode
from flashlib.masks import NO_LIMIT, KeyLengths, Window
from flashlib.partial import Partial, fold
from flashlib.reference import naive_attention
from flashlib.values import has_data, has_tangent, has_values, may_read

__all__ = ["Problem", "run_torch", "run_triton", "split_ranges"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TILE = 64  # keys; where the tile is not the kernel's own


def split_ranges(
    length: int, *, num_splits: int = 0, split_size: int | None = None, first: int = 0, tile: int = TILE
) -> list[range]:
    """Where the keys ``[first, length)`` are cut: what the kernel does, on the host.

    Args:
        length: number of keys of the request.
        num_splits: exactly so many ranges share the tiles of keys evenly; the last of them may be empty.
        split_size: as many ranges as it takes, with cuts at multiples of this many keys. Give this or ``num_splits``.
        first: the first key that any row sees; 0 unless there is a window.
        tile: with ``num_splits``, cuts are at multiples of this.

    Raises:
        TypeError, ValueError: a number is out of range, or both or neither of num_splits and split_size are given.
    """
    for name, value, least in (
        ("length", length, 0),
        ("num_splits", num_splits, 0),
        ("first", first, 0),
        ("tile", tile, 1),
    ):
        check_count(name, value, least)
    if (num_splits == 0) == (split_size is None):
        raise ValueError(
            f"give num_splits or split_size, one of them; got num_splits={num_splits}, split_size={split_size}"
        )
    first = min(first, length)
    if split_size is not None:
        check_count("split_size", split_size, 1)
        begins = range(first // split_size * split_size, length, split_size) if first < length else []
    else:
        begin = first // tile * tile
        split_size = max(-(-(length - begin) // tile // num_splits), 1) * tile
        begins = [begin + split * split_size for split in range(num_splits)]
    return [_clipped(begin, begin + split_size, first, length) for begin in begins]


def _clipped(begin: int, end: int, first: int, length: int) -> range:
    begin, end = max(begin, first), min(end, length)
    return range(min(begin, end), end)


@dataclass(frozen=True)
class Problem:
    """One call of :func:`decode_attention`, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None
    block_table: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float
    num_splits: int
    split_size: int | None

    @classmethod
    def checked(cls, q, k, v, lengths, block_table, causal, window, scale, softcap, num_splits, split_size) -> Problem:
        _check_tensors(q, k, v, block_table)
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False; got {causal!r}")
        left, right = _check_window(window)
        if causal:
            right = 0
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else _number("scale", scale)
        softcap = _number("softcap", softcap)
        if scale <= 0:
            raise ValueError(f"scale must be greater than 0; got {scale}")
        if softcap < 0:
            raise ValueError(f"softcap must be at least 0 (0 for none); got {softcap}")
        check_count("num_splits", num_splits, 0)
        if split_size is not None:
            check_count("split_size", split_size, 1)
            if num_splits:
                raise ValueError(f"give num_splits or split_size, not both; got {num_splits} and {split_size}")
            split_size = min(split_size, NO_LIMIT)
        problem = cls(q, k, v, lengths, block_table, left, right, scale, softcap, num_splits, split_size)
        problem._check_lengths()
        return problem

    @property
    def capacity(self) -> int:
        """How many keys a request may have."""
        return self.k.shape[2] if self.block_table is None else self.k.shape[2] * self.block_table.shape[1]

    def values(self) -> tuple:
        """All attributes in order, as the operator of :mod:`flashlib.inference.decode_operator` takes them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def tensors(self) -> list[Tensor]:
        return [x for x in self.values() if isinstance(x, Tensor)]

    def options(self, precision: str) -> DecodeOptions:
        """What the kernels must know of it, and into how many splits it is cut."""
        return DecodeOptions.chosen(
            self.q, self.k, self.v, scale=self.scale, softcap=self.softcap, lengths=self.lengths, block_table=self.block_table,
            left=self.left, right=self.right, num_splits=self.num_splits, split_size=self.split_size, precision=precision,
        )  # fmt: skip

    def first_key(self, length: int) -> int:
        """The first key that any row sees, of a request of this length."""
        return 0 if self.left is None else max(length - self.q.shape[2] - self.left, 0)

    def intervals(self) -> tuple[Tensor, Tensor]:
        """The first key that each row sees and the one behind the last, int64 ``[B, Sq]``, without asking the host."""
        batch, _, q_len, _ = self.q.shape
        full = torch.full((batch,), self.capacity, dtype=torch.int64, device=self.q.device)
        lengths = full if self.lengths is None else self.lengths.to(torch.int64).clamp(0, self.capacity)
        mask = KeyLengths(lengths) & Window(self.left, self.right, offset=lengths - q_len)
        intervals = mask.intervals(batch, q_len, self.capacity, self.q.device)
        return intervals.start, intervals.stop

    def triton_why_not(self) -> str | None:
        if self.q.dtype == torch.float64:
            return "takes fp16, bf16 and fp32; got torch.float64"
        tensors = (self.q, self.k, self.v)
        if has_data(*tensors) and not has_values(*tensors):
            return "does not go through the transforms of torch.func; backend 'torch' does"
        return no_triton(self.q.device) or too_wide(max(self.q.shape[3], self.v.shape[3])) or needs_grad(*tensors)

    def cpu_why_not(self) -> str | None:
        from flashlib.launch.cpu.library import why_missing

        if self.q.device.type != "cpu":
            return f"the kernels run on the CPU; the tensors are on {self.q.device}"
        if self.q.dtype == torch.float64:
            return "takes fp16, bf16 and fp32; got torch.float64"
        tensors = (self.q, self.k, self.v)
        if has_data(*tensors) and not has_values(*tensors):
            return "does not go through the transforms of torch.func; backend 'torch' does"
        return too_wide(max(self.q.shape[3], self.v.shape[3])) or needs_grad(*tensors) or why_missing()

    def _check_lengths(self) -> None:
        lengths, batch = self.lengths, self.q.shape[0]
        if lengths is None:
            return
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be a torch.Tensor or None; got {type(lengths).__name__}")
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths is {lengths.dtype}; expected int32 or int64")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected ({batch},), one per request")
        if lengths.device != self.q.device:
            raise TypeError(f"lengths is on {lengths.device} but q is on {self.q.device}; all must be on one device")

    def check_values(self) -> None:
        """Read lengths and page numbers, and refuse those that cannot be. On a GPU this waits for it."""
        check_decoding(self.q, self.k, self.lengths, self.block_table, self.left)


def run_torch(problem: Problem) -> tuple[Tensor, Tensor]:
    """Request by request, so that nothing in a request's result can depend on its neighbours."""
    problem.check_values()  # the host reads them here in any case, and an index of PyTorch's may lie nowhere
    q, batch = problem.q, problem.q.shape[0]
    lengths = [problem.capacity] * batch if problem.lengths is None else problem.lengths.tolist()
    nothing = Partial.identity(0, *q.shape[1:3], problem.v.shape[3], dtype=_accumulate(q.dtype), device=q.device)
    results = [nothing, *(_decode_request(problem, request, length) for request, length in enumerate(lengths))]
    return torch.cat([result.out for result in results]).to(q.dtype), torch.cat([result.lse for result in results])


def _decode_request(problem: Problem, request: int, length: int) -> Partial:
    splits = {"split_size": problem.split_size} if problem.split_size else {"num_splits": problem.num_splits or 1}
    q = problem.q[request : request + 1]
    pieces = [Partial.identity(*q.shape[:3], problem.v.shape[3], dtype=_accumulate(q.dtype), device=q.device)]
    for keys in split_ranges(length, **splits, first=problem.first_key(length)):
        k, v = (_gather(x, request, keys, problem.block_table) for x in (problem.k, problem.v))
        pieces.append(partial_attention(q, k, v, length - keys.start, problem))
    return fold(pieces)


def _gather(x: Tensor, request: int, keys: range, block_table: Tensor | None) -> Tensor:
    """Some keys, or values, of one request: ``[1, Hkv, keys, channels]``."""
    if block_table is None:
        return x[request : request + 1, :, keys.start : keys.stop]
    key = torch.arange(keys.start, keys.stop, device=x.device)
    pages = block_table[request, key // x.shape[2]].long()
    return x[pages, :, key % x.shape[2]].transpose(0, 1)[None]


def partial_attention(q: Tensor, k: Tensor, v: Tensor, keys_from_here: int, problem: Problem) -> Partial:
    """Attention over one piece of the keys, of which the last query's is number ``keys_from_here - 1``."""
    mask = Window(problem.left, problem.right, offset=keys_from_here - q.shape[2])
    q, k, v = (x.to(_accumulate(x.dtype)) for x in (q, k, v))
    return Partial(*naive_attention(q, k, v, mask=mask, scale=problem.scale, softcap=problem.softcap, return_lse=True))


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_triton(problem: Problem, precision: str) -> tuple[Tensor, Tensor]:
    """By the kernels; ``precision`` of fp32 products as in :class:`flashlib.config.TritonConfig`."""
    if may_read(*(x for x in (problem.q, problem.lengths, problem.block_table) if x is not None)):
        problem.check_values()
    return launch_decode(problem.q, problem.k, problem.v, problem.options(precision))


def no_triton(device: torch.device) -> str | None:
    from flashlib.launch.start import TRITON_INSTALLED, interpreting

    if not TRITON_INSTALLED:
        return "triton is not installed (it exists for Linux only)"
    expected = "cpu" if interpreting() else "cuda"
    if device.type != expected:
        return f"the kernels run on {expected} here; the tensors are on {device}"
    return None


def too_wide(head_dim: int) -> str | None:
    return f"takes a head_dim of at most 256; got {head_dim}" if head_dim > 256 else None


def needs_grad(*tensors: Tensor) -> str | None:
    if any(has_tangent(x) for x in tensors):
        return "has no forward-mode derivative; backend 'torch' has one"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "has no gradient: call it under torch.no_grad(), or take backend 'torch', or flashlib.attention"
    return None


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise TypeError(
                f"{name} is {x.dtype}; expected float16, bfloat16, float32 or float64, one dtype for q, k and v"
            )
        if x.dim() != 4 or x.shape[3] < 1:
            raise ValueError(f"{name} must be 4-dimensional, with at least one channel; got shape {tuple(x.shape)}")
        if x.device != q.device:
            raise TypeError(f"{name} is on {x.device} but q is on {q.device}; all must be on one device")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in all but their channels: {shapes}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head_dim {k.shape[3]} but q has head_dim {q.shape[3]}: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k has {k.shape[1]}; expected a multiple of the KV heads: {shapes}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"{name} must have its channels next to each other; got strides {x.stride()} for shape {tuple(x.shape)}"
            )
    if block_table is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k has batch {k.shape[0]} but q has batch {q.shape[0]}: {shapes}; or is a block_table missing?"
            )
        return
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table must be a torch.Tensor or None; got {type(block_table).__name__}")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table is {block_table.dtype}; expected int32")
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table must be [{q.shape[0]}, max_pages]; got shape {tuple(block_table.shape)}")
    if block_table.device != q.device:
        raise TypeError(f"block_table is on {block_table.device} but q is on {q.device}; all must be on one device")
    if block_table.stride(1) != 1 and block_table.shape[1] > 1:
        raise ValueError(
            f"block_table must have the pages of a request next to each other; got strides {block_table.stride()}"
        )
    if k.shape[2] == 0:
        raise ValueError(f"with a block_table, k must have pages of at least one key: {shapes}")


def _check_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window must be (left, right), each an int or None; got {window!r}")
    for side, width in zip(("left", "right"), window, strict=True):
        if width is not None:
            check_count(f"window's {side}", width, 0)
    return Window(*window).band()  # a width beyond all lengths is no limit


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace for a dynamic float
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)
