"""Our attention as PyTorch operators, ``torch.ops.flashlib.*``: what torch.compile, torch.export, meta and fake tensors see.

An operator has a schema of plain types, a fake version that only says what comes out (so that a compiler can trace through
it), a gradient, which is another operator, and a rule for ``vmap``. Which engine computes it is an argument: its ``str``.

``attention_forward`` and ``attention_backward`` are differentiable, and are what is called. What they call, ``forward_pass`` and ``backward_pass``,
knows nothing of gradients: a compiler finds it below them, and the code that it makes calls the engine without asking, each time, whether
there is something to differentiate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashlib.launch.engines import engine_named, name_of, no_second_derivative
from flashlib.launch.folding import folded, folded_numbers, restored_numbers, saved_numbers

__all__ = ["attention_backward", "attention_forward"]


_NUMBERS = (
    "Tensor? start, Tensor? stop, SymInt? left, SymInt? right, Tensor? alibi_slopes, Tensor? row_offsets, float scale, float softcap, "
    "float dropout_p, Tensor? dropout_seed, str engine"
)  # :meth:`flashlib.AttentionSpec.numbers`
_LIBRARY = torch.library.Library("flashlib", "FRAGMENT")
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_NUMBERS}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
    f"{_NUMBERS}) -> (Tensor, Tensor, Tensor)"
)
for _name, _schema in {
    "attention_forward": _FORWARD, "forward_pass": _FORWARD, "attention_backward": _BACKWARD, "backward_pass": _BACKWARD,
}.items():  # fmt: skip
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
attention_forward = torch.ops.flashlib.attention_forward.default
attention_backward = torch.ops.flashlib.attention_backward.default
_forward_pass = torch.ops.flashlib.forward_pass.default
_backward_pass = torch.ops.flashlib.backward_pass.default


def _forward(q, k, v, *numbers_and_engine):
    """``(out, lse)`` of one attention problem."""
    *numbers, engine = numbers_and_engine
    return engine_named(engine).forward(q, k, v, numbers)


def _backward(q, k, v, out, lse, grad_out, grad_lse, *numbers_and_engine):
    """``(dq, dk, dv)`` from the saved ``out`` and ``lse`` and their gradients."""
    *numbers, engine = numbers_and_engine
    return engine_named(engine).backward(q, k, v, out, lse, grad_out, grad_lse, numbers)


_LIBRARY.impl("forward_pass", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("backward_pass", _backward, "CompositeExplicitAutograd")
# Where autograd is off altogether, as in inference mode.
_LIBRARY.impl("attention_forward", lambda *arguments: _forward_pass(*arguments), "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", lambda *arguments: _backward_pass(*arguments), "CompositeExplicitAutograd")


def _fake_forward(q, k, v, *numbers_and_engine):
    return engine_named(numbers_and_engine[-1]).empty_results(q, v)


def _fake_backward(q, k, v, out, lse, grad_out, grad_lse, *numbers_and_engine):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


for _name, _fake in {
    "attention_forward": _fake_forward, "forward_pass": _fake_forward, "attention_backward": _fake_backward, "backward_pass": _fake_backward,
}.items():  # fmt: skip
    torch.library.register_fake(f"flashlib::{_name}", _fake, lib=_LIBRARY)


def _is_differentiated(tensors) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


class _Forward(torch.autograd.Function):
    """``attention_forward`` of what is differentiated."""

    @staticmethod
    def forward(ctx: Any, q, k, v, *numbers_and_engine):
        out, lse = _forward_pass(q, k, v, *numbers_and_engine)
        *numbers, ctx.engine = numbers_and_engine
        ctx.save_for_backward(q, k, v, out, lse, *saved_numbers(ctx, numbers))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out, grad_lse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        numbers = restored_numbers(ctx, tensors)
        nothing = (None,) * (len(numbers) + 1)
        if grad_out is None and grad_lse is None:
            return None, None, None, *nothing
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return *attention_backward(q, k, v, out, lse, grad_out, grad_lse, *numbers, ctx.engine), *nothing


class _Backward(torch.autograd.Function):
    """``attention_backward`` of what is differentiated: it refuses to be, where somebody asks for it."""

    @staticmethod
    def forward(ctx: Any, *arguments):
        ctx.engine = arguments[-1]
        return _backward_pass(*arguments)

    @staticmethod
    def backward(ctx: Any, *_):
        raise no_second_derivative(name_of(engine_named(ctx.engine)))


def _differentiable_forward(*arguments):
    return _Forward.apply(*arguments) if _is_differentiated(arguments[:3]) else _forward_pass(*arguments)


def _differentiable_backward(*arguments):
    return _Backward.apply(*arguments) if _is_differentiated(arguments[:7]) else _backward_pass(*arguments)


_LIBRARY.impl("attention_forward", _differentiable_forward, "Autograd")
_LIBRARY.impl("attention_backward", _differentiable_backward, "Autograd")


@partial(torch.library.register_vmap, "flashlib::attention_forward", lib=_LIBRARY)
def _(info, in_dims, q, k, v, *numbers_and_engine):
    *numbers, engine = numbers_and_engine
    together = folded(info.batch_size, in_dims[:3], (q, k, v))
    batch = together[0].shape[0] // info.batch_size
    results = attention_forward(*together, *folded_numbers(info.batch_size, batch, in_dims[3:-1], numbers), engine)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)


@partial(torch.library.register_vmap, "flashlib::attention_backward", lib=_LIBRARY)
def _(info, in_dims, q, k, v, out, lse, grad_out, grad_lse, *numbers_and_engine):
    *numbers, engine = numbers_and_engine
    together = folded(info.batch_size, in_dims[:7], (q, k, v, out, lse, grad_out, grad_lse))
    batch = together[0].shape[0] // info.batch_size
    results = attention_backward(*together, *folded_numbers(info.batch_size, batch, in_dims[7:-1], numbers), engine)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)
