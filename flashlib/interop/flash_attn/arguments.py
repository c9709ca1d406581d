"""The arguments of flash_attn's functions: checked, and said as flashlib says them."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import SymInt, Tensor

from flashlib.masks import NO_LIMIT
from flashlib.spec import DTYPES

__all__ = ["Options", "check_alike", "check_tensors", "flag", "number", "whole"]


_SAID_AGAIN = {float, int, bool, type(None), tuple}


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments that the functions share, in flash_attn's order: checked, and said as flashlib says them.

    ``window_size`` becomes ``(left, right)`` with None for no limit, and says ``causal`` too. Flags are whatever has a truth value, as there.
    """

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None]
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool

    @classmethod
    def checked(cls, *arguments: Any) -> Options:
        """The same, looked at once for all calls that say the same, which takes a fifth of the time."""
        types = tuple(map(type, arguments))
        if not _SAID_AGAIN.issuperset(types) or torch.compiler.is_compiling():
            return cls(*arguments)
        return cls._kept(arguments, types)

    @staticmethod
    @lru_cache(maxsize=256)
    def _kept(arguments: tuple, types: tuple) -> Options:  # True is not 1, nor 1 the same as 1.0
        return Options(*arguments)

    def __post_init__(self):
        if not 0 <= number("dropout_p", self.dropout_p) < 1:
            raise ValueError(f"dropout_p must be at least 0 and below 1; got {self.dropout_p}")
        for name in ("causal", "deterministic", "return_attn_probs"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        try:
            left, right = (whole(width) for width in self.window_size)
        except (TypeError, ValueError):
            raise TypeError(f"window_size must be two ints (left, right); got {self.window_size!r}") from None
        if self.causal:
            right = 0
        # flash_attn says "no limit" and "no softcap" by any number below 0.
        limits = (None if width < 0 or width >= NO_LIMIT else width for width in (left, right))
        object.__setattr__(self, "window_size", tuple(limits))
        object.__setattr__(self, "softcap", 0.0 if number("softcap", self.softcap) < 0 else self.softcap)
        if self.softmax_scale is not None and not 0 < number("softmax_scale", self.softmax_scale) < math.inf:
            raise ValueError(f"softmax_scale must be above 0 and finite, or None; got {self.softmax_scale}")


def flag(name: str, value: object) -> bool:
    """``value`` as flash_attn's own binding reads it: None, a number, a NumPy bool, a tensor of one element; no text and no list."""
    if isinstance(value, bool):
        return value
    if value is not None and not hasattr(type(value), "__bool__"):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def whole(value: Any) -> Any:
    """``value`` as an int; TypeError if it is none. A symbolic size stays one."""
    return value if isinstance(value, int | SymInt) else operator.index(value)


def number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    return value


def check_tensors(**given: tuple[Tensor, str]) -> None:
    """Hold each tensor against its layout. A dimension that is named twice must have one size; a number is a size itself."""
    if torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x, _ in given.values()):
        return _check_tensors(given)
    seen = tuple([(name, layout, x.shape, x.dtype, x.device) for name, (x, layout) in given.items()])
    if seen not in _checked:
        _check_tensors(given)
        if len(_checked) >= MOST_CHECKED:
            _checked.clear()
        _checked.add(seen)


MOST_CHECKED = 1024
_checked: set[tuple] = set()  # kinds of tensors with which nothing was wrong


def _check_tensors(given: dict[str, tuple[Tensor, str]]) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, layout) in given.items():
        dimensions = layout.split()
        expected = f"{name} must be [{', '.join(dimensions)}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{expected}, a torch.Tensor; got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")
        if tensor.dim() != len(dimensions):
            raise ValueError(f"{expected}; got shape {tuple(tensor.shape)}")
        for dimension, size in zip(dimensions, tensor.shape, strict=True):
            known, where = (int(dimension), "") if dimension.isdigit() else sizes.setdefault(dimension, (size, name))
            if size != known:
                reason = f"{dimension} is {known} in {where}" if where else f"expected {known} in place of {size}"
                raise ValueError(f"{expected}; got shape {tuple(tensor.shape)}, but {reason}")
    check_alike({name: tensor for name, (tensor, _) in given.items()})
    heads, kv_heads = (sizes.get(name, sizes["nheads"])[0] for name in ("nheads", "nheads_k"))
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"nheads must be a multiple of nheads_k; got {heads} and {kv_heads}")


def check_alike(tensors: dict[str, Tensor]) -> None:
    first, *others = tensors
    for name in others:
        for what in ("dtype", "device"):
            found, expected = getattr(tensors[name], what), getattr(tensors[first], what)
            if found != expected:
                raise TypeError(f"{name} has {what} {found}, but {first} has {expected}; all must have one")
