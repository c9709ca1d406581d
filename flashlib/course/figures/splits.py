"""Figures of split-KV decoding: programs on multiprocessors over time, and where the weight of a row lies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flashlib.course.chapters.split_decoding import SPLIT_COST, Program, schedule
from flashlib.course.display import Figure
from flashlib.course.figures import style

_PAIRS = (style.K, style.V, style.Q, style.S, style.O, style.LSE)


def split_schedule(
    tiles: Sequence[int], num_splits: int, sm_count: int, *, split_cost: int = SPLIT_COST, until: int | None = None
) -> Figure:
    """Multiprocessors over time: which split each of them reads, and when it is idle. See `flashlib.course.chapters.split_decoding.schedule`.

    Args:
        tiles: tiles of keys of each pair of a request and a KV head. A pair has one color.
        num_splits: splits of each pair.
        sm_count: multiprocessors.
        split_cost: time of a program beside its tiles, in tiles; drawn in gray.
        until: end of the time axis, so that several figures can be compared; the end of the launch if left out.

    Raises:
        ValueError: as `schedule`, or there is nothing to do.
    """
    launch = schedule(tiles, num_splits, sm_count, split_cost=split_cost)
    if not launch.programs:
        raise ValueError(f"tiles must hold at least one tile; got {list(tiles)}")
    end = max(launch.time, until or 0)
    splits = _count(num_splits, "split")
    title = f"{splits} of each: done after {launch.time}, keys are read in {launch.reading:.0%} of the time"
    with style.canvas(height=1.1 + 0.26 * sm_count) as fig:
        ax = fig.add_subplot()
        for program in launch.programs:
            _draw_program(ax, program, split_cost)
        ax.axvline(launch.time, color=style.INK, linewidth=1, linestyle=(0, (1, 2)))
        ax.set(
            xlim=(0, 1.01 * end), ylim=(sm_count - 0.45, -0.55), xlabel="time (tiles of keys)", ylabel="multiprocessor"
        )
        ax.set_yticks(range(0, sm_count, 1 if sm_count <= 12 else 4))
        ax.set_title(title)
        return Figure(
            fig,
            alt=f"{_told(tiles)} on {_count(sm_count, 'multiprocessor')}, {splits} of each. Of the multiprocessors {launch.busy} "
            f"had something to do, the last program ended after the time of {launch.time} tiles, and keys were read in "
            f"{launch.reading:.0%} of all multiprocessors' time.",
        )


def split_shares(shares: Tensor, *, title: str) -> Figure:
    """How the weight of one query is spread over the splits of its keys, for each head.

    Args:
        shares: ``[heads, splits]``; each row sums to 1.
        title: what is shown.

    Raises:
        ValueError: the shape is another, or a row does not sum to 1.
    """
    if shares.dim() != 2 or not len(shares) or not bool(((shares.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(f"shares must be [heads, splits], with rows that sum to 1; got shape {tuple(shares.shape)}")
    heads, splits = shares.shape
    with style.canvas(height=1.1 + 0.3 * heads) as fig:
        ax = fig.add_subplot()
        for head, row in enumerate(shares.tolist()):
            left = 0.0
            for split, share in enumerate(row):
                color = style.tint(style.K, 0.2 + 0.8 * (split + 1) / splits)
                ax.barh(head, share, left=left, height=0.78, color=color, edgecolor=style.PAPER, linewidth=0.8)
                if share > 0.05:
                    ink = style.readable_on(color)
                    ax.text(left + share / 2, head, str(split), ha="center", va="center", fontsize=8.5, color=ink)
                left += share
        ax.set(xlim=(0, 1), ylim=(heads - 0.5, -0.5), xlabel="share of the weight, by split", ylabel="head")
        ax.set_yticks(range(heads))
        ax.set_title(title)
        told = "; ".join(
            f"head {head}: split {int(row.argmax())} has {float(row.max()):.1f}" for head, row in enumerate(shares)
        )
        return Figure(fig, alt=f"{title}. The heaviest of {splits} splits, and its share. {told}.")


def _draw_program(ax, program: Program, split_cost: int) -> None:
    color = _PAIRS[program.pair % len(_PAIRS)]
    bar = {"y": program.sm, "height": 0.78, "edgecolor": style.PAPER, "linewidth": 0.8}
    ax.barh(width=program.tiles, left=program.start, color=style.tint(color, 0.75), **bar)
    ax.barh(width=split_cost, left=program.start + program.tiles, color=style.RULE, **bar)


def _told(tiles: Sequence[int]) -> str:
    counts = ", ".join(str(count) for count in tiles[:6]) + (", ..." if len(tiles) > 6 else "")
    return f"{_count(len(tiles), 'pair')} of a request and a KV head, with {counts} tiles of keys,"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
