"""Which program of the backward owns what, and what it gathers on its way."""

from __future__ import annotations

from dataclasses import dataclass

from flashlib.course.display import Figure
from flashlib.course.figures import style

KERNELS = ("dk_dv", "dq", "one_kernel")
_TITLES = {
    "dk_dv": "dK/dV kernel: a program owns keys, rows pass by",
    "dq": "dQ kernel: a program owns rows, keys pass by",
    "one_kernel": "One kernel: a program owns keys, and adds to everybody's dQ",
}


@dataclass(frozen=True)
class _Place:
    """Where one program is: the tile it works on, the tiles behind it, and how many products it has done."""

    row: int
    key: int
    done: tuple[tuple[int, int], ...]
    products: int


def backward_sweep(kernel: str, program: int, step: int, *, row_tiles: int = 5, key_tiles: int = 5) -> Figure:
    """One program of a backward kernel at one step, under a causal mask: what it holds, what passes by, what it writes where.

    Args:
        kernel: `"dk_dv"`, `"dq"`, or `"one_kernel"` (dQ added to memory by atomics).
        program: which one, from 0: of the key tiles, or for `"dq"` of the row tiles.
        step: from 1; the last one stays for steps beyond.
        row_tiles, key_tiles: square tiles of rows and of keys, aligned bottom-right; not more rows than keys.

    Raises:
        ValueError: an unknown kernel, a program that does not exist, or numbers of tiles that do not fit.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
    if min(row_tiles, key_tiles) < 1:
        raise ValueError(f"row_tiles and key_tiles must be at least 1; got {row_tiles} and {key_tiles}")
    if row_tiles > key_tiles:
        raise ValueError(f"row_tiles must be at most key_tiles, or rows see nothing; got {row_tiles} and {key_tiles}")
    programs = row_tiles if kernel == "dq" else key_tiles
    if not 0 <= program < programs:
        raise ValueError(f"program must be 0 to {programs - 1}; got {program}")
    offset = key_tiles - row_tiles
    seen = [(i, j) for i in range(row_tiles) for j in range(key_tiles) if j <= i + offset]
    visited = [(i, j) for i, j in seen if (i if kernel == "dq" else j) == program]
    at = min(max(step, 1), len(visited)) - 1
    products = {"dk_dv": 4, "dq": 3, "one_kernel": 5}[kernel]
    place = _Place(*visited[at], tuple(visited[:at]), products * (at + 1))

    gap, strip = 0.3, 0.7
    x, y = (-2 * (strip + 0.1) - gap, key_tiles + 4.6), (-2 * (strip + 0.1) - gap, row_tiles + 2 * strip + gap + 0.3)
    title = f"{_TITLES[kernel]}. Step {at + 1} of {len(visited)}"
    with style.drawing(x, y, title, unit=min(0.62, 5.0 / (y[1] - y[0]))) as (fig, ax):
        _scores(ax, seen, place, row_tiles, key_tiles)
        _sides(ax, kernel, place, row_tiles, key_tiles, gap, strip)
        lines = _told(kernel, place)
        for at_line, (name, value) in enumerate(lines):
            ax.text(key_tiles + 1.5, 0.2 + at_line * 0.95, value, va="bottom", fontsize=11, fontweight="bold")
            ax.text(key_tiles + 1.5, 0.24 + at_line * 0.95, name, va="top", fontsize=8.5, color=style.SOFT_INK)
        told = "; ".join(f"{name}: {value}" for name, value in lines)
        return Figure(fig, alt=f"{title}, over {row_tiles} x {key_tiles} tiles. {told}.")


def _told(kernel: str, place: _Place) -> list[tuple[str, str]]:
    i, j = place.row, place.key
    if kernel == "dq":
        return [
            ("held all the time", f"Q{i}  dO{i}  dQ{i}"),
            ("passing by", f"K{j}  V{j}"),
            ("written once, at the end", f"dQ{i}"),
            ("matrix products so far (S, dP, dQ)", f"{place.products}"),
        ]
    lines = [("held all the time", f"K{j}  V{j}  dK{j}  dV{j}"), ("passing by", f"Q{i}  dO{i}")]
    lines.append(("written once, at the end", f"dK{j}  dV{j}"))
    if kernel == "one_kernel":
        lines.append(("added to memory in each step", f"dQ{i}"))
        return [*lines, ("matrix products so far (S, dP, dV, dK, dQ)", f"{place.products}")]
    return [*lines, ("matrix products so far (S, dP, dV, dK)", f"{place.products}")]


def _scores(ax, seen: list[tuple[int, int]], place: _Place, rows: int, keys: int) -> None:
    from matplotlib.patches import Rectangle

    for i in range(rows):
        for j in range(keys):
            color = style.tint(style.S, 0.2) if (i, j) in seen else style.FAINT
            color = style.tint(style.S, 0.5) if (i, j) in place.done else color
            color = style.S if (i, j) == (place.row, place.key) else color
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor=style.PAPER, linewidth=1.5))
    ax.text(place.key + 0.5, place.row + 0.5, "P, dS", ha="center", va="center", color=style.PAPER, fontweight="bold")
    ax.add_patch(Rectangle((0, 0), keys, rows, fill=False, edgecolor=style.SOFT_INK, linewidth=1))


def _sides(ax, kernel: str, place: _Place, rows: int, keys: int, gap: float, strip: float) -> None:
    """Inputs to the left and above, gradients to the right and below; what the program uses now is in full color."""
    for i in range(rows):
        now = i == place.row
        _box(ax, -gap - strip, i, strip, 1, style.Q, now, f"Q{i}")
        _box(ax, -gap - 2 * strip - 0.1, i, strip, 1, style.O, now, f"dO{i}")
        if kernel != "dk_dv":
            _box(ax, keys + gap, i, strip, 1, style.Q, now, f"dQ{i}", hatched=kernel == "one_kernel" and now)
    for j in range(keys):
        now = j == place.key
        _box(ax, j, -gap - strip, 1, strip, style.V, now, f"V{j}")
        _box(ax, j, -gap - 2 * strip - 0.1, 1, strip, style.K, now, f"K{j}")
        if kernel != "dq":
            _box(ax, j, rows + gap, 1, strip, style.K, now, f"dK{j}")
            _box(ax, j, rows + gap + strip + 0.1, 1, strip, style.V, now, f"dV{j}")


def _box(ax, x, y, width, height, color, now: bool, label: str, *, hatched: bool = False) -> None:
    from matplotlib.patches import Rectangle

    face = style.tint(color, 1.0 if now else 0.14)
    hatch = "///" if hatched else None
    ax.add_patch(
        Rectangle((x, y), width, height, facecolor=face, edgecolor=style.PAPER, linewidth=1.5, hatch=hatch)
    )  # fmt: skip
    ax.text(
        x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=9, color=style.readable_on(face),
        fontweight="bold" if now else "normal",
    )  # fmt: skip
