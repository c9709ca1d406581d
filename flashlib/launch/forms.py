"""The form of a tensor, without the tensor: what a launch is planned from.

Grids, strides, tiles and the places of everything in memory follow from shapes, strides, types and alignment, and from no number in any tensor.
A :class:`Form` has just these, and answers the same questions as a :class:`torch.Tensor`, so that the functions that make launches
(:mod:`flashlib.launch.plain`, :mod:`flashlib.launch.hopper`, :mod:`flashlib.launch.decode`) take either. A form is cheap: no
allocator and no dispatcher is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Form", "Memory", "NotPlannable"]


class NotPlannable(Exception):
    """A launch depends on something that a form does not have, such as its numbers. It must be made from the tensors themselves.

    ``is_final``: no later call of the same class will do better.
    """

    def __init__(self, why: str, *, is_final: bool = True):
        super().__init__(why)
        self.is_final = is_final


@dataclass
class Memory:
    """The places of one plan: what comes in, and what launches ask for on top, in the order in which they did."""

    device: torch.device
    made: list[Form] = field(default_factory=list)

    def input(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Form:
        return self._add(tuple(shape), tuple(strides), dtype)

    def _add(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, counts: bool = False) -> Form:
        form = Form(self, len(self.made), 0, shape, strides, dtype, counts)
        self.made.append(form)
        return form


class Form:
    """Shape, strides, dtype and device of a tensor that begins ``offset`` bytes into place number ``source`` of a :class:`Memory`.

    Every place begins at a multiple of 16 bytes. ``is_counters``: the place holds zeros, and is left so. Its numbers may be
    symbols (:mod:`flashlib.launch.recipes`). Slices of it begin and end at numbers of at least 0.
    """

    __slots__ = ("_strides", "dtype", "is_counters", "memory", "offset", "shape", "source")

    def __init__(self, memory, source, offset, shape, strides, dtype, is_counters=False):
        self.memory, self.source, self.offset = memory, source, offset
        self.shape, self._strides, self.dtype = shape, strides, dtype
        self.is_counters = is_counters

    @property
    def device(self) -> torch.device:
        return self.memory.device

    @property
    def bytes(self) -> int:
        """From its first number to behind its last."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self._strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def stride(self, dim: int | None = None):
        return self._strides if dim is None else self._strides[dim]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        """Where it begins in its place: enough to say how it is aligned."""
        return self.offset

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def new_empty(self, *shape, dtype: torch.dtype | None = None) -> Form:
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        return self.memory._add(shape, _contiguous(shape), dtype or self.dtype)

    def new_counters(self, count: int) -> Form:
        return self.memory._add((count,), (1,), torch.int32, counts=True)

    def transpose(self, a: int, b: int) -> Form:
        shape, strides = list(self.shape), list(self._strides)
        shape[a], shape[b], strides[a], strides[b] = shape[b], shape[a], strides[b], strides[a]
        return self._view(self.offset, tuple(shape), tuple(strides))

    def flatten(self, first: int, last: int) -> Form:
        shape, strides = self.shape, self._strides
        for dim in range(first, last):
            if strides[dim] != shape[dim + 1] * strides[dim + 1]:
                raise NotPlannable("dimensions that do not lie next to each other are flattened")
        merged = math.prod(shape[first : last + 1])
        return self._view(
            self.offset, (*shape[:first], merged, *shape[last + 1 :]), (*strides[:first], *strides[last:])
        )

    def contiguous(self) -> Form:
        wanted = _contiguous(self.shape)
        if any(a != b for a, b, size in zip(self._strides, wanted, self.shape, strict=True) if size != 1):
            raise NotPlannable("a tensor that is not contiguous must be copied first")
        return self

    def to(self, dtype: torch.dtype) -> Form:
        if dtype != self.dtype:
            raise NotPlannable("a tensor must be converted first")
        return self

    def zero_(self) -> Form:
        raise NotPlannable("a tensor must be filled with zeros")

    def __getitem__(self, index) -> Form:
        index = index if isinstance(index, tuple) else (index,)
        offset, shape, strides = self.offset, [], []
        for dim, (size, stride) in enumerate(zip(self.shape, self._strides, strict=True)):
            at = index[dim] if dim < len(index) else slice(None)
            if isinstance(at, int):
                offset += at * stride * self.dtype.itemsize
                continue
            begin = 0 if at.start is None else min(at.start, size)
            end = size if at.stop is None else min(at.stop, size)
            offset += begin * stride * self.dtype.itemsize
            shape.append(max(0, end - begin))
            strides.append(stride)
        return self._view(offset, tuple(shape), tuple(strides))

    def _view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Form:
        return Form(self.memory, self.source, offset, shape, strides, self.dtype, self.is_counters)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
