"""Figures of heads, positions and the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashlib.course.display import Figure, format_bytes, format_number
from flashlib.course.figures import style


def layout_heads(q_heads: int, kv_heads: int) -> Figure:
    """Which query heads share which KV head: multi-head, grouped-query or multi-query attention.

    Args:
        q_heads, kv_heads: numbers of heads; `kv_heads` divides `q_heads`.

    Raises:
        ValueError: it does not, or a number is below 1.

    Source: Ainslie et al. 2023, "GQA", figure 2.
    """
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"kv_heads must divide q_heads, both at least 1; got q_heads={q_heads}, kv_heads={kv_heads}")
    group = q_heads // kv_heads
    kind = {1: "multi-query" if q_heads == 1 else "multi-head", q_heads: "multi-query"}.get(group, "grouped-query")
    short = {"multi-head": "MHA", "multi-query": "MQA", "grouped-query": "GQA"}[kind]
    across, down = min(0.62, style.WIDTH / (q_heads + 1.6)), 0.5
    x = (-0.75 / across, q_heads + 0.2)
    title = f"{short}: {q_heads} query heads, {_count(kv_heads, 'KV head')}"
    with style.drawing(x, (-0.2, 3.5), title, unit=(across, down)) as (fig, ax):
        for g in range(kv_heads):
            center = g * group + group / 2
            for h in range(g * group, (g + 1) * group):
                ax.plot([h + 0.5, center], [0.95, 2.0], color=style.LSE, linewidth=1.2, zorder=0)
                _head(ax, h, 0.1, 0.85, style.Q, f"Q{h}", labelled=q_heads <= 20)
            _head(ax, center - 0.5, 2.0, 0.65, style.K, f"K{g}", labelled=q_heads <= 20)
            _head(ax, center - 0.5, 2.7, 0.65, style.V, f"V{g}", labelled=q_heads <= 20)
        for y, text in ((0.52, "queries"), (2.68, "cache")):
            ax.text(-0.1 / across, y, text, ha="right", va="center", fontsize=9, color=style.SOFT_INK)
        return Figure(
            fig,
            alt=f"{kind.capitalize()} attention ({short}): {q_heads} query heads and {_count(kv_heads, 'KV head')}; "
            f"{_count(group, 'query head')} to each KV head, so the cache is {kv_heads}/{q_heads} the size of "
            "multi-head attention's.",
        )


def head_gallery(weights: Tensor, kv_heads: int, *, title: str) -> Figure:
    """The attention weights of all heads of a layer, one small heat map each; heads in a row share a KV head.

    Args:
        weights: `[Hq, S, S]`, causal probabilities: row i sums to 1 over the keys up to i.
        kv_heads: Hkv, a divisor of Hq.
        title: above the figure.

    Raises:
        ValueError: a shape does not fit.
    """
    weights = torch.as_tensor(weights).detach().float().cpu()
    if weights.dim() != 3 or weights.shape[1] != weights.shape[2] or weights.shape[1] < 2:
        raise ValueError(f"weights must be [Hq, S, S] with S at least 2; got shape {tuple(weights.shape)}")
    q_heads = weights.shape[0]
    if kv_heads < 1 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {q_heads} heads of weights; got {kv_heads}")
    group = q_heads // kv_heads
    side = min(1.75, (style.WIDTH - 0.6) / group)
    with style.canvas(side * group + 0.6, (side + 0.2) * kv_heads + 0.4, layout="compressed") as fig:
        for h, ax in enumerate(fig.subplots(kv_heads, group, squeeze=False).flat):
            ax.imshow(weights[h].numpy(), cmap=style.white_to(style.S), vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
            ax.set_title(f"head {h}", fontsize=9, fontweight="normal", pad=3)
            if h % group == 0:
                ax.set_ylabel(f"KV head {h // group}", color=style.K, fontweight="bold")
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        told = "; ".join(f"head {h}: {_describe_head(weights[h])}" for h in range(q_heads))
        return Figure(
            fig, alt=f"{title}. Mean weight of the first token, the token itself and the one before it. {told}."
        )


def rotary_figure(
    head_dim: int, positions: Sequence[int], base: float = 10_000.0, *, pairs: Sequence[int] | None = None
) -> Figure:
    """How rotary embedding turns the channel pairs of a head: one dial per pair, one hand per position.

    Args:
        head_dim: channels that turn; even.
        positions: the positions to draw, darker for later ones.
        base: as in `flashlib.rotary.rotary_frequencies`.
        pairs: which of the `head_dim / 2` pairs to show; five of them, evenly spaced, if left out.

    Raises:
        ValueError: there is no position, or a pair does not exist; or as `rotary_frequencies`.

    Source: Su et al. 2021, "RoFormer", equation 15.
    """
    import math

    from flashlib.rotary import rotary_frequencies

    frequencies = rotary_frequencies(head_dim, base).tolist()
    if not len(positions):
        raise ValueError("positions must hold at least one position; it is empty")
    last = len(frequencies) - 1
    pairs = sorted({round(at * last / 4) for at in range(5)}) if pairs is None else list(pairs)
    if not pairs or not all(0 <= pair <= last for pair in pairs):
        raise ValueError(f"pairs must be among 0 to {last}; got {pairs}")

    turns = [f"pair {pair} turns once in {format_number(2 * math.pi / frequencies[pair])} positions" for pair in pairs]
    with style.canvas(style.WIDTH, style.WIDTH / max(len(pairs), 4) + 1.0, layout="compressed") as fig:
        for ax, pair in zip(fig.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
            _dial(ax, [position * frequencies[pair] for position in positions])
            ax.set_title(f"pair {pair}", loc="center", fontsize=10)
            period = f"one turn in\n{format_number(2 * math.pi / frequencies[pair])} positions"
            ax.text(0, -1.3, period, ha="center", va="top", fontsize=9, color=style.SOFT_INK)
        title = f"RoPE, head_dim {head_dim}, base {format_number(base)}: positions {_listed(positions)}"
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        return Figure(
            fig,
            alt=f"Rotary embedding of head_dim {head_dim}, base {format_number(base)}, at positions {_listed(positions)}: "
            + "; ".join(turns)
            + ".",
        )


def cache_figure(prompt_len: int, new_tokens: int, capacity: int, *, bytes_per_token: int | None = None) -> Figure:
    """A KV cache filling: one row per forward pass, first the prompt, then one token at a time.

    Args:
        prompt_len: tokens that the first pass (prefill) writes.
        new_tokens: decoding steps after it, each writing one token.
        capacity: slots in the cache.
        bytes_per_token: size of one token's K and V over all layers; then each row also shows the bytes held.

    Raises:
        ValueError: a number is negative, or the tokens do not fit.
    """
    if prompt_len < 1 or new_tokens < 0 or capacity < prompt_len + new_tokens:
        raise ValueError(
            "prompt_len (at least 1) and new_tokens (at least 0) must fit into capacity; "
            f"got prompt_len={prompt_len}, new_tokens={new_tokens}, capacity={capacity}"
        )
    across, down = min(0.34, (style.WIDTH - 1.9) / capacity), 0.36  # inches per slot and per row
    x = (-0.95 / across, capacity + (0.95 / across if bytes_per_token else 0.2))
    with style.drawing(x, (-0.3, new_tokens + 2.0), f"KV cache of {capacity} slots", unit=(across, down)) as (fig, ax):
        for step in range(new_tokens + 1):
            held = prompt_len + step
            _cache_row(ax, step, written_from=0 if step == 0 else held - 1, held=held, capacity=capacity)
            name = "prefill" if step == 0 else f"decode {step}"
            ax.text(-0.1 / across, step + 0.38, name, ha="right", va="center", fontsize=9)
            if bytes_per_token:
                size = format_bytes(held * bytes_per_token)
                ax.text(capacity + 0.15 / across, step + 0.38, size, va="center", fontsize=9)
        _cache_legend(ax, new_tokens + 1.2, across)
        size = f", {format_bytes((prompt_len + new_tokens) * bytes_per_token)}" if bytes_per_token else ""
        return Figure(
            fig,
            alt=f"KV cache of {capacity} slots: prefill writes {prompt_len}, then {new_tokens} decoding steps write one "
            f"each and read all before; {prompt_len + new_tokens} slots are full at the end{size}.",
        )


def _describe_head(weights: Tensor) -> str:
    """Where one head's rows look, from the second row on (the first has no choice)."""
    places = (weights[1:, 0], weights.diagonal()[1:], weights.diagonal(-1))
    return ", ".join(f"{float(place.mean()):.2f}" for place in places)


def _head(ax, x, y, height, color, label, *, labelled: bool) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x + 0.06, y), 0.88, height, facecolor=color))
    if labelled:
        ink = style.readable_on(style.tint(color, 1.0))
        ax.text(x + 0.5, y + height / 2, label, ha="center", va="center", fontsize=9, color=ink, fontweight="bold")


def _dial(ax, angles: Sequence[float]) -> None:
    import math

    from matplotlib.patches import Circle

    ax.add_patch(Circle((0, 0), 1, facecolor=style.tint(style.Q, 0.05), edgecolor=style.RULE))
    for at, angle in enumerate(angles):
        color = style.tint(style.Q, 0.3 + 0.7 * (at + 1) / len(angles))
        tip = (math.cos(angle), math.sin(angle))
        hand = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", tip, (0, 0), arrowprops=hand)
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    ax.set_axis_off()


def _cache_row(ax, y: float, *, written_from: int, held: int, capacity: int) -> None:
    for slot in range(capacity):
        _cache_slot(ax, slot, y, 1, 0.76, strength=0.0 if slot >= held else 1.0 if slot >= written_from else 0.35)


def _cache_slot(ax, x: float, y: float, width: float, height: float, *, strength: float) -> None:
    """One token: its K above, its V below."""
    from matplotlib.patches import Rectangle

    edge = style.PAPER if strength else style.RULE
    for part, color in enumerate((style.K, style.V)):
        face = style.tint(color, strength)
        corner = (x, y + part * height / 2)
        ax.add_patch(Rectangle(corner, width, height / 2, facecolor=face, edgecolor=edge, linewidth=0.7))


def _cache_legend(ax, y: float, across: float) -> None:
    x = 0.0
    for text, strength in (("written now (K above, V below)", 1.0), ("held from before", 0.35), ("empty", 0.0)):
        _cache_slot(ax, x, y, 0.2 / across, 0.5, strength=strength)
        ax.text(x + 0.27 / across, y + 0.25, text, va="center", fontsize=9)
        x += (0.5 + 0.073 * len(text)) / across


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(positions: Sequence[int]) -> str:
    if len(positions) <= 6:
        return ", ".join(str(position) for position in positions)
    return f"{positions[0]}, {positions[1]}, ..., {positions[-1]}"
