"""Decoding as operators, ``torch.ops.flashlib.decode_torch`` and ``decode_triton``: what torch.compile, torch.export, meta and fake tensors see of it.

The algorithm in plain PyTorch asks the host how long each request is, and the kernels are launched in as many splits as the sizes call for. A tracer has
no lengths to read, and sizes that may vary. So it sees one operator, and both are looked at when it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.inference.decode_problem import Problem, run_torch, run_triton
from flashlib.launch.engines import TiledEngine
from flashlib.launch.operators import attention_backward
from flashlib.tiled import Tiling

__all__ = ["decode_torch", "decode_triton"]


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


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.numbers = inputs[5:]
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_out, grad_lse):
    """That of attention over the keys of each request, which pages are first copied for."""
    nothing = (None,) * (2 + len(ctx.numbers))
    if grad_out is None and grad_lse is None:
        return None, None, None, *nothing
    q, k, v, lengths, block_table, out, lse = ctx.saved_tensors
    problem = Problem(q, k, v, lengths, block_table, *ctx.numbers)
    start, stop = problem.intervals()
    if block_table is not None:
        key = torch.arange(problem.capacity, device=q.device)
        is_seen = (key >= start[:, :1]) & (key < stop[:, -1:])  # rows see intervals that only move on
        page = torch.where(is_seen, block_table[:, key // k.shape[2]].long(), 0)
        slot = (key % k.shape[2]).expand_as(page)
        memory, (k, v) = (k, v), (x[page, :, slot].transpose(1, 2) for x in (k, v))
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    numbers = (start, stop, None, None, None, None, problem.scale, problem.softcap, 0.0, None)
    dq, dk, dv = attention_backward(q, k, v, out, lse, grad_out, grad_lse, *numbers, str(TiledEngine(Tiling())))
    if block_table is not None:
        dk, dv = (_scattered(x, page, slot, grad) for x, grad in zip(memory, (dk, dv), strict=True))
    return dq, dk, dv, *nothing


def _scattered(memory: Tensor, page: Tensor, slot: Tensor, gradient: Tensor) -> Tensor:
    """``[pages, Hkv, page_size, D]`` of ``[B, Hkv, keys, D]``: a page that several requests share gets the gradients of all."""
    by_slot = memory.new_zeros(memory.shape[0], memory.shape[2], memory.shape[1], memory.shape[3])
    return by_slot.index_put((page, slot), gradient.transpose(1, 2), accumulate=True).transpose(1, 2)


decode_torch.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("flashlib::decode_triton", mutates_args=())
def decode_triton(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, left: int | None, right: int | None,
    scale: float, softcap: float, num_splits: int, split_size: int | None, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by our kernels, which have no gradient; ``precision`` of fp32 products."""
    problem = Problem(q, k, v, lengths, block_table, left, right, scale, softcap, num_splits, split_size)
    return run_triton(problem, precision)


@decode_triton.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
