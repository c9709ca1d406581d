"""Figures of the attention weights themselves, and of the online softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashlib.course.display import Figure
from flashlib.course.figures import style

_MOST_LABELS = 48  # more token labels than this would overlap
_MOST_ROWS_TOLD = 12  # rows that the alt text describes one by one
_MOST_CELLS_WRITTEN = 100  # larger matrices show colors only


def attention_matrix(
    weights: Tensor,
    tokens_q: Sequence[str] | None = None,
    tokens_k: Sequence[str] | None = None,
    *,
    title: str = "Attention weights",
) -> Figure:
    """Attention weights as a heat map: one row per query, one column per key, darker is more.

    Args:
        weights: `[Sq, Sk]`, probabilities of one head (each row sums to 1, or to 0 if it sees nothing).
        tokens_q, tokens_k: labels of rows and columns; positions if left out. `tokens_k` defaults to `tokens_q` if the
            matrix is square.
        title: above the figure.

    Raises:
        ValueError: `weights` is not a matrix, or the labels are not as many as rows and columns.
    """
    weights = torch.as_tensor(weights).detach().double().cpu()
    if weights.dim() != 2 or not weights.numel():
        raise ValueError(f"weights must be [Sq, Sk] of one head, and not empty; got shape {tuple(weights.shape)}")
    rows, columns = weights.shape
    if tokens_k is None and rows == columns:
        tokens_k = tokens_q
    labels_q, labels_k = _labels("tokens_q", tokens_q, rows), _labels("tokens_k", tokens_k, columns)

    side = min(0.42 * max(rows, columns, 5), 6.0)
    with style.canvas(
        min(side * min(columns / rows, 1.6) + 2.2, style.WIDTH), side * min(rows / columns, 1.0) + 1.2
    ) as fig:
        ax = fig.add_subplot()
        image = ax.imshow(
            weights.numpy(), cmap=style.white_to(style.S), vmin=0, vmax=max(float(weights.max()), 1e-12), aspect="auto"
        )
        _token_axis(ax.xaxis, labels_k, columns, rotation=60 if max(map(len, labels_k)) > 3 else 0)
        _token_axis(ax.yaxis, labels_q, rows)
        ax.set(xlabel="key", ylabel="query")
        ax.set_title(title)
        ax.spines[:].set_visible(True)
        if weights.numel() <= _MOST_CELLS_WRITTEN:
            for i, j in weights.ge(0.005).nonzero().tolist():  # a row of zeros would only distract
                weight = float(weights[i, j])
                color = style.readable_on(image.cmap(image.norm(weight))[:3])
                ax.text(j, i, f"{weight:.2f}".removeprefix("0"), ha="center", va="center", fontsize=8, color=color)
        bar = fig.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("weight")
        return Figure(fig, alt=_describe_weights(title, weights, labels_q, labels_k))


def online_softmax_trace(x: Tensor | Sequence[float], block: int, *, upto: int | None = None) -> Figure:
    """The running softmax statistics of one row of scores, as its blocks arrive.

    Three panels over the blocks: the scores with the running maximum m; the factor exp(m_old - m_new) by which each block
    makes the old sum shrink; and the running sum l, split into what was kept and what the block added.

    Args:
        x: `[N]`, the scores of one row. -inf (masked) is drawn as a missing bar.
        block: scores per block.
        upto: show only the first `upto` blocks as seen, the rest pale. None: all.

    Raises:
        ValueError: `x` is not one-dimensional or is empty, or `block` or `upto` is out of range.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
    """
    x = torch.as_tensor(x, dtype=torch.float64).detach().cpu()
    if x.dim() != 1 or not len(x):
        raise ValueError(f"x must be one row of scores [N], and not empty; got shape {tuple(x.shape)}")
    if block < 1:
        raise ValueError(f"block must be at least 1; got {block}")
    from matplotlib.ticker import MaxNLocator

    steps = running_softmax(x, block)
    seen = len(steps) if upto is None else upto
    if not 1 <= seen <= len(steps):
        raise ValueError(f"upto must be 1 to {len(steps)}, the number of blocks; got {upto}")

    with style.canvas(height=5.2) as fig:
        scores, factors, sums = fig.subplots(3, 1, sharex=True, height_ratios=[2.2, 1, 1.6])
        _draw_scores(scores, x, block, steps, seen)
        centers = [(min((b + 1) * block, len(x)) + b * block - 1) / 2 for b in range(seen)]
        widths = [0.8 * (min((b + 1) * block, len(x)) - b * block) for b in range(seen)]
        _draw_factors(factors, centers, widths, steps[:seen])
        _draw_sums(sums, centers, widths, steps[:seen])
        sums.xaxis.set_major_locator(MaxNLocator(integer=True))
        sums.set_xlabel(f"position in the row, in blocks of {block}")
        return Figure(fig, alt=_describe_steps(x, block, steps[:seen]))


def running_softmax(x: Tensor, block: int) -> list[tuple[float, float, float, float]]:
    """(m, rescale factor, part of l kept, part of l added) after each block of `x` `[N]`. l is the sum of the two parts."""
    m, l, steps = float("-inf"), 0.0, []
    for scores in x.double().split(block):
        m_new = max(m, float(scores.max()))
        pivot = m_new if m_new > float("-inf") else 0.0
        factor = float(torch.exp(torch.tensor(m - pivot, dtype=torch.float64)))
        added = float(torch.exp(scores - pivot).sum())
        steps.append((m_new, factor, l * factor, added))
        m, l = m_new, l * factor + added
    return steps


def _draw_scores(ax, x, block, steps, seen) -> None:
    shown = x.clamp(min=float(x[x > float("-inf")].min()) if (x > float("-inf")).any() else 0.0)
    floor = min(0.0, float(shown.min()))
    for at in range(len(x)):
        if x[at] > float("-inf"):
            ax.bar(at, float(x[at]), 0.8, color=style.tint(style.S, 0.75 if at < seen * block else 0.2))
    for b in range(1, len(steps)):
        ax.axvline(b * block - 0.5, color=style.RULE, linewidth=1, zorder=0)
    edges = [min(b * block, len(x)) - 0.5 for b in range(seen + 1)]
    maxima = [step[0] for step in steps[:seen]]
    ax.stairs(
        [m if m > float("-inf") else float("nan") for m in maxima], edges, color=style.INK, linewidth=2, baseline=None
    )
    ax.annotate(
        f"m = {maxima[-1]:.2f}", (edges[-1], max(maxima[-1], floor)), xytext=(-4, 5), textcoords="offset points",
        ha="right", fontweight="bold", bbox={"facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    ax.axhline(0, color=style.SOFT_INK, linewidth=0.8)
    ax.margins(x=0.01, y=0.18)
    ax.set_ylabel("score")
    ax.set_title("Scores, and the running maximum m")


def _draw_factors(ax, centers, widths, steps) -> None:
    ax.bar(centers, [step[1] for step in steps], widths, color=style.tint(style.LSE, 0.55))
    for center, step in zip(centers, steps, strict=True):
        ax.text(center, step[1] + 0.05, f"{step[1]:.2g}", ha="center", va="bottom", fontsize=9)
    ax.set(ylim=(0, 1.45), yticks=[0, 1], ylabel="factor")
    ax.set_title("The old sum is multiplied by exp(m_old − m_new)")


def _draw_sums(ax, centers, widths, steps) -> None:
    kept, added = [step[2] for step in steps], [step[3] for step in steps]
    ax.bar(centers, kept, widths, color=style.tint(style.S, 0.35), label="kept: old l × factor")
    ax.bar(centers, added, widths, bottom=kept, color=style.tint(style.S, 0.85), label="added by this block")
    for center, old, new in zip(centers, kept, added, strict=True):
        ax.text(center, old + new, f"{old + new:.2f}", ha="center", va="bottom", fontsize=9)
    ax.margins(y=0.25)
    ax.set_ylabel("l")
    ax.set_title("The running sum l of exp(score − m)")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderaxespad=0)


def _describe_weights(title: str, weights: Tensor, labels_q: list[str], labels_k: list[str]) -> str:
    rows, columns = weights.shape
    told = [
        f"{labels_q[i]!r} to {labels_k[int(weights[i].argmax())]!r} {float(weights[i].max()):.2f}"
        for i in range(min(rows, _MOST_ROWS_TOLD))
        if float(weights[i].max()) > 0
    ]
    more = f" (first {_MOST_ROWS_TOLD} of {rows} rows)" if rows > _MOST_ROWS_TOLD else ""
    blind = int((weights.sum(1) == 0).sum())
    empty = f" {blind} rows see nothing." if blind else ""
    return f"{title}: heat map of {rows} queries by {columns} keys. Strongest key of each query{more}: {'; '.join(told)}.{empty}"


def _describe_steps(x: Tensor, block: int, steps: list[tuple[float, float, float, float]]) -> str:
    told = [
        f"block {b + 1}: m = {m:.2f}, factor {factor:.2g}, l = {kept + added:.2f}"
        for b, (m, factor, kept, added) in enumerate(steps)
    ]
    return f"Online softmax over {len(x)} scores in blocks of {block}. " + "; ".join(told) + "."


def _labels(name: str, tokens: Sequence[str] | None, count: int) -> list[str]:
    if tokens is None:
        return [str(at) for at in range(count)]
    if len(tokens) != count:
        raise ValueError(f"{name} must be {count} labels, one for each row or column of weights; got {len(tokens)}")
    return [
        str(token).replace("\n", "⏎").replace(" ", "␣") if str(token).isspace() else str(token).strip()
        for token in tokens
    ]


def _token_axis(axis, labels: list[str], count: int, rotation: int = 0) -> None:
    if count <= _MOST_LABELS:
        axis.set_ticks(range(count), labels, fontsize=9 if count <= 24 else 7)
        if rotation:
            for label in axis.get_ticklabels():
                label.set(rotation=rotation, ha="right", rotation_mode="anchor")
    axis.set_tick_params(length=0)
