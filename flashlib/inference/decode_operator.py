"""Decoding in plain PyTorch as an operator, ``torch.ops.flashlib.decode_torch``: what torch.compile, torch.export, meta and fake tensors see of it.

The algorithm asks the host how long each request is. A tracer has no lengths to read, so it sees one operator, and the lengths are read when it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.inference.decode import Problem, run_torch

__all__ = ["decode_torch", "decode_torch_backward"]


@torch.library.custom_op("flashlib::decode_torch", mutates_args=())
def decode_torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, left: int | None, right: int | None,
    scale: float, softcap: float, num_splits: int, split_size: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` of one decoding step; arguments as the attributes of :class:`flashlib.inference.decode.Problem`."""
    return run_torch(Problem(q, k, v, lengths, block_table, left, right, scale, softcap, num_splits, split_size))


@decode_torch.register_fake
def _(q, k, v, *_):
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulate)


@torch.library.custom_op("flashlib::decode_torch_backward", mutates_args=())
def decode_torch_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
    block_table: Tensor | None, left: int | None, right: int | None, scale: float, softcap: float, num_splits: int,
    split_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dq, dk, dv)``. The forward pass is run again, this time with its graph."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        results = run_torch(Problem(*inputs, lengths, block_table, left, right, scale, softcap, num_splits, split_size))
        wanted = [(x, grad) for x, grad in zip(results, (grad_out, grad_lse), strict=True) if grad is not None]
        gradients = torch.autograd.grad(
            [x for x, _ in wanted], inputs, [grad for _, grad in wanted], materialize_grads=True
        )
    return tuple(gradient.contiguous() for gradient in gradients)


@decode_torch_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_out, grad_lse):
    nothing = (None,) * (2 + len(ctx.numbers))
    if grad_out is None and grad_lse is None:
        return None, None, None, *nothing
    return *decode_torch_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers), *nothing


decode_torch.register_autograd(_gradient, setup_context=_save)
