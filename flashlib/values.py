"""Whether the values of a tensor may be looked at.

Checking that lengths, page numbers or cumulative lengths make sense means reading them. On a CPU that costs nothing and is always done. On a GPU
it would wait for all the work that was queued, in a CUDA graph it is forbidden, and under a tracer there is nothing to read. There, values that
make no sense never reach memory that is not theirs (each function says what they give instead), and they are checked on request::

    with flashlib.check_values():
        out = attention(q, k, v, mask=KeyLengths(lengths))      # waits for the GPU; says which length is wrong
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "check_values",
    "constant_when_traced",
    "has_data",
    "has_tangent",
    "has_values",
    "may_read",
    "transforms",
    "values_are_asked_for",
]

_asked: ContextVar[bool] = ContextVar("flashlib_check_values", default=False)


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """Have torch.compile run a function that makes no tensors when it traces a call of it, and take the answer for a constant.

    What torch.compiler.assume_constant_result does, without importing the compiler for it: half a second and more.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@contextlib.contextmanager
def check_values() -> Iterator[None]:
    """Inside the block lengths, cumulative lengths and page numbers on a GPU are checked as they are on a CPU. Each check waits for the GPU."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def values_are_asked_for() -> bool:
    """Whether this is inside of :func:`check_values`."""
    return _asked.get()


def has_values(*tensors: Tensor) -> bool:
    """Whether the tensors hold numbers: False for meta, fake and wrapped tensors, inside torch.compile, torch.export and function transforms."""
    if torch.compiler.is_compiling() or _traced():
        return False
    return not any(
        x.device.type == "meta" or torch._is_functional_tensor(x) or _is_wrapped(x) or _dispatches(x) for x in tensors
    )


def may_read(*tensors: Tensor) -> bool:
    """Whether to look at the values: they are on the CPU, or :func:`check_values` asks for it and no CUDA graph is being captured."""
    if not has_values(*tensors):
        return False
    if all(x.device.type == "cpu" for x in tensors):
        return True
    return _asked.get() and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def has_data(*tensors: Tensor) -> bool:
    """Whether there is memory behind the tensors: False for meta and fake ones and in torch.compile, but True inside torch.func's transforms of real ones.

    What :func:`has_values` says of those is that their numbers cannot be told apart from outside; they can be computed with all the same.
    """
    return not torch.compiler.is_compiling() and has_values(*(_innermost(x) for x in tensors))


def has_tangent(x: Tensor) -> bool:
    """Whether a tangent of forward-mode differentiation (``torch.func.jvp``, ``torch.autograd.forward_ad``) goes along with ``x``."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    # Inside a gradient that is itself pushed forward, as in a Hessian, the tangent is hidden in what the gradient's tensors stand for.
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    if _is_wrapped(x) and any(level.key() == functorch.TransformType.Jvp for level in levels):
        return True
    return forward_ad.unpack_dual(x).tangent is not None


def _innermost(x: Tensor) -> Tensor:
    while _is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` stands for a tensor inside torch.func.grad, vmap or jvp."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _dispatches(x: Tensor) -> bool:
    """Whether ``x`` is of a class that decides itself what operators do: a fake tensor, a DTensor. Its own memory, if it has any, means nothing."""
    return type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


_TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FAKE", "FUNCTIONAL"))


def _traced() -> bool:
    """Whether operators are being recorded (``make_fx``) or played without data."""
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


def transforms(kind: str) -> int:
    """How many transforms of torch.func of a kind, "Jvp" or "Vmap", are open here."""
    if torch.compiler.is_compiling():
        return 0
    wanted = getattr(torch._C._functorch.TransformType, kind)
    return sum(level.key() == wanted for level in torch._C._functorch.get_interpreter_stack() or ())
