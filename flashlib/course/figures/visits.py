"""Which tiles of keys one program of a kernel visits, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from flashlib.course.display import Figure, format_bytes
from flashlib.course.figures import style
from flashlib.course.figures.tiles import _draw_mask
from flashlib.masks import RowIntervals


def tile_visits(
    intervals: RowIntervals,
    block_q: int,
    block_k: int,
    row_block: int,
    full: Sequence[int],
    partial: Sequence[int],
    *,
    tile_bytes: int,
    title: str,
) -> Figure:
    """A mask in tiles, with the order in which one block of rows visits them, and the bytes of K and V that this loads.

    Args:
        intervals: of one batch entry.
        row_block: which block of `block_q` rows.
        full, partial: the tiles of `block_k` keys that its two loops visit, in order.
        tile_bytes: of one tile of K and one of V.
        title: above the figure.

    Raises:
        ValueError: there is no such block of rows.
    """
    blocks, tiles = -(-intervals.q_len // block_q), -(-intervals.kv_len // block_k)
    if not 0 <= row_block < blocks:
        raise ValueError(f"row_block must be from 0 to {blocks - 1}; got {row_block}")
    told = (
        f"{_named('full', full)}, then {_named('partial', partial)}; K and V: {format_bytes(tile_bytes * len([*full, *partial]))} "
        f"of {format_bytes(tile_bytes * tiles)}"
    )
    with style.canvas(5.4, 5.4 * intervals.q_len / intervals.kv_len + 0.9) as fig:
        ax = fig.subplots()
        _draw_mask(ax, intervals, 0, block_q, block_k)
        ax.set_title(f"{title}\nBlock {row_block}: {told}", fontsize=10)
        _mark_visits(ax, intervals, block_q, block_k, row_block, [*full, *partial])
        return Figure(fig, alt=f"{title}. Block {row_block} of {blocks} visits {told}.")


def _named(kind: str, tiles: Sequence[int]) -> str:
    return f"{kind} {', '.join(map(str, tiles))}" if tiles else f"no {kind} tile"


def _mark_visits(ax, intervals: RowIntervals, block_q: int, block_k: int, row_block: int, order: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    top = row_block * block_q
    height = min(block_q, intervals.q_len - top)
    ax.add_patch(Rectangle((0, top), intervals.kv_len, height, fill=False, edgecolor=style.O, linewidth=3, zorder=4))
    for turn, tile in enumerate(order, start=1):
        left, right = tile * block_k, min((tile + 1) * block_k, intervals.kv_len)
        label = {"boxstyle": "circle,pad=0.25", "facecolor": style.PAPER, "edgecolor": style.O}
        middle = (left + right) / 2, top + height / 2
        ax.text(*middle, str(turn), ha="center", va="center", fontsize=9, fontweight="bold", bbox=label, zorder=5)
