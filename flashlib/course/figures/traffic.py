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


def tile_budget(n: int, head_dim: int, block_q: int, block_k: int, sram_bytes: int, *, itemsize: int = 4) -> Figure:
    """One choice of tile: what it takes of fast memory, and what the loop moves, against naive attention and the theory.

    Args:
        n, head_dim: the problem, one head.
        block_q, block_k: the tile.
        sram_bytes: the fast memory M.
        itemsize: bytes per element.

    Raises:
        ValueError: an argument is below 1.
    """
    for name, size in (
        ("n", n),
        ("head_dim", head_dim),
        ("block_q", block_q),
        ("block_k", block_k),
        ("sram_bytes", sram_bytes),
    ):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    tile = tile_bytes(head_dim, block_q, block_k, itemsize)
    used = sum(tile.values())
    verdict = "fits into" if used <= sram_bytes else "does not fit into"
    with style.canvas(height=3.9) as fig:
        memory, traffic = fig.subplots(1, 2, width_ratios=[1, 2.1])
        _draw_tile(memory, tile, sram_bytes)
        _draw_traffic(traffic, n, head_dim, block_q, sram_bytes, itemsize)
        title = f"Tile {block_q} x {block_k}: {format_bytes(used)}, {verdict} {format_bytes(sram_bytes)}"
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        moved, naive = (
            sum(moved_bytes(n, head_dim, block_q, itemsize).values()),
            naive_moved_bytes(n, head_dim, itemsize),
        )
        return Figure(
            fig,
            alt=f"{title}. For N = {n:,} and head_dim {head_dim}, the loop moves {format_bytes(moved)}: "
            f"K and V {-(-n // block_q)} times, Q and O once. Naive attention moves {format_bytes(naive)}.",
        )


def _draw_tile(ax, tile: dict[str, int], sram_bytes: int) -> None:
    bottom = 0
    for name, size in tile.items():
        ax.bar(0, size, 0.6, bottom=bottom, color=style.OPERANDS[name], edgecolor=style.PAPER)
        if size > 0.06 * sum(tile.values()):
            ink = style.readable_on(style.tint(style.OPERANDS[name], 1.0))
            ax.text(
                0, bottom + size / 2, f"{name}  {format_bytes(size)}", ha="center", va="center", color=ink, fontsize=9
            )
        bottom += size
    ax.axhline(sram_bytes, color=style.INK, linewidth=1.2, linestyle=(0, (5, 3)))
    ax.annotate(
        f"fast memory {format_bytes(sram_bytes)}",
        (0, sram_bytes),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        fontweight="bold",
    )
    ax.set(xlim=(-0.7, 0.7), ylim=(0, 1.15 * max(bottom, sram_bytes)), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title("In fast memory at once", fontsize=10)


def _draw_traffic(ax, n: int, head_dim: int, block_q: int, sram_bytes: int, itemsize: int) -> None:
    from flashlib.course.figures.charts import byte_axis, power_axis

    blocks = [2**power for power in range(2, 11) if 2**power <= n]
    ax.plot(blocks, [sum(moved_bytes(n, head_dim, b, itemsize).values()) for b in blocks], color=style.Q, marker="o")
    ax.plot(block_q, sum(moved_bytes(n, head_dim, block_q, itemsize).values()), "o", color=style.O, markersize=11)
    ax.axhline(naive_moved_bytes(n, head_dim, itemsize), color=style.INK, linewidth=1.2, linestyle=(0, (5, 3)))
    ax.annotate(
        "naive attention",
        (1, naive_moved_bytes(n, head_dim, itemsize)),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        fontweight="bold",
    )
    power_axis(ax, blocks)
    ax.set_yscale("log", base=2)
    byte_axis(ax.yaxis, log=True)
    ax.set(xlabel="block_q (rows of Q in fast memory)")
    ax.set_title("Bytes moved, one head", fontsize=10)
    ax.grid(True)
