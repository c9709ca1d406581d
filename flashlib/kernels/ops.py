"""The kernels as PyTorch operators, ``torch.ops.flashlib.*``: what autograd, torch.compile and CUDA graphs see.

An operator has a schema of plain types, a fake version that only says what comes out (so that a compiler can trace through
it), and a gradient, which is another operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.kernels.launch import KernelOptions, empty_results
from flashlib.kernels.run import launch_backward, launch_forward

__all__ = ["attention_backward", "attention_forward"]


@torch.library.custom_op("flashlib::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, left: int | None, right: int | None,
    alibi_slopes: Tensor | None, row_offsets: Tensor | None, scale: float, softcap: float, precision: str, autotune: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` of one attention problem; arguments after v as in :class:`~flashlib.kernels.launch.KernelOptions`."""
    options = KernelOptions(start, stop, left, right, alibi_slopes, row_offsets, scale, softcap, precision, autotune)
    return launch_forward(q, k, v, options)


@attention_forward.register_fake
def _(q, k, v, *options):
    return empty_results(q, v)


@torch.library.custom_op("flashlib::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    start: Tensor | None, stop: Tensor | None, left: int | None, right: int | None, alibi_slopes: Tensor | None,
    row_offsets: Tensor | None, scale: float, softcap: float, precision: str, autotune: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dq, dk, dv)`` from the saved ``out`` and ``lse`` and their gradients."""
    options = KernelOptions(start, stop, left, right, alibi_slopes, row_offsets, scale, softcap, precision, autotune)
    return launch_backward(q, k, v, out, lse, grad_out, grad_lse, options)


@attention_backward.register_fake
def _(q, k, v, out, lse, grad_out, grad_lse, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, *options = inputs
    ctx.save_for_backward(q, k, v, *output, *(x for x in options if isinstance(x, Tensor)))
    ctx.options = [None if isinstance(x, Tensor) else x for x in options]
    ctx.tensors_at = [at for at, x in enumerate(options) if isinstance(x, Tensor)]
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = list(ctx.options)
    for at, tensor in zip(ctx.tensors_at, tensors, strict=True):
        options[at] = tensor
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    gradients = attention_backward(q, k, v, out, lse, grad_out, grad_lse, *options)
    return *gradients, *(None for _ in options)


attention_forward.register_autograd(_gradient, setup_context=_save)
