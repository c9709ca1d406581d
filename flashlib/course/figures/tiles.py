"""Figures of tiles: what a mask leaves of them, and which of them a loop holds in fast memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from flashlib.course.display import Figure
from flashlib.course.figures import style
from flashlib.masks import Mask, RowIntervals, Tile, Unmasked

_CELL = {  # (tile kind, visible) -> color; darker is more work
    (Tile.SKIP, False): style.FAINT,
    (Tile.PARTIAL, False): "#F3DDEE",
    (Tile.PARTIAL, True): "#C77DB8",
    (Tile.FULL, True): "#7B2D72",
}
_KIND_NAMES = {
    Tile.FULL: "full: no mask needed",
    Tile.PARTIAL: "partial: mask applied",
    Tile.SKIP: "skipped: never loaded",
}
_MOST_PANELS = 4
_PANELS_PER_ROW = 3


def mask_figure(
    mask: Mask,
    q_len: int,
    kv_len: int,
    block_q: int | None = None,
    block_k: int | None = None,
    *,
    batch: int = 1,
    title: str = "",
) -> Figure:
    """Which keys each query row sees, cell by cell; with block sizes, also what that makes of each tile.

    Args:
        mask: any `flashlib.masks.Mask`.
        q_len, kv_len: rows and columns.
        block_q, block_k: tile size; both or neither.
        batch: sequences in the batch, for masks that differ between them. Up to four are drawn.
        title: above the figure; the mask's own name if left out.

    Raises:
        ValueError: only one block size is given, a length is not positive, or the mask does not fit.
    """
    _check_sizes(q_len, kv_len, block_q, block_k)
    intervals = mask.intervals(batch, q_len, kv_len)
    title = title or type(mask).__name__
    panels = min(intervals.start.shape[0], _MOST_PANELS)
    panel_width = min(style.WIDTH / panels, 4.6)
    panel_height = min(panel_width * q_len / kv_len, 5.5)

    with style.canvas(panel_width * panels + 0.4, max(panel_height, 1.2) + 1.3, layout="compressed") as fig:
        for entry, ax in enumerate(fig.subplots(1, panels, squeeze=False)[0]):
            _draw_mask(ax, intervals, entry, block_q, block_k)
            if panels > 1:
                ax.set_title(f"sequence {entry}", fontweight="normal", fontsize=10)
        if panels > 1:
            fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        else:
            ax.set_title(title)
        counts = tile_counts(intervals, block_q, block_k) if block_q is not None else {}
        _mask_legend(fig, {kind: f"{count} {_KIND_NAMES[kind]}" for kind, count in counts.items()})
        return Figure(fig, alt=_describe_mask(title, intervals, block_q, block_k))


def mask_gallery(
    masks: Mapping[str, Mask],
    q_len: int,
    kv_len: int,
    block_q: int | None = None,
    block_k: int | None = None,
    *,
    title: str,
) -> Figure:
    """Several masks side by side, for one sequence, drawn as `mask_figure` draws one.

    Args:
        masks: name to mask; the name stands above its panel.
        q_len, kv_len, block_q, block_k: as in `mask_figure`.
        title: above the figure.

    Raises:
        ValueError: there is no mask, or as `mask_figure`.
    """
    _check_sizes(q_len, kv_len, block_q, block_k)
    if not masks:
        raise ValueError("masks must hold at least one mask; it is empty")
    made = {name: mask.intervals(1, q_len, kv_len) for name, mask in masks.items()}
    columns = min(len(made), _PANELS_PER_ROW)
    rows = -(-len(made) // columns)
    panel_width = style.WIDTH / _PANELS_PER_ROW
    panel_height = min((panel_width - 0.6) * q_len / kv_len, 3.2)

    with style.canvas(panel_width * columns, (panel_height + 0.75) * rows + 0.6, layout="compressed") as fig:
        panels = list(fig.subplots(rows, columns, squeeze=False).flat)
        for ax, (name, intervals) in zip(panels, made.items(), strict=False):
            _draw_mask(ax, intervals, 0, block_q, block_k)
            ax.set_title(name, fontsize=10)
            if block_q is not None:
                ax.set_xlabel(_told_counts(intervals, block_q, block_k))
        for ax in panels[len(made) :]:
            ax.set_axis_off()
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        _mask_legend(fig, _KIND_NAMES if block_q is not None else {})
        told = " ".join(_describe_mask(name, intervals, block_q, block_k) for name, intervals in made.items())
        return Figure(fig, alt=f"{title}. {told}")


def tile_counts(intervals: RowIntervals, block_q: int, block_k: int) -> dict[Tile, int]:
    """How many tiles, over all batch entries, are of each kind."""
    tiles = intervals.tile_map(block_q, block_k)
    return {kind: int((tiles == kind).sum()) for kind in (Tile.FULL, Tile.PARTIAL, Tile.SKIP)}


@dataclass(frozen=True)
class Step:
    """One step of a tiled loop: row block `i`, key block `j`, and what has been moved up to and with it, in tiles."""

    i: int
    j: int
    kind: Tile
    q_loads: int
    kv_loads: int
    o_loads: int
    o_stores: int


def tile_steps(
    q_len: int, kv_len: int, block_q: int, block_k: int, mask: Mask | None = None, loop_order: str = "q_outer"
) -> list[Step]:
    """The steps of the loop in order. Tiles that the mask skips take no step.

    `q_outer` (FlashAttention-2) loads Q once for each row block and K, V at each step, and stores O when a row block is
    done. `kv_outer` (FlashAttention-1) loads K, V once for each key block, and at each step loads Q and O and stores O.

    Raises:
        ValueError: an unknown `loop_order`, or a length or block size below 1.
    """
    if loop_order not in ("q_outer", "kv_outer"):
        raise ValueError(f"loop_order must be 'q_outer' or 'kv_outer'; got {loop_order!r}")
    for name, size in (("q_len", q_len), ("kv_len", kv_len), ("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    tiles = (mask or Unmasked()).intervals(1, q_len, kv_len).tile_map(block_q, block_k)[0]
    n_q, n_k = tiles.shape
    order = ((i, j) for i in range(n_q) for j in range(n_k))
    if loop_order == "kv_outer":
        order = ((i, j) for j in range(n_k) for i in range(n_q))
    visited = [(i, j) for i, j in order if tiles[i, j] != Tile.SKIP]

    steps, started = [], set()
    q_loads = kv_loads = o_loads = o_stores = 0
    for at, (i, j) in enumerate(visited):
        before = visited[at - 1] if at else (None, None)
        after = visited[at + 1] if at + 1 < len(visited) else (None, None)
        q_loads += loop_order == "kv_outer" or i != before[0]
        kv_loads += loop_order == "q_outer" or j != before[1]
        o_loads += loop_order == "kv_outer" and i in started
        o_stores += loop_order == "kv_outer" or i != after[0]
        started.add(i)
        steps.append(Step(i, j, Tile(int(tiles[i, j])), q_loads, kv_loads, o_loads, o_stores))
    return steps


def tile_sweep(
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    step: int,
    mask: Mask | None = None,
    loop_order: str = "q_outer",
) -> Figure:
    """The tiles of Q, K, V and O that are in fast memory at one step of a tiled loop, and what has been moved so far.

    Args:
        q_len, kv_len, block_q, block_k: the problem and its tiles; the last tile of a side may be smaller.
        step: counted from 1; see `tile_steps` for how many there are.
        mask: tiles it skips are never visited.
        loop_order: `"q_outer"` (FlashAttention-2) or `"kv_outer"` (FlashAttention-1).

    Raises:
        ValueError: `step` is out of range, or as `tile_steps`.
    """
    steps = tile_steps(q_len, kv_len, block_q, block_k, mask, loop_order)
    if not 1 <= step <= len(steps):
        raise ValueError(f"step must be 1 to {len(steps)} for this loop; got {step}")
    return _SweepDrawing(q_len, kv_len, block_q, block_k, mask or Unmasked(), loop_order, steps, step - 1).figure()


class _SweepDrawing:
    """Q to the left of the score matrix, K and V above it, O to the right: a tile's row and column say what it needs."""

    strip, gap = 0.75, 0.35  # thickness of an operand and distance to the matrix, in tiles

    def __init__(self, q_len, kv_len, block_q, block_k, mask, loop_order, steps, step):
        self.tiles = mask.intervals(1, q_len, kv_len).tile_map(block_q, block_k)[0]
        self.n_q, self.n_k = self.tiles.shape
        self.loop_order, self.steps, self.at = loop_order, steps, step
        self.now = steps[step]

    def figure(self) -> Figure:
        order = "FlashAttention-2: rows outside" if self.loop_order == "q_outer" else "FlashAttention-1: keys outside"
        x = (-self.strip - self.gap - 0.2, self.n_k + self.gap + self.strip)
        y = (-2 * self.strip - self.gap - 0.3, self.n_q + 0.15)
        scale = min(0.62, (style.WIDTH - 2.2) / (x[1] - x[0]), 5.0 / (y[1] - y[0]))
        x = (x[0], x[1] + 2.1 / scale)  # room for the counts, which keep their size
        with style.drawing(x, y, f"{order}. Step {self.at + 1} of {len(self.steps)}", unit=scale) as (fig, ax):
            self._draw_operands(ax)
            self._draw_scores(ax)
            self._write_counts(ax, scale)
            return Figure(fig, alt=self._describe(order))

    def _draw_operands(self, ax) -> None:
        visits = Counter(s.i for s in self.steps)
        visited = Counter(s.i for s in self.steps[: self.at])
        left, right = -self.gap - self.strip, self.n_k + self.gap
        top = -self.gap - self.strip
        for i in range(self.n_q):
            progress = visited[i] / max(visits[i], 1)  # O fills up as the keys pass by
            self._box(ax, left, i, self.strip, 1, style.Q, i == self.now.i, f"Q{i}")
            self._box(ax, right, i, self.strip, 1, style.O, i == self.now.i, f"O{i}", progress)
        for j in range(self.n_k):
            self._box(ax, j, top, 1, self.strip, style.V, j == self.now.j, f"V{j}")
            self._box(ax, j, top - self.strip - 0.12, 1, self.strip, style.K, j == self.now.j, f"K{j}")

    def _draw_scores(self, ax) -> None:
        from matplotlib.patches import Rectangle

        done = {(s.i, s.j) for s in self.steps[: self.at]}
        for i in range(self.n_q):
            for j in range(self.n_k):
                current = (i, j) == (self.now.i, self.now.j)
                skipped = self.tiles[i, j] == Tile.SKIP
                color = style.S if current else style.tint(style.S, 0.28) if (i, j) in done else style.PAPER
                ax.add_patch(Rectangle((j, i), 1, 1, facecolor=style.FAINT if skipped else color, edgecolor=style.RULE))
                if current:
                    ax.text(
                        j + 0.5,
                        i + 0.5,
                        f"S{i}{j}" if max(i, j) < 10 else "S",
                        ha="center",
                        va="center",
                        color=style.PAPER,
                        fontweight="bold",
                    )
                elif skipped:
                    ax.plot([j + 0.35, j + 0.65], [i + 0.35, i + 0.65], color="#B6BDC5", linewidth=1)
                    ax.plot([j + 0.35, j + 0.65], [i + 0.65, i + 0.35], color="#B6BDC5", linewidth=1)
        ax.add_patch(Rectangle((0, 0), self.n_k, self.n_q, fill=False, edgecolor=style.SOFT_INK, linewidth=1))

    def _box(self, ax, x, y, width, height, color, in_fast_memory, label, progress=0.0) -> None:
        from matplotlib.patches import Rectangle

        face = color if in_fast_memory else style.tint(color, 0.14 + 0.4 * progress)
        ax.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=style.PAPER, linewidth=1.5))
        ink = style.readable_on(style.tint(color, 1.0 if in_fast_memory else 0.14))
        weight = "bold" if in_fast_memory else "normal"
        ax.text(
            x + width / 2, y + height / 2, label, ha="center", va="center", color=ink, fontsize=9, fontweight=weight
        )

    def _write_counts(self, ax, scale: float) -> None:
        now = self.now
        lines = [
            ("in fast memory", f"Q{now.i}  K{now.j}  V{now.j}  O{now.i}"),
            ("Q tiles loaded", f"{now.q_loads}"),
            ("K, V tiles loaded", f"{now.kv_loads} + {now.kv_loads}"),
            ("O tiles loaded", f"{now.o_loads}"),
            ("O tiles stored", f"{now.o_stores}"),
        ]
        x, top = self.n_k + self.gap + self.strip + 0.3 / scale, -2 * self.strip - self.gap
        for row, (name, value) in enumerate(lines):
            y = top + (row * 0.46 + 0.22) / scale
            ax.text(x, y, value, va="bottom", fontsize=11, fontweight="bold")
            ax.text(x, y + 0.02 / scale, name, va="top", fontsize=8.5, color=style.SOFT_INK)

    def _describe(self, order: str) -> str:
        now = self.now
        skipped = int((self.tiles == Tile.SKIP).sum())
        return (
            f"{order}. Step {self.at + 1} of {len(self.steps)}, over {self.n_q} x {self.n_k} tiles, {skipped} of them "
            f"skipped. In fast memory: Q{now.i}, K{now.j}, V{now.j}, O{now.i}. Loaded so far: {now.q_loads} tiles of Q, "
            f"{now.kv_loads} of K, {now.kv_loads} of V, {now.o_loads} of O; stored: {now.o_stores} of O."
        )


def _draw_mask(ax, intervals: RowIntervals, entry: int, block_q: int | None, block_k: int | None) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    visible = intervals.dense()[entry].numpy()
    kinds = np.where(visible, Tile.FULL, Tile.SKIP)
    if block_q is not None:
        tiles = intervals.tile_map(block_q, block_k)[entry].numpy()
        kinds = tiles.repeat(block_q, 0).repeat(block_k, 1)[: visible.shape[0], : visible.shape[1]]
    picture = np.empty((*visible.shape, 3))
    for (kind, seen), color in _CELL.items():
        picture[(kinds == kind) & (visible == seen)] = to_rgb(color)
    ax.imshow(picture, interpolation="nearest", extent=(0, intervals.kv_len, intervals.q_len, 0))
    _grid(ax, intervals, block_q, block_k)
    ax.set(xlabel="key", ylabel="query row")
    ax.spines[:].set_visible(True)
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.yaxis.set_major_locator(_whole_numbers())


def _grid(ax, intervals: RowIntervals, block_q: int | None, block_k: int | None) -> None:
    if max(intervals.q_len, intervals.kv_len) <= 64:
        ax.hlines(range(intervals.q_len), 0, intervals.kv_len, color=style.PAPER, linewidth=0.5)
        ax.vlines(range(intervals.kv_len), 0, intervals.q_len, color=style.PAPER, linewidth=0.5)
    if block_q is not None:
        thin = 1.2 if intervals.q_len / block_q <= 24 and intervals.kv_len / block_k <= 24 else 0.4
        ax.hlines(range(0, intervals.q_len, block_q), 0, intervals.kv_len, color=style.INK, linewidth=thin)
        ax.vlines(range(0, intervals.kv_len, block_k), 0, intervals.q_len, color=style.INK, linewidth=thin)


def _check_sizes(q_len: int, kv_len: int, block_q: int | None, block_k: int | None) -> None:
    if (block_q is None) != (block_k is None):
        raise ValueError(f"block_q and block_k come together; got {block_q} and {block_k}")
    if q_len < 1 or kv_len < 1:
        raise ValueError(f"q_len and kv_len must be at least 1; got {q_len} and {kv_len}")


def _mask_legend(fig, tile_labels: Mapping[Tile, str]) -> None:
    """What the colors mean: kinds of tiles, or single cells where there are no tiles."""
    from matplotlib.patches import Patch

    labels = tile_labels or {Tile.FULL: "visible", Tile.SKIP: "hidden"}
    colors = {Tile.FULL: _CELL[Tile.FULL, True], Tile.PARTIAL: _CELL[Tile.PARTIAL, True], Tile.SKIP: style.FAINT}
    handles = [Patch(facecolor=colors[kind], edgecolor=style.RULE, label=label) for kind, label in labels.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2, columnspacing=1.4)


def _told_counts(intervals: RowIntervals, block_q: int, block_k: int) -> str:
    counts = tile_counts(intervals, block_q, block_k)
    return f"{counts[Tile.FULL]} full, {counts[Tile.PARTIAL]} partial, {counts[Tile.SKIP]} skipped"


def _describe_mask(title: str, intervals: RowIntervals, block_q: int | None, block_k: int | None) -> str:
    entries = intervals.start.shape[0]
    pairs, all_pairs = intervals.visible_pairs(), entries * intervals.q_len * intervals.kv_len
    batch = f", {entries} sequences" if entries > 1 else ""
    text = (
        f"{title}: {intervals.q_len} query rows by {intervals.kv_len} keys{batch}; "
        f"{pairs:,} of {all_pairs:,} pairs visible ({100 * pairs / all_pairs:.0f}%)."
    )
    blind = int(intervals.empty_rows().sum())
    if blind:
        text += f" {blind} rows see nothing."
    if block_q is not None:
        text += f" Tiles of {block_q} x {block_k}: {_told_counts(intervals, block_q, block_k)}."
    return text


def _whole_numbers():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=9)
