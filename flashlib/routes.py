"""What :func:`flashlib.attention` does with a class of calls that it has seen before: no checks, no choice, straight to the plan.

Whether arguments fit together, which backend takes them and with which tiles depends on the class of a call alone: on shapes, strides, dtypes, device,
on the mask and the options, and on the configuration. The first call of a class is checked, and finds its backend; if that is our kernels', its
route is kept. The next one pays for its key, the allocation of what it returns, and the launch.

A call takes no route where something stands between it and its tensors: a tracer, a transform of torch.func, a mode that watches operators, a subclass
of tensors, autocast, another current device. Nor does one whose mask holds tensors, or that drops weights.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashlib.config import FlashAttentionConfig
from flashlib.engines import TritonEngine, differentiable_gradients
from flashlib.launch.decode import DecodeOptions, best_decode_launches
from flashlib.launch.options import KernelOptions, aligned, readable
from flashlib.launch.plans import MOST_PLANS, Plan, launches_are_watched, plan_for, plans_are_possible
from flashlib.launch.run import best_backward_launches, best_forward_launches, launch_backward
from flashlib.masks import Mask, Window
from flashlib.spec import AttentionSpec
from flashlib.values import values_are_asked_for

__all__ = ["decode_key", "find_route", "keep_decode_route", "keep_route", "route_key"]

_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (float, int, type(None))

_COUNTS = (int, type(None))

_routes: dict[tuple, Route | DecodeRoute] = {}
_lock = threading.Lock()


def route_key(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, scale: float | None, softcap: float, alibi_slopes: Tensor | None,
    return_lse: bool, backend: str, config: FlashAttentionConfig,
) -> tuple | None:  # fmt: skip
    """The class of a call; None if calls like it take no route."""
    if not (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and q.is_cuda
        and plans_are_possible()
        and _nothing_between()
        and not values_are_asked_for()
        and (mask is None or isinstance(mask, Window))
        and (causal is True or causal is False)
        and type(scale) in _NUMBERS
        and type(softcap) in _NUMBERS
    ):
        return None
    band = slopes = None
    if mask is not None:
        if isinstance(mask.offset, Tensor):
            return None
        band = (mask.left, mask.right, mask.offset)
    device = q.get_device()
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
    if alibi_slopes is not None:
        if type(alibi_slopes) is not Tensor or alibi_slopes.requires_grad or not alibi_slopes.is_contiguous():
            return None
        slopes = (alibi_slopes.shape, alibi_slopes.dtype, alibi_slopes.get_device())
        addresses |= alibi_slopes.data_ptr()
    if addresses & 15 or device != torch._C._cuda_getDevice():
        return None
    needs_grad = (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()
    return (
        q.shape, q.stride(), q.dtype, device, k.shape, k.stride(), k.dtype, k.get_device(), v.shape, v.stride(), v.dtype, v.get_device(),
        needs_grad, band, causal, scale, softcap, slopes, return_lse, backend, id(config),
    )  # fmt: skip


def _nothing_between() -> bool:
    """Whether PyTorch would hand operators straight to the device: no mode, no transform, no tracer, no autocast, no tangents."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cuda")
        and not launches_are_watched()
    )


def find_route(key: tuple | None) -> Route | DecodeRoute | None:
    """The route of a class of calls, if one was kept."""
    return _routes.get(key)


def keep_route(key: tuple, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, config: FlashAttentionConfig, returns_lse: bool) -> None:  # fmt: skip
    """Keep the route of a call that our kernels have just run, if it has one."""
    numbers = spec.numbers()
    options = KernelOptions.from_numbers(*numbers, config.triton.fp32_precision, config.triton.autotune)
    if options.start is not None or any(aligned(x) is not x for x in (q, k, v)):
        return
    plan = plan_for(best_forward_launches, (q, k, v), options)
    if plan is None:
        return
    engine = TritonEngine(config.triton.fp32_precision, config.triton.autotune)
    _keep(key, Route(plan, options, engine, config, spec.needs_grad, returns_lse))


def decode_key(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, causal: bool, window: tuple | None,
    scale: float | None, softcap: float, num_splits: int, split_size: int | None, backend: str, config: FlashAttentionConfig,
) -> tuple | None:  # fmt: skip
    """The same of a call of :func:`flashlib.inference.decode_attention`."""
    if not (
        type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and q.is_cuda
        and plans_are_possible()
        and _nothing_between()
        and not values_are_asked_for()
        and (causal is True or causal is False)
        and type(scale) in _NUMBERS
        and type(softcap) in _NUMBERS
        and type(num_splits) is int
        and type(split_size) in _COUNTS
        and (window is None or (type(window) is tuple and all(type(width) in _COUNTS for width in window)))
        and not ((q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled())
    ):
        return None
    device, addresses, others = q.get_device(), q.data_ptr() | k.data_ptr() | v.data_ptr(), ()
    for x in (lengths, block_table):
        if x is not None:
            if type(x) is not Tensor:
                return None
            addresses |= x.data_ptr()
            others += (x.shape, x.stride(), x.dtype, x.get_device())
        else:
            others += (None,)
    if addresses & 15 or device != torch._C._cuda_getDevice():
        return None
    return (
        q.shape, q.stride(), q.dtype, device, k.shape, k.stride(), k.dtype, k.get_device(), v.shape, v.stride(), v.dtype, v.get_device(),
        *others, causal, window, scale, softcap, num_splits, split_size, backend, id(config),
    )  # fmt: skip


def keep_decode_route(
    key: tuple, q: Tensor, k: Tensor, v: Tensor, options: DecodeOptions, config: FlashAttentionConfig
) -> None:
    """Keep the route of a decoding step that our kernels have just run, if it has one."""
    if all(readable(x) is x for x in (q, k, v)):
        plan = plan_for(best_decode_launches, (q, k, v), options)
        if plan is not None:
            _keep(key, DecodeRoute(plan, config))


def _keep(key: tuple, route: Route | DecodeRoute) -> None:
    with _lock:
        while len(_routes) >= MOST_PLANS:
            _routes.pop(next(iter(_routes)))
        _routes[key] = route


@dataclass(eq=False)
class DecodeRoute:
    """The plan of a class of decoding steps."""

    plan: Plan
    config: FlashAttentionConfig

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, returns_lse: bool
    ):
        tensors = [q, k, v]
        if lengths is not None:
            tensors.append(lengths)
        if block_table is not None:
            tensors.append(block_table)
        return tuple(self.plan.run(tensors)) if returns_lse else self.plan.run_first(tensors)


@dataclass(eq=False)
class Route:
    """The plans of a class of calls. It keeps the configuration, by whose identity its key goes, alive.

    Attributes:
        options: with the slopes of the call that it was made for, in whose place each call puts its own.
        backward: plans of the gradients, by the strides of what they are made from.
    """

    plan: Plan
    options: KernelOptions
    engine: TritonEngine
    config: FlashAttentionConfig
    needs_grad: bool
    returns_lse: bool
    backward: dict[tuple, Plan] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        tensors = (q, k, v) if alibi_slopes is None else (q, k, v, alibi_slopes)
        if self.needs_grad:
            return _apply(self, *tensors)
        if self.returns_lse:
            return tuple(self.plan.run(tensors))
        return self.plan.run_first(tensors)

    def gradients(self, q, k, v, out, lse, grad_out, grad_lse, slopes: list[Tensor]) -> list[Tensor]:
        """``[dq, dk, dv]``."""
        tensors = [q, k, v, out, grad_out, lse] if grad_lse is None else [q, k, v, out, grad_out, lse, grad_lse]
        at = tuple([x.stride() for x in tensors])
        plan = self.backward.get(at)
        if plan is not None and not grad_out.data_ptr() & 15 and not q.data_ptr() & 15:
            return plan.run(tensors + slopes)
        options = self.options.with_tensors(x if x.dim() > 1 else x[None] for x in slopes)
        if all(aligned(x) is x for x in tensors[:5]) and all(x.is_contiguous() for x in tensors[5:]):
            plan = plan_for(best_backward_launches, tensors, options)
            if plan is not None and len(self.backward) < MOST_PLANS:
                self.backward[at] = plan
        return launch_backward(q, k, v, out, lse, grad_out, grad_lse, options)


class _Planned(torch.autograd.Function):
    """``(route, q, k, v, slopes if any) -> out``, or ``(out, lse)`` where the route returns it."""

    @staticmethod
    def forward(ctx: Any, route: Route, *tensors: Tensor):
        out, lse = route.plan.run(tensors)
        ctx.route = route
        ctx.save_for_backward(out, lse, *tensors)
        if not route.returns_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None):
        out, lse, q, k, v, *slopes = ctx.saved_tensors
        nothing = (None,) * len(slopes)
        if grad_out is None:
            if grad_lse is None:
                return None, None, None, None, *nothing
            grad_out = torch.zeros_like(out)
        route = ctx.route
        plain = type(grad_out) is Tensor and torch._C._functorch.peek_interpreter_stack() is None
        if plain and not torch.is_grad_enabled() and not launches_are_watched():
            gradients = route.gradients(q, k, v, out, lse, grad_out, grad_lse, slopes)
        else:  # what differentiates or maps this must find in it what it knows
            options = route.options.with_tensors(x if x.dim() > 1 else x[None] for x in slopes)
            gradients = differentiable_gradients(q, k, v, out, lse, grad_out, grad_lse, route.engine, options.numbers())
        return None, *gradients, *nothing


# Not Function.apply, which first asks whether a transform is open: no route is taken inside of one.
_apply = super(torch.autograd.Function, _Planned).apply
