"""The figure of chapter 17: which pairs each rank of a ring computes in a step, who waits, and what came."""

from __future__ import annotations

from flashlib.course.chapters.many_gpus import Step, idle_share, ring_steps
from flashlib.course.display import Figure, format_bytes
from flashlib.course.figures import style
from flashlib.masks import Causal, Mask
from flashlib.parallel.layout import part_positions

RANK_COLORS = (style.Q, style.K, style.V, style.O, style.S, style.LSE)


def ring_sweep(layout: str, step: int, *, ranks: int = 4, length: int = 32, mask: Mask | None = None) -> Figure:
    """A step of a ring: on the left rows by keys, each pair in the color of its rank; on the right how long each rank computes.

    Args:
        layout: of tokens, one of :data:`flashlib.parallel.LAYOUTS`. step: from 0, in which each rank has its own keys.
        ranks: at most six. length: tokens. mask: causal unless given.

    Raises:
        ValueError: there is no such step, or there are too many ranks.
    """
    if not 0 <= step < ranks <= len(RANK_COLORS):
        raise ValueError(
            f"step must lie between 0 and {ranks - 1}, ranks be at most {len(RANK_COLORS)}; got {step} and {ranks}"
        )
    rule = mask or Causal()
    steps = ring_steps(length, ranks, layout, rule)
    now = {found.rank: found for found in steps if found.step == step}
    most = max(found.pairs for found in now.values())
    with style.canvas(height=4.1) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_pairs(left, layout, step, ranks, length, rule)
        _draw_ranks(right, now, most, ranks)
        waits = 1 - sum(found.pairs for found in now.values()) / max(1, most * ranks)
        fig.suptitle(
            f"step {step} of {ranks}, {layout}: {waits:.0%} of the time idle; over all steps {idle_share(steps):.0%}",
            x=0.01, ha="left", fontsize=11, fontweight="bold",
        )  # fmt: skip
        told = "; ".join(
            f"rank {rank} has the keys of rank {found.source} and computes {found.pairs} pairs, after {format_bytes(found.received)} came"
            for rank, found in sorted(now.items())
        )
        return Figure(
            fig,
            alt=f"{length} tokens on {ranks} ranks, {layout}, step {step}: {told}. Idle in this step: {waits:.0%} of all ranks' time; over all steps: {idle_share(steps):.0%}.",
        )


def _draw_pairs(ax, layout: str, step: int, ranks: int, length: int, rule: Mask) -> None:
    import numpy as np

    intervals = rule.intervals(1, length, length)
    seen = intervals.dense()[0].numpy()
    parts = [part.numpy() for part in part_positions(length, ranks, layout)]
    picture = np.ones((length, length, 3))
    for rank in range(ranks):
        for at in range(ranks):
            strength = 0.28 if at < step else 0.95 if at == step else 0.07
            pairs = np.ix_(parts[rank], parts[(rank - at) % ranks])
            block = picture[pairs]
            block[seen[pairs]] = style.tint(RANK_COLORS[rank], strength)
            picture[pairs] = block
    ax.imshow(picture, interpolation="nearest", aspect="equal", extent=(0, length, length, 0))
    ticks = range(0, length + 1, max(1, length // 8))
    ax.set(xlabel="key", ylabel="row", xticks=ticks, yticks=ticks)
    ax.set_title("strong: now; pale: done", fontweight="normal", fontsize=9.5)
    ax.spines[["top", "right"]].set_visible(True)


def _draw_ranks(ax, now: dict[int, Step], most: int, ranks: int) -> None:
    for rank, found in now.items():
        color = RANK_COLORS[rank]
        ax.barh(rank, found.pairs, height=0.62, color=color)
        ax.barh(
            rank,
            most - found.pairs,
            left=found.pairs,
            height=0.62,
            color=style.FAINT,
            edgecolor=style.RULE,
            hatch="///",
            linewidth=0,
        )
        told = (
            "own keys"
            if found.source == rank
            else f"keys of rank {found.source}: {format_bytes(found.received)}"
            if found.received
            else "nothing came"
        )
        ax.text(0, rank - 0.37, told, fontsize=8.5, color=style.SOFT_INK, va="bottom")
    ax.set(
        ylim=(ranks - 0.45, -0.75), xlim=(0, 1.02 * max(1, most)), xlabel="pairs computed in this step (hatched: waits)"
    )
    ax.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
