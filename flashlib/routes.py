"""What :func:`flashlib.attention` does with a class of calls that it has seen before: no checks, no choice, straight to the plan.

Whether arguments fit together, which backend takes them and with which tiles depends on the class of a call alone: on shapes, strides, dtypes, device,
on the mask and the options, and on the configuration. The first call of a class is checked, and finds its backend; if that is our kernels', its
route is kept. The next one pays for its key, the allocation of what it returns, and the launch. A class that differs from a known one in its lengths
alone is not checked again either: it has the route of its relative, with another plan.

A call takes no route where something stands between it and its tensors: a tracer, a transform of torch.func, a mode that watches operators, a subclass
of tensors, autocast, another current device. Nor does one that drops weights, or whose mask is not what one kernel lays out
(:mod:`flashlib.launch.rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashlib.config import FlashAttentionConfig
from flashlib.engines import differentiable_gradients
from flashlib.launch import packets
from flashlib.launch.decode import DecodeOptions, best_decode_launches
from flashlib.launch.engines import TritonEngine
from flashlib.launch.options import KernelOptions, aligned, begins_at_16_bytes, readable
from flashlib.launch.plans import (
    MOST_PLANS,
    Plan,
    keep,
    launches_are_watched,
    plan_by_recipe,
    plan_for,
    plans_are_possible,
)
from flashlib.launch.rules import RuledOptions, fits, packed_rule, rule_of, ruled_forward_launches, ruled_launches_kept
from flashlib.launch.run import best_backward_launches, best_forward_launches, launch_backward
from flashlib.masks import Mask, Window
from flashlib.spec import AttentionSpec
from flashlib.values import values_are_asked_for

__all__ = [
    "decode_key",
    "find_route",
    "keep_decode_route",
    "keep_packed_route",
    "new_route",
    "packed_key",
    "related_route",
    "route_key",
]

_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (float, int, type(None))

_COUNTS = (int, type(None))

_routes: dict[tuple | None, Route | DecodeRoute | PackedRoute] = {}
_relatives: dict[tuple, Route] = {}  # by what is left of a key without lengths and strides


def route_key(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, scale: float | None, softcap: float, alibi_slopes: Tensor | None,
    return_lse: bool, backend: str, config: FlashAttentionConfig,
) -> tuple[tuple | None, list[Tensor]]:  # fmt: skip
    """The class of a call, and what a route is given besides q, k and v: the mask's tensors and the slopes. None for calls that take no route."""
    if not _may_have_route(q, k, v, causal, scale, softcap):
        return None, []
    rule: Any = None
    given: list[Tensor] = []
    if mask is not None:
        if isinstance(mask, Window) and mask.offset is None:
            rule = (mask.left, mask.right)
        else:
            found = rule_of(mask, causal) if isinstance(mask, Mask) and alibi_slopes is None else None
            if found is None:
                return None, []
            rule, given = found
    if alibi_slopes is not None:
        if type(alibi_slopes) is not Tensor or alibi_slopes.requires_grad:
            return None, []
        given = [alibi_slopes]
    has_slopes = alibi_slopes is not None
    return _key(q, k, v, rule, given, (causal, scale, softcap, has_slopes, return_lse, backend, id(config)))


def packed_key(
    q: Tensor, k: Tensor, v: Tensor, ends: list[Tensor], window: tuple[int | None, int | None], scale: float | None, softcap: float,
    config: FlashAttentionConfig,
) -> tuple[tuple | None, list[Tensor]]:  # fmt: skip
    """:func:`route_key` under ``Varlen(*ends) & Window(*window, ...)``, for which no mask need be made.

    Args:
        q, k, v: as :func:`flashlib.attention` takes them; or the packs themselves, ``[tokens, H, D]``, for a route of :func:`keep_packed_route`.
        ends: cumulative lengths of queries and of keys.
    """
    if not _may_have_route(q, k, v, False, scale, softcap) or any(type(x) is not Tensor for x in ends):
        return None, []
    return _key(q, k, v, packed_rule(*window), ends, (False, scale, softcap, False, False, "auto", id(config)))


def _may_have_route(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, softcap: float) -> bool:
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and on_gpu(q)
        and plans_are_possible()
        and _nothing_between()
        and not values_are_asked_for()
        and (causal is True or causal is False)
        and type(scale) in _NUMBERS
        and type(softcap) in _NUMBERS
    )


def _key(
    q: Tensor, k: Tensor, v: Tensor, rule: Any, given: list[Tensor], options: tuple
) -> tuple[tuple | None, list[Tensor]]:
    described = _described((q, k, v, *given), 0)
    if described is None or q.get_device() != _current_device():
        return None, []
    needs_grad = (q.requires_grad or k.requires_grad or v.requires_grad) and _grad_is_on()
    return (described, needs_grad, rule, *options), given


def _described(tensors: tuple[Tensor, ...], without: int) -> bytes | None:
    """Their forms, of the first so many ``without`` lengths and strides; None if one does not begin at a multiple of 16 bytes, or has no address."""
    return packets.needed().describe(tensors, without)


_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_autocast, _grad_is_on = torch.is_autocast_enabled, torch.is_grad_enabled
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


def _nothing_between() -> bool:
    """Whether PyTorch would hand operators straight to the device: no mode, no transform, no tracer, no autocast, no tangents."""
    return (
        _dispatch_modes() == 0
        and _function_modes() == 0
        and _transform() is None
        and _tracing() is None
        and forward_ad._current_level < 0
        and not _autocast("cuda")
        and not launches_are_watched()
    )


on_gpu = attrgetter("is_cuda")


def find_route(key: tuple | None) -> Any:
    """The route of a class of calls, if one was kept."""
    return _routes.get(key)


def new_route(
    key: tuple | None, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, config: FlashAttentionConfig, returns_lse: bool,
    given: list[Tensor],
) -> Route | None:  # fmt: skip
    """The route of a class of calls that our kernels run, which is kept; None if it has none. ``spec``: of the first call, checked."""
    if (
        key is None
        or any(aligned(x) is not x for x in (q, k, v))
        or any(x.get_device() != q.get_device() for x in given)
    ):
        return None
    triton = config.triton
    band = spec.mask.band()
    build: Callable
    planned: KernelOptions | RuledOptions
    if band is not None:
        if not all(x.is_contiguous() for x in given):
            return None
        build, rule = best_forward_launches, None
        planned = options = KernelOptions.from_numbers(*spec.numbers(), triton.fp32_precision, triton.autotune)
        if len(options.tensors()) != len(given):  # slopes by row, which come with where rows sit
            return None
    else:
        found = rule_of(spec.mask, False)
        if found is None or not fits(found[0], given, spec.q_len, spec.kv_len):
            return None
        rule = found[0]
        numbers = (spec.scale, spec.softcap, 0.0, None, triton.fp32_precision, triton.autotune)
        options = KernelOptions(None, None, None, None, None, None, *numbers)
        build = ruled_launches_kept if spec.needs_grad else ruled_forward_launches
        planned = RuledOptions(options, rule, tuple(given))
        options = replace(options, start=_LAID_OUT, stop=_LAID_OUT)
    plan = plan_for(build, (q, k, v), planned)
    if plan is None:
        return None
    engine = TritonEngine(triton.fp32_precision, triton.autotune)
    laid_out = len(given) if band is None else 0
    route = Route(plan, options, engine, config, spec.needs_grad, returns_lse, laid_out, build, planned)
    keep(_routes, key, route, MOST_PLANS)
    if all(x.dim() <= 1 or (x is spec.alibi_slopes and x.dim() == 2) for x in given):  # none has a number for each row
        keep(_relatives, _relation(key, q, k, v, given), route, MOST_PLANS)
    return route


def _relation(key: tuple, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]) -> tuple:
    """A key without lengths and strides."""
    return (_described((q, k, v, *given), 3), *key[1:])


def related_route(key: tuple | None, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]) -> Route | None:
    """The route of a class that differs from a known one in lengths and strides alone, which is kept; None if it has none."""
    if key is None:
        return None
    relative = _relatives.get(_relation(key, q, k, v, given))
    if relative is None or not 0 < k.shape[2] == v.shape[2] or not q.shape[2]:
        return None
    for x in (q, k, v):
        if x.stride(3) != 1 or not begins_at_16_bytes(x):
            return None
    planned = relative.planned.with_tensors(given if relative.laid_out else _slopes(given))
    if relative.laid_out and not fits(planned.rule, given, q.shape[2], k.shape[2]):
        return None
    tensors = (q, k, v)
    plan = plan_by_recipe(relative.build, tensors, planned) or plan_for(relative.build, tensors, planned)
    if plan is None:
        return None
    route = relative.with_plan(plan)
    keep(_routes, key, route, MOST_PLANS)
    return route


def _slopes(given: Iterable[Tensor]) -> Iterable[Tensor]:
    """Slopes have one dimension more in options than the caller may give them."""
    return (x if x.dim() > 1 else x[None] for x in given)


_LAID_OUT = torch.empty(0, device="cpu")  # stands for the intervals that each call lays out


def decode_key(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, causal: bool, window: tuple | None,
    scale: float | None, softcap: float, num_splits: int, split_size: int | None, backend: str, config: FlashAttentionConfig,
) -> tuple | None:  # fmt: skip
    """The same of a call of :func:`flashlib.inference.decode_attention`."""
    if not (
        _may_have_route(q, k, v, causal, scale, softcap)
        and type(num_splits) is int
        and type(split_size) in _COUNTS
        and (window is None or (type(window) is tuple and all(type(width) in _COUNTS for width in window)))
        and not ((q.requires_grad or k.requires_grad or v.requires_grad) and _grad_is_on())
    ):
        return None
    given = [x for x in (lengths, block_table) if x is not None]
    if any(type(x) is not Tensor for x in given):
        return None
    options = (
        lengths is None,
        block_table is None,
        causal,
        window,
        scale,
        softcap,
        num_splits,
        split_size,
        backend,
        id(config),
    )
    return _key(q, k, v, None, given, options)[0]


def keep_decode_route(
    key: tuple, q: Tensor, k: Tensor, v: Tensor, options: DecodeOptions, config: FlashAttentionConfig
) -> None:
    """Keep the route of a decoding step that our kernels have just run, if it has one."""
    if all(readable(x) is x for x in (q, k, v)):
        plan = plan_for(best_decode_launches, (q, k, v), options)
        if plan is not None:
            keep(_routes, key, DecodeRoute(plan, config), MOST_PLANS)


def keep_packed_route(key: tuple | None, route: Route) -> None:
    """Keep, for packs ``[tokens, H, D]`` of a ``key`` of their own, what a route does with views of them, where no gradient is wanted: a kernel is
    told where they begin, and seven views take longer than its launch."""
    (_, heads, tokens, width), (_, by_head, by_token, _), *_ = route.plan.results[0]
    tokens_first = (heads == 1 or by_head == width) and (tokens == 1 or by_token == heads * width)
    if key is not None and not route.needs_grad and tokens_first:
        keep(_routes, key, PackedRoute(route.plan.with_first((tokens, heads, width)), route.config), MOST_PLANS)


@dataclass(eq=False)
class DecodeRoute:
    """The plan of a class of decoding steps."""

    plan: Plan
    config: FlashAttentionConfig

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, returns_lse: bool
    ):
        tensors: tuple[Tensor, ...] = (q, k, v)
        if lengths is not None:
            tensors = (*tensors, lengths)
        if block_table is not None:
            tensors = (*tensors, block_table)
        return tuple(self.plan.run(tensors)) if returns_lse else self.plan.run_first(tensors)


@dataclass(eq=False)
class PackedRoute:
    """The plan of a class of packs without gradients."""

    plan: Plan
    config: FlashAttentionConfig

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]) -> Tensor:
        return self.plan.run_first((q, k, v, *given))


@dataclass(eq=False)
class Route:
    """The plans of a class of calls. It keeps the configuration, by whose identity its key goes, alive.

    Attributes:
        options: those of the backward pass, with tensors of the first call, in whose place each call puts its own.
        laid_out: how many of the tensors that a call gives besides q, k and v are the mask's, of which the forward makes intervals.
        build, planned: from what :attr:`plan` was made.
        backward: plans of the gradients, by the strides of the gradients that come in: all else lies as in every call.
    """

    plan: Plan
    options: KernelOptions
    engine: TritonEngine
    config: FlashAttentionConfig
    needs_grad: bool
    returns_lse: bool
    laid_out: int
    build: Callable
    planned: Any  # KernelOptions or RuledOptions
    backward: dict[tuple, Plan] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        tensors = (q, k, v, *given)
        if self.needs_grad:
            return _apply(self, *tensors)
        if self.returns_lse:
            out, lse = self.plan.run(tensors)
            return out, lse
        return self.plan.run_first(tensors)

    def gradients(self, q, k, v, out, lse, grad_out, grad_lse, more: list[Tensor]) -> Sequence[Tensor]:
        """``dq, dk, dv``; ``more``: the tensors of :attr:`options`."""
        tensors = [q, k, v, out, grad_out, lse] if grad_lse is None else [q, k, v, out, grad_out, lse, grad_lse]
        at = grad_out.stride() if grad_lse is None else (grad_out.stride(), grad_lse.stride())
        plan = self.backward.get(at)
        if plan is not None and not grad_out.data_ptr() & 15 and not launches_are_watched():
            return plan.run((*tensors, *more))
        options = self.with_tensors(more)
        if all(aligned(x) is x for x in tensors[:5]) and all(x.is_contiguous() for x in tensors[5:]):
            plan = plan_for(best_backward_launches, tensors, options)
            if plan is not None and len(self.backward) < MOST_PLANS:
                self.backward[at] = plan
        return launch_backward(q, k, v, out, lse, grad_out, grad_lse, options)

    def with_plan(self, plan: Plan) -> Route:
        """The same for other lengths."""
        same = self.options, self.engine, self.config, self.needs_grad, self.returns_lse, self.laid_out, self.build
        return Route(plan, *same, self.planned)

    def with_tensors(self, more: list[Tensor]) -> KernelOptions:
        """:attr:`options` of one call."""
        return self.options.with_tensors(_slopes(more))


class _Planned(torch.autograd.Function):
    """``(route, q, k, v, what the call gives besides) -> out``, or ``(out, lse)`` where the route returns it."""

    @staticmethod
    def forward(ctx: Any, route: Route, *tensors: Tensor):
        out, lse, *intervals = route.plan.run(tensors)
        ctx.route, ctx.given = route, len(tensors) - 3
        ctx.save_for_backward(out, lse, *tensors[:3], *intervals, *tensors[3 + route.laid_out :])
        if not route.returns_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None):
        out, lse, q, k, v, *more = ctx.saved_tensors
        nothing = (None,) * ctx.given
        if grad_out is None:
            if grad_lse is None:
                return None, None, None, None, *nothing
            grad_out = torch.zeros_like(out)
        route = ctx.route
        if type(grad_out) is Tensor and _transform() is None and not _grad_is_on():
            gradients = route.gradients(q, k, v, out, lse, grad_out, grad_lse, more)
        else:  # what differentiates or maps this must find in it what it knows
            numbers = route.with_tensors(more).numbers()
            gradients = differentiable_gradients(q, k, v, out, lse, grad_out, grad_lse, route.engine, numbers)
        return None, *gradients, *nothing


# Not Function.apply, which first asks whether a transform is open: no route is taken inside of one.
_apply = super(torch.autograd.Function, _Planned).apply
