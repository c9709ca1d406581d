"""Figures of attention kernels: which program has which part."""

from __future__ import annotations

from flashlib.course.display import Figure
from flashlib.course.figures import style

GAP = 0.35  # between heads, in blocks


def attention_programs(
    q_heads: int, kv_heads: int, row_blocks: int, key_tiles: int, program: tuple[int, int], tiles_seen: int
) -> Figure:
    """What one program of the forward kernel has loaded after some tiles of keys: its block of Q, one KV head, and its rows of O.

    Args:
        q_heads, kv_heads: of one batch entry; `kv_heads` divides `q_heads`.
        row_blocks: blocks of queries in a head. key_tiles: tiles of keys in a KV head.
        program: block of queries, and query head.
        tiles_seen: how many tiles of keys have passed by.

    Raises:
        ValueError: the heads do not divide, or there is no such program or tile.
    """
    i_m, i_h = program
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"kv_heads must divide q_heads; got q_heads={q_heads}, kv_heads={kv_heads}")
    if not (0 <= i_m < row_blocks and 0 <= i_h < q_heads):
        raise ValueError(f"program must be a block below {row_blocks} and a head below {q_heads}; got {program}")
    if not 0 <= tiles_seen <= key_tiles:
        raise ValueError(f"tiles_seen must be from 0 to {key_tiles}; got {tiles_seen}")
    i_kv = i_h // (q_heads // kv_heads)
    columns = (
        ("Q", style.Q, q_heads, row_blocks, {(i_h, i_m): "now"}),
        ("K and V", style.K, kv_heads, key_tiles, {(i_kv, n): "before" for n in range(tiles_seen)}),
        ("O, LSE", style.O, q_heads, row_blocks, {(i_h, i_m): "now"} if tiles_seen == key_tiles else {}),
    )
    if tiles_seen:
        columns[1][4][i_kv, tiles_seen - 1] = "now"
    width = max(q_heads * row_blocks, kv_heads * key_tiles) + GAP * q_heads
    title = f"program_id = ({i_m}, {i_h})"
    with style.drawing((-2.2, width), (-0.3, 4.5), title, unit=((style.WIDTH - 0.2) / (width + 2.2), 0.5)) as (fig, ax):
        for line, (name, color, heads, blocks, marked) in enumerate(columns):
            y = 1.6 * line + 0.15
            ax.text(-0.2, y + 0.4, name, ha="right", va="center", color=color, fontweight="bold")
            for head in range(heads):
                for block in range(blocks):
                    _block(ax, head * (blocks + GAP) + block, y, color, marked.get((head, block)))
                middle = head * (blocks + GAP) + blocks / 2
                ax.text(middle, y + 1.02, f"head {head}", ha="center", va="center", fontsize=8, color=style.SOFT_INK)
        return Figure(
            fig,
            alt=f"Program ({i_m}, {i_h}) of {row_blocks} x {q_heads}: it holds block {i_m} of query head {i_h}, has loaded "
            f"{tiles_seen} of the {key_tiles} tiles of KV head {i_kv}, and has "
            f"{'written' if tiles_seen == key_tiles else 'not yet written'} its rows of O.",
        )


def _block(ax, x: float, y: float, color: str, state: str | None) -> None:
    from matplotlib.patches import Rectangle

    fill = {"now": color, "before": style.tint(color, 0.45), None: style.tint(color, 0.1)}[state]
    ax.add_patch(Rectangle((x, y), 0.94, 0.8, facecolor=fill, edgecolor=color, linewidth=0.8))
