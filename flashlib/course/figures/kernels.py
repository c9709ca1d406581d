"""What one program of a Triton kernel addresses: lanes, masks and strides, on a matrix small enough to count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashlib.course.display import Figure
from flashlib.course.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _loaded() -> tuple[float, float, float]:
    return style.tint(style.Q, 0.75)


def program_lanes(
    lengths: Sequence[int], cols: int, strides: tuple[int, int], program: int, *, layout: str = ""
) -> Figure:
    """The lanes of the program that loads one row of a ragged matrix, and where in memory they point.

    Args:
        lengths: for each row of the matrix, how many of its entries count.
        cols: columns of the matrix. The block is the next power of two.
        strides: elements from one row to the next, and from one column to the next.
        program: which row.
        layout: a name for the strides, for the title.

    Raises:
        ValueError: no such program, or a row longer than `cols`.
    """
    rows, block = len(lengths), 1 << max(cols - 1, 0).bit_length()
    if not 0 <= program < rows:
        raise ValueError(f"program must be from 0 to {rows - 1}, got {program}")
    if max(lengths) > cols:
        raise ValueError(f"lengths must be at most cols, {cols}; got {max(lengths)}")
    owners = {row * strides[0] + col * strides[1]: (row, col) for row in range(rows) for col in range(cols)}
    lanes = [program * strides[0] + lane * strides[1] for lane in range(block)]
    loaded, masked = lanes[: lengths[program]], lanes[lengths[program] :]
    last = max(max(owners), max(lanes))
    wide = 16  # cells of memory in a line
    lines = last // wide + 1
    title = f"Program {program}: {block} lanes, {len(loaded)} load, {len(masked)} are masked"
    with style.drawing((-2.6, 17.4), (-1.3, rows + lines + 2.4), title, unit=(0.42, 0.36)) as (fig, ax):
        _draw_matrix(ax, lengths, cols, block, strides, program)
        _draw_memory(ax, rows + 2, last, wide, owners, loaded, masked)
        return Figure(fig, alt=_describe(title, layout, strides, loaded, masked, owners))


def _draw_matrix(
    ax: Axes, lengths: Sequence[int], cols: int, block: int, strides: tuple[int, int], program: int
) -> None:
    ax.text(0, -0.75, f"x [{len(lengths)}, {cols}], strides {strides}: each cell with its address", fontsize=9.5)
    for row, length in enumerate(lengths):
        here = row == program
        ax.text(-0.3, row + 0.5, f"row {row}", ha="right", va="center", fontsize=9, weight="bold" if here else "normal")
        for col in range(block if here else cols):
            inside = col < length
            color = _loaded() if here and inside else style.FAINT if inside else style.PAPER
            _cell(ax, col, row, color, masked=here and not inside, exists=col < cols)
            if col < cols:
                address = row * strides[0] + col * strides[1]
                ink = style.PAPER if here and inside else style.INK if inside else style.SOFT_INK
                ax.text(col + 0.5, row + 0.5, str(address), ha="center", va="center", fontsize=8, color=ink)
        ax.text(block + 0.4, row + 0.5, f"length {length}", va="center", fontsize=9, color=style.SOFT_INK)


def _draw_memory(
    ax: Axes,
    top: float,
    last: int,
    wide: int,
    owners: dict[int, tuple[int, int]],
    loaded: list[int],
    masked: list[int],
) -> None:
    ax.text(0, top - 0.35, "memory: what a lane of this program points to, with the lane's number", fontsize=9.5)
    for address in range(last + 1):
        x, y = address % wide, top + address // wide
        color = _loaded() if address in loaded else style.FAINT if address in owners else style.PAPER
        _cell(ax, x, y, color, masked=address in masked, exists=address in owners)
        if address in loaded:
            ax.text(
                x + 0.5, y + 0.5, str(loaded.index(address)), ha="center", va="center", fontsize=8, color=style.PAPER
            )
        if address in masked:
            lane = len(loaded) + masked.index(address)
            ax.text(x + 0.5, y + 0.5, str(lane), ha="center", va="center", fontsize=8, color=style.O)
    for line in range(last // wide + 1):
        ax.text(-0.3, top + line + 0.5, str(line * wide), ha="right", va="center", fontsize=8, color=style.SOFT_INK)
    note = "blue: loaded · red outline: where a masked lane points · dotted: not of x"
    ax.text(0, top + last // wide + 1.75, note, fontsize=8.5, color=style.SOFT_INK)


def _cell(ax: Axes, x: float, y: float, color, *, masked: bool, exists: bool) -> None:
    from matplotlib.patches import Rectangle

    edge, width = (style.O, 1.6) if masked else (style.RULE, 0.8)
    line = "-" if exists else ":"
    inset = 0.08 if masked else 0.04
    size = 1 - 2 * inset
    ax.add_patch(Rectangle((x + inset, y + inset), size, size, facecolor=color, edgecolor=edge, lw=width, ls=line))


def _describe(title: str, layout: str, strides: tuple[int, int], loaded: list[int], masked: list[int], owners) -> str:
    foreign = [address for address in masked if address not in owners]
    told = f"{title}. Strides {strides}{f', {layout}' if layout else ''}. It loads addresses {loaded}"
    if masked:
        told += f"; masked lanes point to {masked}"
        told += f", of which {len(foreign)} are no element of x" if foreign else ", all of them elements of x"
    return told + "."
