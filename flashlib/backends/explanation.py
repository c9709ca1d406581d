"""What each backend says of a problem, as a table. It needs no library to print: whoever asks why may have none but PyTorch."""

from __future__ import annotations

import html
from dataclasses import dataclass

__all__ = ["Explanation"]

HEADERS = ("", "backend", "runs", "why, or why not")


@dataclass(frozen=True)
class Explanation:
    """The order of choice for one problem. Print it, or end a notebook cell with it.

    Attributes:
        rows: ``(backend, runs, reason)``: why it stands where it stands if it runs, else what stands against it.
        chosen: the backend that ``"auto"`` picks; None if no backend runs the problem.
    """

    rows: tuple[tuple[str, bool, str], ...]
    chosen: str | None

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            ("->" if name == self.chosen else "", name, "yes" if runs else "no", reason)
            for name, runs, reason in self.rows
        ]

    def __str__(self) -> str:
        cells = self._cells()
        columns = zip(*cells, strict=True) if cells else [()] * len(HEADERS)
        widths = [max([len(head) + 2, *map(len, column)]) for head, column in zip(HEADERS, columns, strict=True)]
        lines = [HEADERS, tuple("-" * width for width in widths), *cells]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = _html_row("th", HEADERS)
        body = "\n".join(_html_row("td", cells) for cells in self._cells())
        return f"<table>\n<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _html_row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
