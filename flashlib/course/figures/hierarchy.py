"""The levels of a machine's memory: the nearer to the arithmetic, the smaller and the faster."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashlib.course.display import Figure, format_bytes, format_number
from flashlib.course.figures import style
from flashlib.measure import cpu_memory
from flashlib.measure.racing.machine import MemoryLevel
from flashlib.measure.records.record import Record, load_record

_SMS, _BOOST_HZ = 132, 1.98e9  # an SM, streaming multiprocessor, is a core of the GPU; H100 and H200, SXM boards
_BANKED_BYTES = 128  # shared memory gives 4 bytes from each of 32 banks per clock
_NARROWEST, _TALLEST = 0.5, 0.82  # box of the smallest level relative to the largest; of a row


def h200_memory(record: Record) -> list[MemoryLevel]:
    """The memory of an H200, fastest first. What the tensor cores get from registers is not published, so not told.

    Args:
        record: `load_record("h200/attention_steps")`, for the rates of L2 cache and HBM as measured.

    Sources: "NVIDIA H100 Tensor Core GPU Architecture" (2022), table 4, for registers and shared memory (the H200 is the same
    chip with other HBM); for the L2 cache, what this H200's driver said when traffic was recorded;
    "CUDA C++ Programming Guide", on shared memory, for its 32 banks; 1.98 GHz is the highest clock.
    """
    on_chip, in_hbm = sorted(record.extra["stream_bytes_per_s"], key=int)
    rates = record.extra["stream_bytes_per_s"]
    return [
        MemoryLevel("registers", 2**18, None, f"in each of {_SMS} SMs"),
        MemoryLevel("shared memory, L1", 2**18, _SMS * _BANKED_BYTES * _BOOST_HZ, f"in each of {_SMS} SMs"),
        MemoryLevel("L2 cache", load_record("h200/attention_traffic").extra["l2_bytes"], rates[on_chip], "on the chip"),
        MemoryLevel("HBM", record.extra["memory_bytes"], rates[in_hbm], "beside the chip"),
    ]


def best_of(times: int) -> list[MemoryLevel]:
    """The memory of this machine, fastest first, each level at the best of several measured rates.

    One measurement beside a busy neighbor may put a cache behind main memory.
    """
    return [
        max(level, key=lambda one: one.bytes_per_s or 0.0)
        for level in zip(*(cpu_memory() for _ in range(times)), strict=True)
    ]


def memory_hierarchy(
    levels: Sequence[MemoryLevel],
    *,
    title: str,
    marks: Sequence[tuple[str, int]] = (),
    source: str | None = None,
    alt: str | None = None,
) -> Figure:
    """Levels of memory, the fastest on top, wider where there is more of it (by the logarithm).

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
    homes = [(name, _home(levels, name, size)) for name, size in marks]
    with style.canvas(height=0.62 * len(levels) + 0.7) as fig:
        ax = fig.add_subplot()
        widths = _widths(levels)
        for row, (level, width) in enumerate(zip(levels, widths, strict=True)):
            _draw_level(ax, row, level, width, strength=0.85 - 0.65 * row / max(len(levels) - 1, 1))
        for at, (name, row) in enumerate(homes):
            _draw_mark(ax, name, row, widths[row], [home for _, home in homes[:at]].count(row))
        ax.set(xlim=(-1.35 if marks else -0.55, 1.3), ylim=(len(levels) - 0.5, -0.5))
        ax.set_axis_off()
        ax.set_title(title)
        style.source_note(fig, source)
        return Figure(fig, alt=alt or _describe(title, levels, homes, source))


def _widths(levels: Sequence[MemoryLevel]) -> list[float]:
    """The largest level is 1 wide, the smallest `_NARROWEST`."""
    sizes = [math.log2(level.bytes) for level in levels]
    spread = max(sizes) - min(sizes) or 1.0
    return [1 - (1 - _NARROWEST) * (max(sizes) - size) / spread for size in sizes]


def _draw_level(ax, row: int, level: MemoryLevel, width: float, strength: float) -> None:
    color = style.tint(style.Q, strength)
    ax.barh(row, width, _TALLEST, left=-width / 2, color=color, edgecolor=style.PAPER)
    name = {"ha": "center", "va": "center", "fontweight": "bold", "fontsize": 9.5}
    ax.text(0, row, level.name, color=style.readable_on(color), **name)
    told = [f"{format_bytes(level.bytes)}, {level.shared_by}", _rate(level)]
    ax.text(0.55, row, "\n".join(filter(None, told)), va="center", fontsize=9.5)


def _draw_mark(ax, name: str, row: int, width: float, before: int) -> None:
    """`before` marks point to the same level already: this one goes below them."""
    y = row - 0.2 + 0.36 * before
    label = {"ha": "right", "va": "center", "fontsize": 9.5, "fontweight": "bold", "color": style.S}
    arrow = {"arrowstyle": "->", "color": style.S}
    ax.annotate(name, (-width / 2, y), xytext=(-0.6, y), arrowprops=arrow, **label)


def _home(levels: Sequence[MemoryLevel], name: str, size: int) -> int:
    for row, level in enumerate(levels):
        if size <= level.bytes:
            return row
    raise ValueError(f"marks: {name!r} of {format_bytes(size)} fits into none of the levels")


def _rate(level: MemoryLevel) -> str:
    if level.bytes_per_s is None:
        return ""
    scale, unit = (1e12, "TB/s") if level.bytes_per_s >= 1e12 else (1e9, "GB/s")
    return f"{format_number(level.bytes_per_s / scale, digits=2)} {unit}"


def _describe(title: str, levels: Sequence[MemoryLevel], homes: list[tuple[str, int]], source: str | None) -> str:
    told = [", ".join(filter(None, (f"{x.name} {format_bytes(x.bytes)}", x.shared_by, _rate(x)))) for x in levels]
    placed = f" Where it fits: {'; '.join(f'{name}: {levels[row].name}' for name, row in homes)}." if homes else ""
    return f"{title}. Fastest first: {'; '.join(told)}.{placed}{f' Source: {source}.' if source else ''}"
