"""Examples small enough to follow with a pencil: a row of four scores, and a matrix of four by four."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashlib.course.display import Figure
from flashlib.course.figures import style

__all__ = ["row_by_hand", "tiles_by_hand"]

_CELL = 0.62  # inches
_INF = float("inf")


def row_by_hand(scores: Sequence[float], values: Sequence[float], block: int, seen: int) -> Figure:
    """The online softmax over one row, with every number written out: the first ``seen`` blocks, and after the last one the output.

    Args:
        scores: of one query. values: one number for each key.
        block: keys in a block, a divisor of their number.
        seen: blocks that have been taken in, from 0 on; one more than there are divides.

    Raises:
        ValueError: an argument is not as described.
    """
    count = len(scores) // block if block >= 1 else 0
    if len(values) != len(scores) or not count or count * block != len(scores):
        raise ValueError(
            f"block must divide {len(scores)} scores with a value each; got {block} and {len(values)} values"
        )
    if not 0 <= seen <= count + 1:
        raise ValueError(f"seen must be from 0 to {count + 1}; got {seen}")
    states, lines = _row_states(scores, values, block, min(seen, count))
    m, l, acc = states[-1]
    if seen > count:
        lines = [
            f"output = acc / l = {acc:.3f} / {l:.3f} = {acc / l:.3f}",
            f"lse = m + log l = {m:g} + {math.log(l):.3f} = {m + math.log(l):.3f}",
        ]
    title = "Nothing seen yet" if not seen else f"Block {seen} of {count}" if seen <= count else "The end: one division"
    width = style.WIDTH / _CELL
    with style.drawing((0, width), (0, 6.2), title, unit=_CELL) as (fig, ax):
        for row, (name, numbers, color) in enumerate((("score", scores, style.S), ("value", values, style.V))):
            ax.text(1.35, row + 0.75, name, ha="right", va="center", fontsize=10)
            for j, number in enumerate(numbers):
                now = seen <= count and j // block == seen - 1
                _box(
                    ax,
                    1.6 + j + 0.35 * (j // block),
                    row + 0.3,
                    f"{number:g}",
                    color,
                    0.75 if now else 0.3 if j // block < seen else 0.06,
                )
        for at, line in enumerate(lines):
            ax.text(0.3, 2.95 + 0.58 * at, line, fontsize=10.5, va="center")
        for at, (name, number) in enumerate((("m", m), ("l", l), ("acc", acc))):
            ax.text(
                9.0,
                0.5 + 0.8 * at,
                f"{name} = {_told(number)}",
                fontsize=11.5,
                va="center",
                fontweight="bold",
                color=style.O,
            )
        return Figure(
            fig,
            alt=f"{title}. Scores {_list(scores)}, values {_list(values)}. m = {_told(m)}, l = {_told(l)}, acc = {_told(acc)}. {' '.join(lines)}",
        )


def _row_states(scores, values, block: int, seen: int) -> tuple[list[tuple[float, float, float]], list[str]]:
    """The state before the first block and after each, and how the last one came about."""
    states, lines = [(-_INF, 0.0, 0.0)], ["m begins at -∞, l and acc at 0."]
    for b in range(seen):
        m, l, acc = states[-1]
        now, held = scores[b * block : (b + 1) * block], values[b * block : (b + 1) * block]
        new = max(m, *now)
        factor = math.exp(m - new)
        terms = [math.exp(score - new) for score in now]
        powers = " + ".join(f"e^({score:g} - {new:g})" for score in now)
        weighted = " + ".join(f"{term:.3f} · {value:g}" for term, value in zip(terms, held, strict=True))
        after = l * factor + sum(terms), acc * factor + sum(t * v for t, v in zip(terms, held, strict=True))
        lines = [
            f"m: the larger of {_told(m)} and {max(now):g} is {new:g}",
            f"factor for what was summed before: e^({_told(m)} - {new:g}) = {factor:.3f}",
            f"l: {l:.3f} · {factor:.3f} + {powers} = {after[0]:.3f}",
            f"acc: {acc:.3f} · {factor:.3f} + {weighted} = {after[1]:.3f}",
        ]
        states.append((new, *after))
    return states, lines


def tiles_by_hand(scores: Sequence[Sequence[float]], values: Sequence[float], block: int, step: int) -> Figure:
    """A small score matrix in square tiles, rows outside: the state of every row after ``step`` tiles.

    Args:
        scores: a square matrix. values: one number for each key.
        block: rows and keys of a tile, a divisor of the size.
        step: tiles that have been taken in, from 0 to all of them.

    Raises:
        ValueError: an argument is not as described.
    """
    size = len(scores)
    if block < 1 or size % block or any(len(row) != size for row in scores) or len(values) != size:
        raise ValueError(
            f"scores must be square, of a size that block divides, with a value for each key; got {size} rows and block {block}"
        )
    side = size // block
    if not 0 <= step <= side * side:
        raise ValueError(f"step must be from 0 to {side * side}; got {step}")
    done = {divmod(i, side) for i in range(step)}
    now = divmod(step - 1, side) if step else None
    states, outs = [], []
    for i, row in enumerate(scores):
        seen = sum((i // block, b) in done for b in range(side))
        states.append(_row_states(row, values, block, seen)[0][-1])
        outs.append(states[-1][2] / states[-1][1] if seen == side else None)
    what = (
        "Before the first tile"
        if now is None
        else f"Tile {step} of {side * side}: rows {now[0] * block} to {(now[0] + 1) * block - 1}, keys {now[1] * block} to {(now[1] + 1) * block - 1}"
    )
    with style.drawing((0, style.WIDTH / _CELL), (0, size + 1.7), what, unit=_CELL) as (fig, ax):
        for j, value in enumerate(values):
            _box(
                ax,
                1.4 + j + 0.2 * (j // block),
                0.15,
                f"{value:g}",
                style.V,
                0.6 if now and j // block == now[1] else 0.12,
            )
        ax.text(1.2, 0.6, "values", ha="right", va="center", fontsize=9)
        for column, name in enumerate(("m", "l", "acc", "output")):
            ax.text(7.2 + 1.5 * column, 1.05, name, ha="center", va="center", fontsize=10, fontweight="bold")
        for i, row in enumerate(scores):
            y = 1.35 + i + 0.2 * (i // block)
            ax.text(1.2, y + 0.45, f"row {i}", ha="right", va="center", fontsize=9)
            for j, score in enumerate(row):
                tile = (i // block, j // block)
                _box(
                    ax,
                    1.4 + j + 0.2 * (j // block),
                    y,
                    f"{score:g}",
                    style.S,
                    0.75 if tile == now else 0.3 if tile in done else 0.06,
                )
            numbers = [*map(_told, states[i]), "" if outs[i] is None else f"{outs[i]:.3f}"]
            for column, number in enumerate(numbers):
                ax.text(7.2 + 1.5 * column, y + 0.45, number, ha="center", va="center", fontsize=10)
        told = "; ".join(
            f"row {i}: m = {_told(m)}, l = {_told(l)}, acc = {_told(acc)}" for i, (m, l, acc) in enumerate(states)
        )
        finished = "; ".join(f"row {i} {out:.3f}" for i, out in enumerate(outs) if out is not None) or "none"
        return Figure(fig, alt=f"{what}. {told}. Outputs: {finished}.")


def _box(ax, x: float, y: float, text: str, color: str, strength: float) -> None:
    from matplotlib.patches import Rectangle

    fill = style.tint(color, strength)
    ax.add_patch(Rectangle((x, y), 0.92, 0.92, facecolor=fill, edgecolor=style.RULE))
    ax.text(x + 0.46, y + 0.46, text, ha="center", va="center", fontsize=11, color=style.readable_on(fill))


def _told(number: float) -> str:
    return "-∞" if number == -_INF else f"{number:.3f}".rstrip("0").rstrip(".")


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
