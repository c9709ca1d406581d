"""How memory and time grow with the length of the sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.measure.racing.timing import time_call

__all__ = ["memory_wall", "peak_bytes"]

Inputs = tuple[Tensor, Tensor, Tensor]


def memory_wall(
    inputs: Callable[[int], Inputs],
    lengths: Iterable[int],
    backends: Iterable[str],
    *,
    causal: bool = True,
    limit_bytes: int | None = None,
    budget_s: float = 0.3,
) -> list[dict]:
    """Run attention on longer and longer sequences and note time and memory, until a backend hits the wall.

    Args:
        inputs: gives q, k, v ``[B, H, N, D]`` for a length N.
        lengths: the N to try, ascending.
        backends: names for :func:`flashlib.attention`.
        limit_bytes: a CPU has no wall of its own that is safe to run into: stop a backend before a length whose peak, going
            by its last two, would pass this. None for a GPU, where memory really ends.
        budget_s: about how long to time each point.

    Returns:
        one row per point: ``backend``, ``tokens``, ``peak_bytes`` (made during the call, inputs not counted), ``ms``, and
        ``wall``: False, or True for the length that did not fit (its ``peak_bytes`` and ``ms`` are None).

    Raises:
        ValueError: there is no length, or one below 1, or no backend of a given name.
    """
    rows, lengths = [], sorted(lengths)
    if not lengths or lengths[0] < 1:
        raise ValueError(f"lengths must be one or more lengths of at least 1; got {lengths}")
    for backend in backends:
        points: list[dict] = []
        for tokens in lengths:
            if limit_bytes is not None and _predicted_bytes(points, tokens) > limit_bytes:
                point = {"peak_bytes": None, "ms": None, "wall": True}
            else:
                point = _one_point(inputs(tokens), backend, causal, budget_s)
            points.append({"backend": backend, "tokens": tokens, **point})
            if point["wall"]:
                break
        rows += points
    return rows


def _predicted_bytes(points: list[dict], tokens: int) -> float:
    """The next peak, continuing the last two as a power of the length."""
    if len(points) < 2:
        return 0.0
    (before, last) = points[-2:]
    exponent = math.log(last["peak_bytes"] / before["peak_bytes"]) / math.log(last["tokens"] / before["tokens"])
    return last["peak_bytes"] * (tokens / last["tokens"]) ** exponent


def _one_point(qkv: Inputs, backend: str, causal: bool, budget_s: float) -> dict:
    device = qkv[0].device

    def call():
        return attention(*qkv, causal=causal, backend=backend)

    try:
        peak = peak_bytes(call, device)
        return {"peak_bytes": peak, "ms": time_call(call, device=device, budget_s=budget_s).median_ms, "wall": False}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"peak_bytes": None, "ms": None, "wall": True}


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes alive at once in tensors made during the call.

    On CUDA this is the allocator's own count; on a CPU, that of :class:`flashlib.measure.counting.meter.TrafficMeter`, which sees every
    tensor but not the scratch memory inside a fused operator.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from flashlib.measure.counting.meter import TrafficMeter

    with TrafficMeter() as meter:
        call()
    return meter.peak_bytes
