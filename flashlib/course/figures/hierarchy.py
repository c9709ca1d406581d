"""The levels of a machine's memory: the nearer to the arithmetic, the smaller and the faster."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashlib.course.display import Figure, format_bytes, format_number
from flashlib.course.figures import style
from flashlib.measure.machine import MemoryLevel

_SMS = 132  # streaming multiprocessors, the cores of an H100 or H200 (SXM)
_BOOST_HZ = 1.98e9

# Sizes: "NVIDIA H100 Tensor Core GPU Architecture" (2022), table 4, and the data sheet of the H200 for its HBM. Shared memory:
# 32 banks of 4 bytes per clock and SM, CUDA C++ Programming Guide, "Shared Memory". L2: not published; see `with_rates`.
H200_MEMORY = (
    MemoryLevel("registers", _SMS * 256 * 1024, None, f"{_SMS} SMs, 256 KiB each"),
    MemoryLevel("shared memory and L1", _SMS * 256 * 1024, _SMS * 128 * _BOOST_HZ, f"{_SMS} SMs, 256 KiB each"),
    MemoryLevel("L2 cache", 50 * 2**20, None, "the chip"),
    MemoryLevel("HBM3e", 141 * 10**9, 4.8e12, "beside the chip"),
)


def memory_hierarchy(
    levels: Sequence[MemoryLevel],
    *,
    title: str,
    marks: Sequence[tuple[str, int]] = (),
    source: str | None = None,
    alt: str | None = None,
) -> Figure:
    """Levels of memory, the fastest on top, each as wide as the logarithm of its size.

    Args:
        levels: fastest first.
        title: above the figure.
        marks: (name, bytes) of things to place: each points to the first level that holds it.
        source: where the numbers come from.
        alt: the description. Without it sizes and rates are told, which is right where they do not change from run to run.

    Raises:
        ValueError: there is no level, or a mark does not fit into any.
    """
    if not levels:
        raise ValueError("levels must hold at least one level; it is empty")
    homes = {name: _home(levels, name, size) for name, size in marks}
    with style.canvas(height=0.62 * len(levels) + 1.1) as fig:
        ax = fig.add_subplot()
        widths = [math.log2(level.bytes) - 12 for level in levels]  # 4 KiB would have no width
        for row, (level, width) in enumerate(zip(levels, widths, strict=True)):
            color = style.tint(style.Q, 0.85 - 0.65 * row / max(len(levels) - 1, 1))
            ax.barh(row, width, 0.82, left=-width / 2, color=color, edgecolor=style.PAPER)
            ink = style.readable_on(color)
            ax.text(0, row - 0.14, level.name, ha="center", va="center", color=ink, fontweight="bold", fontsize=9.5)
            ax.text(0, row + 0.2, f"{format_bytes(level.bytes)} · {level.shared_by}", ha="center", va="center",
                    color=ink, fontsize=8.5)  # fmt: skip
            ax.text(max(widths) / 2 + 0.8, row, _rate(level), va="center", fontsize=9.5)
        for name, row in homes.items():
            placed = list(homes.values())[: list(homes).index(name)].count(row)
            ax.annotate(name, (-widths[row] / 2, row + 0.24 * placed), xytext=(-max(widths) / 2 - 1.2, row + 0.24 * placed),
                        ha="right", va="center", fontsize=9.5, color=style.S, fontweight="bold",
                        arrowprops={"arrowstyle": "->", "color": style.S})  # fmt: skip
        ax.set(xlim=(-max(widths) * (1.35 if marks else 0.55), max(widths) * 0.95), ylim=(len(levels) - 0.5, -0.6))
        ax.set_axis_off()
        ax.set_title(title)
        style.source_note(fig, source)
        return Figure(fig, alt=alt or _describe(title, levels, homes, source))


def _home(levels: Sequence[MemoryLevel], name: str, size: int) -> int:
    for row, level in enumerate(levels):
        if size <= level.bytes:
            return row
    raise ValueError(f"marks: {name!r} of {format_bytes(size)} fits into none of the levels")


def _rate(level: MemoryLevel) -> str:
    if level.bytes_per_s is None:
        return ""
    terabytes = level.bytes_per_s >= 1e12
    return f"{format_number(level.bytes_per_s / (1e12 if terabytes else 1e9), digits=2)} {'TB/s' if terabytes else 'GB/s'}"


def _describe(title: str, levels: Sequence[MemoryLevel], homes: dict[str, int], source: str | None) -> str:
    told = [", ".join(filter(None, (f"{x.name} {format_bytes(x.bytes)}", x.shared_by, _rate(x)))) for x in levels]
    placed = [f"{name}: {levels[row].name}" for name, row in homes.items()]
    text = f"{title}. Fastest first: {'; '.join(told)}."
    if placed:
        text += f" Where it fits: {'; '.join(placed)}."
    return text + (f" Source: {source}." if source else "")
