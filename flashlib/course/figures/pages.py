"""Figures of a paged cache: which request's tokens lie where."""

from __future__ import annotations

from collections.abc import Mapping

from flashlib.course.display import Figure
from flashlib.course.figures import style
from flashlib.inference.paged import PagedKVCache

_NUMBERED = 4  # up to this page size the slots are wide enough to say which token they hold
_ROW = 1.2  # inches down for one unit of the drawing
_GAP = 0.14  # between two pages, in widths of a page


def page_map(cache: PagedKVCache, names: Mapping[str, int], *, title: str) -> Figure:
    """The memory of a paged cache: every page with its slots, in the colors of the requests that hold it.

    A slot that holds a token is dark, one that is reserved in vain is light. A page that several requests hold has a stripe for each.
    Slots that are wide enough say which token they hold.

    Args:
        cache: what to draw.
        names: its requests, by the names they get in the figure.
        title: above the figure.

    Raises:
        ValueError: the names are not those of all requests in the cache.
    """
    if sorted(names.values()) != sorted(cache.requests):
        raise ValueError(f"names must name all requests, {sorted(cache.requests)}; got {dict(names)}")
    held = _held(cache, names)
    colors = dict(zip(names, _colors(names), strict=True))
    slots_in_a_row = 24 if cache.page_size <= _NUMBERED else 64
    across = max(1, min(slots_in_a_row // cache.page_size, 12, cache.num_pages))
    rows = -(-cache.num_pages // across)
    width = style.WIDTH / (across * (1 + _GAP) + 0.1)
    with style.drawing((0, across * (1 + _GAP)), (0, rows * 0.56 + 0.06), title, unit=(width, _ROW)) as (fig, ax):
        for page in range(cache.num_pages):
            x, y = page % across * (1 + _GAP) + _GAP / 2, page // across * 0.56 + 0.16
            _draw_page(ax, x, y, page, held[page], cache.page_size, colors)
        return Figure(fig, alt=_told(cache, names, held, title))


def _held(cache: PagedKVCache, names: Mapping[str, int]) -> list[dict[str, range]]:
    """For each page, who holds it, and which of his tokens it has."""
    held: list[dict[str, range]] = [{} for _ in range(cache.num_pages)]
    requests = list(names.values())
    tables, lengths = cache.block_table(requests).tolist(), cache.lengths(requests).tolist()
    for name, row, length in zip(names, tables, lengths, strict=True):
        for first in range(0, length, cache.page_size):
            held[row[first // cache.page_size]][name] = range(first, min(first + cache.page_size, length))
    return held


def _colors(names: Mapping[str, int]) -> list[str]:
    hues = (style.Q, style.K, style.V, style.S, style.O, style.LSE)
    return [
        hues[(ord(name[0]) - ord("a")) % len(hues)] for name in names
    ]  # a request keeps its color from step to step


def _draw_page(
    ax, x: float, y: float, page: int, held: dict[str, range], page_size: int, colors: dict[str, str]
) -> None:
    from matplotlib.patches import Rectangle

    height, slot = 0.34, 1 / page_size
    stripe = height / max(len(held), 1)
    ax.add_patch(Rectangle((x, y), 1, height, facecolor=style.FAINT, edgecolor="none"))
    for n, (name, tokens) in enumerate(held.items()):
        top = y + n * stripe
        for s in range(page_size):
            color = style.tint(colors[name], 0.78 if s < len(tokens) else 0.14)
            ax.add_patch(Rectangle((x + s * slot, top), slot, stripe, facecolor=color, edgecolor="none"))
        labels = [f"{name}{token}" for token in tokens] if page_size <= _NUMBERED else [name]
        ink = style.readable_on(style.tint(colors[name], 0.78))
        for s, label in enumerate(labels):
            at = x + (s + 0.5) * max(slot, 0.1), top + stripe / 2
            ax.text(*at, label, ha="center", va="center", fontsize=7.5, color=ink)
    for s in range(1, page_size if page_size <= 8 else 1):
        ax.plot([x + s * slot] * 2, [y, y + height], color=style.PAPER, linewidth=0.8)
    ax.add_patch(Rectangle((x, y), 1, height, fill=False, edgecolor=style.SOFT_INK, linewidth=1))
    ax.text(x, y - 0.02, f"page {page}", ha="left", va="bottom", fontsize=7.5, color=style.SOFT_INK)


def _told(cache: PagedKVCache, names: Mapping[str, int], held: list[dict[str, range]], title: str) -> str:
    told = []
    for name, request in names.items():
        length = int(cache.lengths([request]))
        pages = ", ".join(str(page) for page in cache.block_table([request])[0].tolist()) or "no page"
        told.append(f"{name}: {length} tokens on {pages}")
    shared = sum(len(holders) > 1 for holders in held)
    told.append(f"{shared} shared, {cache.free_pages} of {cache.num_pages} pages free")
    return f"{title}. {'; '.join(told)}."
