"""What `torch.autocast` does to attention: the inputs are cast once, at the door, and nothing behind it is cast again.

PyTorch's SDPA stands on autocast's list of operations that run in the lower precision: q, k and v are cast to the autocast dtype, whatever they were,
but for fp64, which is left alone. The same holds here, so that a program gets the dtype and the accuracy it is used to, and every backend
the same. Behind the door autocast is off: products that an algorithm forms in fp32 on purpose stay in fp32.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["autocast_active", "autocast_inputs", "autocast_off"]


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast hands them to PyTorch's SDPA; as they are where it is off. What is no floating tensor passes through."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    return tuple([_cast(x) if isinstance(x, Tensor) else x for x in tensors])


def _cast(x: Tensor) -> Tensor:
    eligible = x.is_floating_point() and x.dtype != torch.float64 and autocast_active(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if eligible else x


def autocast_off(device: torch.device) -> AbstractContextManager:
    """A block in which autocast does nothing on this device. Costs nothing where it is off already."""
    return torch.autocast(device.type, enabled=False) if autocast_active(device.type) else contextlib.nullcontext()


# Asked once: torch.compile in torch 2.11 cannot trace the question.
_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(kind)
)


def autocast_active(device_type: str) -> bool:
    """Whether autocast is on for tensors on such devices."""
    return device_type in _AUTOCAST and torch.is_autocast_enabled(device_type)
