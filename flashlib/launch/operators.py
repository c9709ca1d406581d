"""Our attention as PyTorch operators, ``torch.ops.flashlib.*``: what torch.compile, torch.export, meta and fake tensors see.

An operator has a schema of plain types, a fake version that only says what comes out (so that a compiler can trace through
it), a gradient, which is another operator, and a rule for ``vmap``. Which engine computes it is an argument: its ``str``.

They are registered with :class:`torch.library.Library`: called by compiled code, those of ``torch.library.custom_op`` take some 8 us longer.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flashlib.launch.engines import engine_named, name_of, no_second_derivative
from flashlib.launch.folding import folded, folded_numbers

__all__ = ["attention_backward", "attention_forward"]


_NUMBERS = (
    "Tensor? start, Tensor? stop, SymInt? left, SymInt? right, Tensor? alibi_slopes, Tensor? row_offsets, float scale, float softcap, "
    "float dropout_p, Tensor? dropout_seed, str engine"
)  # :meth:`flashlib.AttentionSpec.numbers`
_LIBRARY = torch.library.Library("flashlib", "FRAGMENT")
_LIBRARY.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_NUMBERS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
    f"{_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
attention_forward = torch.ops.flashlib.attention_forward.default
attention_backward = torch.ops.flashlib.attention_backward.default


def _forward(q, k, v, *numbers_and_engine):
    """``(out, lse)`` of one attention problem."""
    *numbers, engine = numbers_and_engine
    return engine_named(engine).forward(q, k, v, numbers)


def _backward(q, k, v, out, lse, grad_out, grad_lse, *numbers_and_engine):
    """``(dq, dk, dv)`` from the saved ``out`` and ``lse`` and their gradients."""
    *numbers, engine = numbers_and_engine
    return engine_named(engine).backward(q, k, v, out, lse, grad_out, grad_lse, numbers)


_LIBRARY.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("flashlib::attention_forward", lib=_LIBRARY)
def _(q, k, v, *numbers_and_engine):
    return engine_named(numbers_and_engine[-1]).empty_results(q, v)


@torch.library.register_fake("flashlib::attention_backward", lib=_LIBRARY)
def _(q, k, v, out, lse, grad_out, grad_lse, *numbers_and_engine):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, *numbers, ctx.engine = inputs
    ctx.save_for_backward(q, k, v, *output, *(x for x in numbers if isinstance(x, Tensor)))
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in numbers]
    ctx.tensors_at = [at for at, x in enumerate(numbers) if isinstance(x, Tensor)]
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    numbers = list(ctx.numbers)
    for at, tensor in zip(ctx.tensors_at, tensors, strict=True):
        numbers[at] = tensor
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    gradients = attention_backward(q, k, v, out, lse, grad_out, grad_lse, *numbers, ctx.engine)
    return *gradients, *(None for _ in numbers), None


torch.library.register_autograd("flashlib::attention_forward", _gradient, setup_context=_save, lib=_LIBRARY)


def _keep_engine(ctx, inputs, output):
    ctx.engine, ctx.count = inputs[-1], len(inputs)


def _refuse(ctx, *_):
    raise no_second_derivative(name_of(engine_named(ctx.engine)))


torch.library.register_autograd("flashlib::attention_backward", _refuse, setup_context=_keep_engine, lib=_LIBRARY)


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
