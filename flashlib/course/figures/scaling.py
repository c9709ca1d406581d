"""Several quantities side by side on logarithmic axes, each line with the power of N that it follows."""

from __future__ import annotations

from collections.abc import Mapping

from flashlib.course.chapters.io_model import fit_exponent
from flashlib.course.display import Figure, format_bytes
from flashlib.course.figures import style
from flashlib.course.figures.charts import byte_axis, power_axis

_MARKERS = "osD^vP"


def power_laws(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], *, title: str, xlabel: str = "sequence length N"
) -> Figure:
    """One panel for each quantity, in bytes, with a line for each method and the exponent fitted to its points.

    Args:
        panels: what is counted (``"memory in use"``) to method (``"tiled"``) to ``{N: bytes}``, in the order of N.
        title: what the whole shows.
        xlabel: of all panels.

    Raises:
        ValueError: there is no panel, or a line has fewer than two points.
    """
    if not panels:
        raise ValueError("panels must hold at least one panel; it is empty")
    for panel, lines in panels.items():
        for name, points in lines.items():
            if len(points) < 2:
                raise ValueError(f"{panel!r}, {name!r}: a power law needs at least 2 points; got {len(points)}")
    with style.canvas(height=3.9) as fig:
        axes = fig.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for ax, (panel, lines) in zip(axes, panels.items(), strict=True):
            _draw_lines(ax, lines)
            ax.set(xlabel=xlabel)
            ax.set_title(panel, fontsize=10)
        power_axis(axes[0], sorted({n for lines in panels.values() for points in lines.values() for n in points}))
        axes[0].set_yscale("log", base=2)
        byte_axis(axes[0].yaxis, log=True)
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        told = "; ".join(f"{panel}: {_describe(lines)}" for panel, lines in panels.items())
        return Figure(fig, alt=f"{title}. Over {xlabel}. {told}.")


def _exponent(points: Mapping[int, float]) -> float:
    return fit_exponent(list(points), list(points.values()))


def _draw_lines(ax, lines: Mapping[str, Mapping[int, float]]) -> None:
    for (name, points), color, marker in zip(lines.items(), style.SERIES, _MARKERS, strict=False):
        label = f"{name}: N^{_exponent(points):.2f}"
        ax.plot(list(points), list(points.values()), color=color, marker=marker, label=label)
    ax.legend(loc="upper left")
    ax.grid(True)


def _describe(lines: Mapping[str, Mapping[int, float]]) -> str:
    def told(points: Mapping[int, float]) -> str:
        first, *_, last = points
        ends = f"{format_bytes(points[first])} at {first:,} to {format_bytes(points[last])} at {last:,}"
        return f"{ends}, as N^{_exponent(points):.2f}"

    return ", ".join(f"{name} from {told(points)}" for name, points in lines.items())
