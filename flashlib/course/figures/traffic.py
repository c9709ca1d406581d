"""Figures of what a tiled loop keeps in fast memory and moves between fast and slow memory."""

from __future__ import annotations

from flashlib.course.display import Figure, format_bytes
from flashlib.course.figures import style


def tile_bytes(head_dim: int, block_q: int, block_k: int, itemsize: int) -> dict[str, int]:
    """Bytes of each tile that one step of the forward loop needs at once."""
    return {
        "Q": block_q * head_dim * itemsize,
        "K": block_k * head_dim * itemsize,
        "V": block_k * head_dim * itemsize,
        "S": block_q * block_k * itemsize,
        "O": block_q * head_dim * itemsize,
    }


def moved_bytes(n: int, head_dim: int, block_q: int, itemsize: int) -> dict[str, int]:
    """Bytes of each operand that the row-outer loop moves for one head: K and V once for each block of rows.

    Source: Dao et al. 2022, "FlashAttention", theorem 2, counted here exactly instead of up to a constant.
    """
    row_blocks = -(-n // block_q)
    one = n * head_dim * itemsize
    return {"Q": one, "K": row_blocks * one, "V": row_blocks * one, "O": one}


def naive_moved_bytes(n: int, head_dim: int, itemsize: int) -> int:
    """Bytes that naive attention moves for one head: Q, K, V and O once, S and P written and read once each."""
    return (4 * n * head_dim + 4 * n * n) * itemsize


def largest_block_q(head_dim: int, block_k: int, sram_bytes: int, itemsize: int) -> int:
    """The most rows of Q that fit into fast memory beside tiles of `block_k` keys; 0 if none does."""
    for_keys = 2 * block_k * head_dim
    per_row = 2 * head_dim + block_k  # of Q, O and S
    return max(0, (sram_bytes // itemsize - for_keys) // per_row)


def tile_budget(n: int, head_dim: int, block_q: int, block_k: int, sram_bytes: int, *, itemsize: int = 4) -> Figure:
    """One choice of tile: what it takes of fast memory, and what the loop moves, against naive attention.

    Args:
        n, head_dim: the problem, one head.
        block_q, block_k: the tile.
        sram_bytes: the fast memory M.
        itemsize: bytes per element.

    Raises:
        ValueError: an argument is below 1.
    """
    given = {"n": n, "head_dim": head_dim, "block_q": block_q, "block_k": block_k, "sram_bytes": sram_bytes}
    for name, size in given.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    tile = tile_bytes(head_dim, block_q, block_k, itemsize)
    fits = sum(tile.values()) <= sram_bytes
    limit = largest_block_q(head_dim, block_k, sram_bytes, itemsize)
    moved = {block: sum(moved_bytes(n, head_dim, block, itemsize).values()) for block in {block_q, *_powers(n)}}
    naive = naive_moved_bytes(n, head_dim, itemsize)
    verdict = "fits into" if fits else "does not fit into"
    title = f"Tile {block_q} x {block_k}: {format_bytes(sum(tile.values()))}, {verdict} {format_bytes(sram_bytes)}"
    with style.canvas(height=3.9) as fig:
        memory, traffic = fig.subplots(1, 2, width_ratios=[1, 2.1])
        _draw_tile(memory, tile, sram_bytes)
        _draw_traffic(traffic, moved, block_q, naive, limit)
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        return Figure(
            fig,
            alt=f"{title}. For N = {n:,} and head_dim {head_dim}, the loop moves {format_bytes(moved[block_q])}: "
            f"K and V {-(-n // block_q)} times, Q and O once. Naive attention moves {format_bytes(naive)}. "
            f"Beside {block_k} keys, at most {limit} rows fit.",
        )


def _powers(n: int) -> list[int]:
    return [2**power for power in range(2, 11) if 2**power <= n]


def _draw_tile(ax, tile: dict[str, int], sram_bytes: int) -> None:
    bottom = 0
    for name, size in tile.items():
        ax.bar(0, size, 0.7, bottom=bottom, color=style.OPERANDS[name], edgecolor=style.PAPER)
        if size > 0.06 * max(sum(tile.values()), sram_bytes):
            text = f"{name}  {format_bytes(size)}"
            ink = style.readable_on(style.tint(style.OPERANDS[name], 1.0))
            ax.text(0, bottom + size / 2, text, ha="center", va="center", color=ink, fontsize=9)
        bottom += size
    _line_across(ax, sram_bytes, f"fast memory\n{format_bytes(sram_bytes)}")
    ax.set(xlim=(-0.4, 1.2), ylim=(0, 1.15 * max(bottom, sram_bytes)), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title("In fast memory at once", fontsize=10)


def _draw_traffic(ax, moved: dict[int, int], block_q: int, naive: int, limit: int) -> None:
    from flashlib.course.figures.charts import byte_axis, power_axis

    blocks = sorted(moved)
    ax.plot(blocks, [moved[block] for block in blocks], color=style.Q, marker="o")
    ax.plot(block_q, moved[block_q], "o", color=style.O, markersize=11)
    _line_across(ax, naive, "naive attention")
    power_axis(ax, blocks)
    ax.set_yscale("log", base=2)
    byte_axis(ax.yaxis, log=True)
    ax.grid(True)
    left, right = ax.get_xlim()
    if limit < right:
        ax.axvspan(max(limit, left), right, color=style.FAINT, zorder=0)
        ax.text(0.98, 0.97, "does not fit", transform=ax.transAxes, ha="right", va="top", color=style.SOFT_INK)
        ax.set_xlim(left, right)
    ax.set(xlabel="block_q (rows of Q in fast memory)")
    ax.set_title("Bytes moved, one head", fontsize=10)


def _line_across(ax, value: float, text: str) -> None:
    ax.axhline(value, color=style.INK, linewidth=1.2, linestyle=(0, (5, 3)))
    ax.annotate(
        text, (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points", ha="right",
        fontsize=9, fontweight="bold",
    )  # fmt: skip
