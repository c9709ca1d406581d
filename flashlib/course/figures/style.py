"""The visual language of the course: one color for each operand, everywhere.

The hues are those of Okabe and Ito, "Color Universal Design" (2008), which people with any color vision can tell apart.
Nothing is said by color alone: tiles also differ in lightness, and lines carry their name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure as MatplotlibFigure

Q, K, V, S, O, LSE = "#0072B2", "#E69F00", "#009E73", "#AA4499", "#D55E00", "#5B6770"
OPERANDS = {"Q": Q, "K": K, "V": V, "S": S, "P": S, "O": O, "LSE": LSE}
INK, SOFT_INK, RULE, PAPER, FAINT = "#1F2328", "#57606A", "#D0D7DE", "#FFFFFF", "#EEF0F2"
SERIES = (O, Q, V, K, S, LSE)  # in the order in which a chart's series come: the first is the one to beat
WIDTH = 8.4  # inches, 806 CSS pixels: the width of a notebook's output

_RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that every machine draws the same picture
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": SOFT_INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # tokens and labels may hold a dollar sign
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


@contextmanager
def canvas(width: float = WIDTH, height: float = 3.5, *, layout: str = "constrained") -> Iterator[MatplotlibFigure]:
    """A figure of `width` x `height` inches in the course's style. Finish it inside the block.

    `layout="compressed"` keeps panels of a fixed aspect (matrices) together.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        yield Figure(figsize=(width, height), layout=layout)


@contextmanager
def drawing(
    x: tuple[float, float], y: tuple[float, float], title: str, *, unit: float | tuple[float, float]
) -> Iterator[tuple[MatplotlibFigure, Axes]]:
    """A figure without axes on which one unit is `unit` inches (or so many across and down), y growing downwards."""
    across, down = unit if isinstance(unit, tuple) else (unit, unit)
    width, height = (x[1] - x[0]) * across, (y[1] - y[0]) * down
    with canvas(width, height + 0.35, layout="none") as fig:
        ax = fig.add_axes((0, 0, 1, height / (height + 0.35)), xlim=x, ylim=(y[1], y[0]))
        ax.set_axis_off()
        fig.text(0.08 / width, 1, title, va="top", fontweight="bold", fontsize=11)
        yield fig, ax


def tint(color: str, strength: float) -> tuple[float, float, float]:
    """`color` mixed with white: 0 is white, 1 the color itself."""
    from matplotlib.colors import to_rgb

    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))


def white_to(color: str) -> LinearSegmentedColormap:
    """The colormap of heat maps: white for nothing, through `color`, to a dark shade of it."""
    from matplotlib.colors import LinearSegmentedColormap

    dark = tuple(0.55 * channel for channel in tint(color, 1.0))
    return LinearSegmentedColormap.from_list("attention", [PAPER, tint(color, 0.55), color, dark])


def source_note(fig: MatplotlibFigure, source: str | None) -> None:
    """Say at the bottom right where measured numbers come from: "measured here", or "recorded on <device>, <date>"."""
    if source:
        fig.supxlabel(source, x=0.995, ha="right", fontsize=8.5, color=SOFT_INK, style="italic")


def readable_on(color: tuple[float, float, float]) -> str:
    """Black or white, whichever can be read on `color`."""
    red, green, blue = color
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else PAPER
