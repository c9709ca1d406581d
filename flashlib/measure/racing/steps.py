"""Naive attention taken apart: what each of its steps computes, moves and costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.measure.racing.timing import time_call
from flashlib.spec import AttentionSpec

__all__ = ["FUSED", "naive_steps"]

FUSED = "fused"
SOFTMAX_FLOPS = 5  # per score: maximum, subtraction, exponential, sum, division; an exponential counts as one

Step = tuple[str, int, Callable[[Tensor | None], Tensor]]


def naive_steps(
    q: Tensor, k: Tensor, v: Tensor, *, fused: str = "auto", budget_s: float = 0.2
) -> tuple[list[dict], Tensor]:
    """Run causal attention one textbook step at a time, and then as one fused call.

    The steps are ``S = Q K^T``, its scaling, its mask, ``P = softmax(S)`` and ``O = P V``. Each writes its result to memory,
    where the next one reads it.

    Args:
        q, k, v: ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]``, ``[B, Hkv, Sk, Dv]``.
        fused: the backend of the last row.
        budget_s: about how long to time each step.

    Returns:
        ``(rows, out)``. One row per step, and one named :data:`FUSED`: ``step``; ``flops``; ``bytes``, read and written by the
        operation as :class:`flashlib.measure.TrafficMeter` counts them; ``ms``. The steps compute hidden scores too and count
        them; the fused call does not. out ``[B, Hq, Sq, Dv]`` is what the steps gave.

    Raises:
        TypeError, ValueError: as :meth:`flashlib.AttentionSpec.from_tensors`.
    """
    spec = AttentionSpec.from_tensors(q, k, v, causal=True)
    rows: list[dict] = []
    x: Any = None
    for name, flops, step in _textbook(q, k, v, spec):
        row, x = _measured(name, flops, partial(step, x), spec, budget_s)
        rows.append(row)
    visible = spec.batch * spec.q_heads * spec.intervals.visible_pairs()
    flops = visible * (2 * spec.head_dim + SOFTMAX_FLOPS + 2 * spec.v_head_dim)
    whole, _ = _measured(FUSED, flops, partial(attention, q, k, v, causal=True, backend=fused), spec, budget_s)
    return [*rows, whole], x


def _textbook(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> list[Step]:
    """(name, FLOPs, function of the step before's result)."""
    k, v = (x.repeat_interleave(spec.group_size, dim=1) for x in (k, v))
    hidden = ~spec.intervals.dense()[:, None]
    scores = spec.batch * spec.q_heads * spec.q_len * spec.kv_len
    return [
        ("S = Q Kᵀ", 2 * spec.head_dim * scores, lambda _: q @ k.mT),
        ("scale S", scores, lambda s: s * spec.scale),
        ("mask S", 0, lambda s: s.masked_fill(hidden, float("-inf"))),
        ("P = softmax(S)", SOFTMAX_FLOPS * scores, lambda s: torch.softmax(s, dim=-1)),
        ("O = P V", 2 * spec.v_head_dim * scores, lambda p: p @ v),
    ]


def _measured(name: str, flops: int, call: Callable[[], Any], spec: AttentionSpec, budget_s: float):
    from flashlib.measure.counting.meter import TrafficMeter

    with TrafficMeter() as meter:
        result = call()
    timing = time_call(call, device=spec.device, budget_s=budget_s)
    moved = meter.bytes_read.total() + meter.bytes_written.total()
    return {"step": name, "flops": flops, "bytes": moved, "ms": timing.median_ms}, result
