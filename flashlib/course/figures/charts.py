"""Charts of measured and computed numbers: lines, bars, and memory against the size of the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date as Date
from itertools import pairwise

from flashlib.course.display import Figure, format_bytes, format_number
from flashlib.course.figures import style

MEASURED_HERE = "measured here"
_MARKERS = "osD^vP"
_HALO = {"boxstyle": "square,pad=0.1", "facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.85}


def recorded(device: str, date: str | Date) -> str:
    """The source label of numbers that come from a recorded result: "recorded on <device>, <date>"."""
    return f"recorded on {device}, {date}"


def line_chart(
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    source: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    bytes_y: bool = False,
    reference: tuple[str, float] | None = None,
    mark: float | None = None,
    measured_to: float | None = None,
    alt: str | None = None,
) -> Figure:
    """One line for each series over `x`, named at its end.

    Args:
        x: positions of the points.
        series: name to values, one for each x; None where there is no value (the line has a gap).
        xlabel, ylabel: what the axes show, with the unit in parentheses.
        title: what the chart shows.
        source: where measured numbers come from: `charts.MEASURED_HERE` or `recorded(device, date)`.
        log_x, log_y: logarithmic axes.
        bytes_y: label the y axis in KiB, MiB, GiB.
        reference: (name, value) of a horizontal line: a limit, a peak, a theory.
        mark: an x to set off by a vertical line.
        measured_to: the last x that was measured; what lies beyond is continued by a rule, and drawn pale, dashed and hollow.
        alt: the description. Without it, the numbers are described, which is right for computed numbers; numbers measured
            anew in each run need a description of your own that stays true.

    Raises:
        ValueError: there is no series, a series has not as many values as `x`, or a logarithmic axis meets a number that
            is not positive.
    """
    _check_series(x, series, log_x, log_y)
    show = format_bytes if bytes_y else format_number
    with style.canvas(height=3.7) as fig:
        ax = fig.add_subplot()
        for (name, values), color, marker in zip(series.items(), _colors(series), _MARKERS * 9, strict=False):
            gaps = [float("nan") if value is None else value for value in values]
            measured = len(x) if measured_to is None else sum(at <= measured_to for at in x)
            ax.plot(x[:measured], gaps[:measured], color=color, marker=marker, label=name)
            continued = x[measured - 1 :], gaps[measured - 1 :]
            if measured < len(x):
                ax.plot(*continued, color=color, alpha=0.6, linestyle="--", linewidth=1.3, zorder=1)
                ax.plot(
                    x[measured:], gaps[measured:], color=color, linestyle="", marker=marker, markerfacecolor=style.PAPER
                )
        _scales(ax, x, log_x, log_y, bytes_y)
        if reference is not None:
            _reference_line(ax, *reference, show)
        if mark is not None:
            ax.axvline(mark, color=style.INK, linewidth=1, linestyle=(0, (1, 2)))
        _name_line_ends(ax, x, series)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.set_title(title)
        ax.grid(True, which="major")
        style.source_note(fig, source)
        told = _describe_lines(title, xlabel, ylabel, x, series, reference, show, source)
        beyond = (
            "" if measured_to is None else f" Measured up to {format_number(measured_to, digits=6)}, continued beyond."
        )
        return Figure(fig, alt=alt or told + beyond)


def memory_scaling(
    ns: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    *,
    wall_bytes: float | None = None,
    wall_name: str = "this machine's memory",
    title: str = "Memory against sequence length",
    mark: float | None = None,
    measured_to: float | None = None,
    source: str | None = None,
    alt: str | None = None,
) -> Figure:
    """Bytes over sequence length on logarithmic axes, and the wall: the memory there is.

    Args:
        ns: sequence lengths.
        series: name to bytes, as in `{"naive": [...], "tiled": [...]}`; None where it was not run.
        wall_bytes: memory of the machine, drawn as a line across.
        wall_name, title, mark, measured_to, source, alt: as in `line_chart`.

    Raises:
        ValueError: as `line_chart`.
    """
    return line_chart(
        ns,
        series,
        xlabel="sequence length N",
        ylabel="memory",
        title=title,
        source=source,
        log_x=True,
        log_y=True,
        bytes_y=True,
        reference=(wall_name, wall_bytes) if wall_bytes is not None else None,
        mark=mark,
        measured_to=measured_to,
        alt=alt,
    )


def bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    ylabel: str,
    title: str,
    source: str | None = None,
    bytes_y: bool = False,
    alt: str | None = None,
) -> Figure:
    """Bars with their values written on them: one per label, or a group of them if `series` names several.

    Args:
        labels: one for each bar or group.
        series: values, or name to values.
        ylabel, title, source, bytes_y, alt: as in `line_chart`.

    Raises:
        ValueError: there is no series, or a series has not as many values as labels.
    """
    grouped = dict(series) if isinstance(series, Mapping) else {"": series}
    _check_series(labels, grouped, False, False)
    show = format_bytes if bytes_y else format_number
    width = 0.8 / len(grouped)
    with style.canvas(height=3.5) as fig:
        ax = fig.add_subplot()
        for at, ((name, values), color) in enumerate(zip(grouped.items(), _colors(grouped), strict=False)):
            positions = [i + (at - (len(grouped) - 1) / 2) * width for i in range(len(labels))]
            drawn = ax.bar(positions, values, width * 0.92, color=color, label=name)
            ax.bar_label(drawn, [show(value) for value in values], padding=2, fontsize=9)
        ax.set_xticks(range(len(labels)), labels)
        ax.tick_params(axis="x", length=0)
        ax.margins(y=0.12)
        if bytes_y:
            byte_axis(ax.yaxis)
        ax.set(ylabel=ylabel)
        ax.set_title(title)
        if len(grouped) > 1:
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(grouped), borderaxespad=0)
        style.source_note(fig, source)
        return Figure(fig, alt=alt or _describe_bars(title, ylabel, labels, grouped, show, source))


def _check_series(x, series, log_x: bool, log_y: bool) -> None:
    if not series:
        raise ValueError("series must hold at least one series; it is empty")
    for name, values in series.items():
        if len(values) != len(x):
            raise ValueError(f"series {name!r} must have {len(x)} values, one for each point; got {len(values)}")
        if log_y and any(value is not None and value <= 0 for value in values):
            raise ValueError(
                f"series {name!r} must be positive on a logarithmic axis; got {min(filter(None, values), default=0)}"
            )
    if log_x and any(value <= 0 for value in x):
        raise ValueError(f"x must be positive on a logarithmic axis; got {min(x)}")


def _colors(series: Mapping[str, object]) -> list[str]:
    """An operand's own color where a series is named after one, else the course's order."""
    spare = iter(style.SERIES * (1 + len(series) // len(style.SERIES)))
    return [style.OPERANDS[name] if name in style.OPERANDS else next(spare) for name in series]


def _scales(ax, x, log_x: bool, log_y: bool, bytes_y: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    if log_x:
        power_axis(ax, x)
    if log_y:
        ax.set_yscale("log", base=10)
        ax.yaxis.set_minor_locator(NullLocator())
    if bytes_y:
        byte_axis(ax.yaxis, log=log_y)
    else:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def byte_axis(axis, *, log: bool = False) -> None:
    """Ticks at powers of two, labelled in B, KiB, MiB, GiB."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator

    if log:
        low, high = axis.get_view_interval()
        base = next((base for base in (2, 4) if high <= low * base**6), 16)  # half a dozen ticks
        axis.set_major_locator(LogLocator(base=base, numticks=12))
    else:
        axis.set_major_locator(MultipleLocator(2.0 ** math.floor(math.log2(max(axis.get_view_interval()[1], 1) / 4))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def power_axis(ax, x: Sequence[float]) -> None:
    """A logarithmic x axis with ticks at the values of `x`, ten at most."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(list(x)[:: -(-len(x) // 10)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value, digits=6)))


def _reference_line(ax, name: str, value: float, show) -> None:
    ax.axhline(value, color=style.INK, linewidth=1.2, linestyle=(0, (5, 3)))
    ax.annotate(
        f"{name}: {show(value)}", (0.0, value), xycoords=("axes fraction", "data"), xytext=(6, 4),
        textcoords="offset points", fontsize=9.5, fontweight="bold",
        bbox=_HALO,
    )  # fmt: skip


def _name_line_ends(ax, x, series) -> None:
    """Write each line's name beside its last point. Names of lines that end close together go into a legend instead."""
    ends = [
        [(at, value) for at, value in zip(x, values, strict=True) if value is not None][-1:]
        for values in series.values()
    ]
    to_pixels = ax.transData.transform
    ax.margins(x=0.04, y=0.1)
    ax.autoscale_view()
    heights = sorted(to_pixels(end[0])[1] for end in ends if end)
    if any(upper - lower < 22 for lower, upper in pairwise(heights)):
        ax.legend(loc="best")
        return
    lines = {line.get_label(): line for line in ax.get_lines()}
    for name, end in zip(series, ends, strict=True):
        line = lines[name]
        if end:
            ax.annotate(
                name, end[0], xytext=(9, 0), textcoords="offset points", va="center", color=line.get_color(),
                fontweight="bold", bbox=_HALO,
            )  # fmt: skip


def _describe_lines(title, xlabel, ylabel, x, series, reference, show, source) -> str:
    def told(values):
        points = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
        if not points:
            return "no values"
        (first_x, first), (last_x, last) = points[0], points[-1]
        return (
            f"{show(first)} at {format_number(first_x, digits=6)} to {show(last)} at {format_number(last_x, digits=6)}"
        )

    lines = "; ".join(f"{name}: {told(values)}" for name, values in series.items())
    limit = f" Line across: {reference[0]}, {show(reference[1])}." if reference else ""
    return f"{title}. {ylabel[:1].upper()}{ylabel[1:]} over {xlabel}. {lines}.{limit}{_told_source(source)}"


def _describe_bars(title, ylabel, labels, grouped, show, source) -> str:
    def told(values):
        return ", ".join(f"{label} {show(value)}" for label, value in zip(labels, values, strict=True))

    groups = "; ".join(f"{name}: {told(values)}" if name else told(values) for name, values in grouped.items())
    return f"{title}. Bars of {ylabel}: {groups}.{_told_source(source)}"


def _told_source(source: str | None) -> str:
    return f" Source: {source}." if source else ""
