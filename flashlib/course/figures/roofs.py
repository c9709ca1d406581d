"""Attention calls under the roofs of a device, and estimates against what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flashlib.cost import attention_time, formula
from flashlib.cost.counts import Problem
from flashlib.cost.devices import Device
from flashlib.cost.report import WAITS, draw_roofs
from flashlib.cost.roofs import UNCERTAIN_MEASURED
from flashlib.cost.verdict import Point
from flashlib.course.display import Figure, format_number
from flashlib.course.figures import style

__all__ = ["estimates", "under_roofs"]


def under_roofs(
    calls: Mapping[str, tuple[Problem, str]], device: Device, *, title: str = "Attention under the roofs"
) -> Figure:
    """Calls as points: the FLOP/s that their visible pairs need, over FLOPs for each byte that must cross memory.

    If there is one call, the roofs that bind it are drawn thick.

    Args:
        calls: name to a problem and its direction, ``"forward"`` or ``"decode"``.

    Raises:
        ValueError: there is no call, or our kernels do not run one on the device.
    """
    if not calls:
        raise ValueError("calls must hold at least one call; it is empty")
    points, told = {}, []
    for name, (problem, direction) in calls.items():
        estimate, least = attention_time(problem, device, direction=direction), formula(problem)
        points[name] = (least.products / least.bytes, least.products / estimate.seconds)
        told.append(
            f"{name}: {format_number(points[name][0])} FLOPs a byte, {format_number(points[name][1] / 1e12)} TFLOP/s, "
            f"{format_number(1e3 * estimate.seconds)} ms, waits for {WAITS[estimate.bound]}"
        )
    first = next(iter(calls.values()))[0]
    with style.canvas(height=4.2) as fig:
        ax = fig.add_subplot()
        bound = estimate.bound if len(calls) == 1 else None
        draw_roofs(ax, device, first.dtype, 2 * (first.head_dim + first.v_head_dim), list(points.values()), bound)
        for (name, (x, y)), marker in zip(points.items(), "osD^vP" * 9, strict=False):
            ax.plot(
                [x],
                [y],
                marker,
                markersize=9,
                color=style.INK,
                markerfacecolor=style.PAPER,
                markeredgewidth=2,
                label=name,
            )
        ax.set_title(f"{title}: {device.title}")
        ax.legend(loc="lower right", fontsize=8.5)
        return Figure(fig, alt=f"{title}, {device.title}. {'; '.join(told)}.")


def estimates(
    points: Sequence[Point], *, title: str = "Estimated against measured", source: str | None = None
) -> Figure:
    """Every point with its measured time across and the estimate over it, and the band in which estimates are said to lie.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("points must hold at least one point; it is empty")
    kinds = list(dict.fromkeys(point.kind for point in points))
    with style.canvas(height=4.0) as fig:
        ax = fig.add_subplot()
        low, high = (end(point.measured_ms for point in points) for end in (min, max))
        ax.axhspan(-100 * UNCERTAIN_MEASURED, 100 * UNCERTAIN_MEASURED, color=style.FAINT)
        ax.axhline(0, color=style.SOFT_INK, linewidth=1)
        for kind, color, marker in zip(kinds, style.SERIES * 9, "osD^vP" * 9, strict=False):
            chosen = [point for point in points if point.kind == kind]
            ax.plot([p.measured_ms for p in chosen], [100 * p.error for p in chosen], marker, color=color, label=kind)
        ax.set(xscale="log", xlim=(low / 1.5, high * 1.5), xlabel="measured (ms)", ylabel="estimate is longer by (%)")
        ax.xaxis.set_major_formatter(lambda value, _: format_number(value))
        ax.set_title(title)
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(kinds), borderaxespad=0)
        style.source_note(fig, source)
        inside = sum(abs(point.error) <= UNCERTAIN_MEASURED for point in points)
        ends = [f"{kind}: {100 * min(p.error for p in points if p.kind == kind):+.0f}% to {100 * max(p.error for p in points if p.kind == kind):+.0f}%" for kind in kinds]  # fmt: skip
        alt = f"{title}: {len(points)} points, {inside} within {UNCERTAIN_MEASURED:.0%}. {'; '.join(ends)}."
        return Figure(fig, alt=f"{alt} {source}." if source else alt)
