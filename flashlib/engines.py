"""Our own implementations, the tiled algorithm and the kernels, as autograd, torch.func, torch.compile and torch.export see them.

An engine (:mod:`flashlib.launch.engines`) computes a forward and a backward pass from tensors and plain numbers. Around it stand, once for all:

* in eager mode one ``torch.autograd.Function``, which knows backward, forward mode (where the engine does), and ``vmap``: the mapped dimension
  becomes part of the batch;
* under a tracer, or for tensors without data, one operator (:mod:`flashlib.launch.operators`), which a graph can hold and which says the shapes of its results.

A second derivative is refused in plain words where somebody asks for it, and not before: ``create_graph=True`` alone is no reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.autocast import autocast_off
from flashlib.launch.engines import Engine, name_of, no_second_derivative
from flashlib.launch.folding import folded, folded_numbers, restored_numbers, saved_numbers
from flashlib.spec import AttentionSpec
from flashlib.values import has_data

__all__ = ["differentiable_gradients", "refuse_second_derivative", "run_engine"]


def run_engine(engine: Engine, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a checked problem, on the autograd graph."""
    numbers = spec.numbers()
    with autocast_off(spec.device):
        if not has_data(q, k, v):
            if spec.has_tangents:
                raise NotImplementedError(
                    f"a forward-mode derivative cannot be traced through {name_of(engine)} attention; {_FORWARD_MODE}"
                )
            from flashlib.launch.operators import attention_forward  # registering operators imports PyTorch's compiler

            return attention_forward(q, k, v, *numbers, str(engine))
        return _Attention.apply(q, k, v, engine, *numbers)


class _Attention(torch.autograd.Function):
    """``(q, k, v, engine, *numbers) -> (out, lse)``; numbers as :meth:`flashlib.AttentionSpec.numbers`."""

    @staticmethod
    def forward(q, k, v, engine, *numbers):
        return engine.forward(q, k, v, numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, ctx.engine, *numbers = inputs
        tensors = (q, k, v, *output, *saved_numbers(ctx, numbers))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, numbers = _restored(ctx)
        nothing = (None,) * (1 + len(numbers))
        if grad_out is None and grad_lse is None:
            return None, None, None, *nothing
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return *differentiable_gradients(q, k, v, out, lse, grad_out, grad_lse, ctx.engine, tuple(numbers)), *nothing

    @staticmethod
    def jvp(ctx, dq, dk, dv, *_):
        q, k, v, out, lse, numbers = _restored(ctx)
        jvp = getattr(ctx.engine, "jvp", None)
        if jvp is None:
            raise NotImplementedError(
                f"{name_of(ctx.engine)} attention has no forward-mode derivative; {_FORWARD_MODE}"
            )
        return jvp(q, k, v, out, lse, (dq, dk, dv), numbers)

    @staticmethod
    def vmap(info, in_dims, q, k, v, engine, *numbers):
        together = folded(info.batch_size, in_dims[:3], (q, k, v))
        batch = together[0].shape[0] // info.batch_size
        results = _Attention.apply(*together, engine, *folded_numbers(info.batch_size, batch, in_dims[4:], numbers))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)


class _Gradients(torch.autograd.Function):
    """``(q, k, v, out, lse, grad_out, grad_lse, engine, *numbers) -> (dq, dk, dv)``."""

    @staticmethod
    def forward(q, k, v, out, lse, grad_out, grad_lse, engine, *numbers):
        return engine.backward(q, k, v, out, lse, grad_out, grad_lse, numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.engine = inputs[7]

    @staticmethod
    def backward(ctx, *_):
        raise no_second_derivative(name_of(ctx.engine))

    @staticmethod
    def jvp(ctx, *_):
        raise no_second_derivative(name_of(ctx.engine))

    @staticmethod
    def vmap(info, in_dims, q, k, v, out, lse, grad_out, grad_lse, engine, *numbers):
        together = folded(info.batch_size, in_dims[:7], (q, k, v, out, lse, grad_out, grad_lse))
        batch = together[0].shape[0] // info.batch_size
        results = _Gradients.apply(*together, engine, *folded_numbers(info.batch_size, batch, in_dims[8:], numbers))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)


def differentiable_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, engine: Engine, numbers: tuple,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dq, dk, dv)`` as a node of its own, which knows ``vmap`` and refuses to be differentiated; ``numbers`` as of the forward."""
    with autocast_off(q.device):
        return _Gradients.apply(q, k, v, out, lse, grad_out, grad_lse, engine, *numbers)


_FORWARD_MODE = "the backends 'tiled', 'reference' and 'torch_sdpa_math' have one"


def _restored(ctx) -> tuple:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    return q, k, v, out, lse, restored_numbers(ctx, tensors)


def refuse_second_derivative(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, whose gradients say in our words that they cannot be differentiated again: for kernels that are not ours.

    What torch.compile has compiled cannot be differentiated twice whatever it is, and says so itself.
    """
    if torch.compiler.is_compiling():
        return tensors
    return tuple(_Once.apply(x, name) if x.requires_grad else x for x in tensors)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, name):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _OnceGradient.apply(grad, ctx.name), None


class _OnceGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, name):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, _):
        raise no_second_derivative(ctx.name)
