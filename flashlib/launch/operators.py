"""Our attention as PyTorch operators, ``torch.ops.flashlib.*``: what torch.compile, torch.export, meta and fake tensors see.

An operator has a schema of plain types, a fake version that only says what comes out (so that a compiler can trace through
it), a gradient, which is another operator, and a rule for ``vmap``. Which engine computes it is an argument: its ``str``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.launch.engines import engine_named, name_of, no_second_derivative
from flashlib.launch.folding import folded, folded_numbers
from flashlib.spec import AttentionSpec

__all__ = ["attention_backward", "attention_forward"]


@torch.library.custom_op("flashlib::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, left: int | None, right: int | None,
    alibi_slopes: Tensor | None, row_offsets: Tensor | None, scale: float, softcap: float, dropout_p: float,
    dropout_seed: Tensor | None, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` of one attention problem; arguments between v and engine as :meth:`flashlib.AttentionSpec.numbers`."""
    numbers = (start, stop, left, right, alibi_slopes, row_offsets, scale, softcap, dropout_p, dropout_seed)
    return engine_named(engine).forward(q, k, v, AttentionSpec.from_numbers(q, k, v, *numbers))


@attention_forward.register_fake
def _(q, k, v, *numbers_and_engine):
    *numbers, engine = numbers_and_engine
    return engine_named(engine).empty_results(q, v, AttentionSpec.from_numbers(q, k, v, *numbers))


@torch.library.custom_op("flashlib::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    start: Tensor | None, stop: Tensor | None, left: int | None, right: int | None, alibi_slopes: Tensor | None,
    row_offsets: Tensor | None, scale: float, softcap: float, dropout_p: float, dropout_seed: Tensor | None, engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dq, dk, dv)`` from the saved ``out`` and ``lse`` and their gradients."""
    numbers = (start, stop, left, right, alibi_slopes, row_offsets, scale, softcap, dropout_p, dropout_seed)
    spec = AttentionSpec.from_numbers(q, k, v, *numbers)
    return engine_named(engine).backward(q, k, v, out, lse, grad_out, grad_lse, spec)


@attention_backward.register_fake
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


attention_forward.register_autograd(_gradient, setup_context=_save)


def _keep_engine(ctx, inputs, output):
    ctx.engine, ctx.count = inputs[-1], len(inputs)


def _refuse(ctx, *_):
    raise no_second_derivative(name_of(engine_named(ctx.engine)))


attention_backward.register_autograd(_refuse, setup_context=_keep_engine)


@attention_forward.register_vmap
def _(info, in_dims, q, k, v, *numbers_and_engine):
    *numbers, engine = numbers_and_engine
    together = folded(info.batch_size, in_dims[:3], (q, k, v))
    batch = together[0].shape[0] // info.batch_size
    results = attention_forward(*together, *folded_numbers(info.batch_size, batch, in_dims[3:-1], numbers), engine)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)


@attention_backward.register_vmap
def _(info, in_dims, q, k, v, out, lse, grad_out, grad_lse, *numbers_and_engine):
    *numbers, engine = numbers_and_engine
    together = folded(info.batch_size, in_dims[:7], (q, k, v, out, lse, grad_out, grad_lse))
    batch = together[0].shape[0] // info.batch_size
    results = attention_backward(*together, *folded_numbers(info.batch_size, batch, in_dims[7:-1], numbers), engine)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)
