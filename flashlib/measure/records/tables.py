"""Tables and numbers that a person reads: aligned cells, thousands separated, bytes in the unit that fits."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "format_bytes", "format_number", "table"]

_LEFT_CELL = '<td style="text-align: left;">'


@dataclass(frozen=True)
class Table:
    """Rows of formatted cells under headers, with notes below. Prints as text, shows as HTML in a notebook."""

    rows: tuple[tuple[str, ...], ...]
    headers: tuple[str, ...]
    notes: tuple[str, ...] = ()
    align: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self._tabulate("simple"), *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        # Notebooks align cells to the right unless told otherwise.
        cells = str(self._tabulate("html")).replace("<td>", _LEFT_CELL).replace("<th>", _LEFT_CELL.replace("td", "th"))
        return cells + (f"<p>{'<br>'.join(map(html.escape, self.notes))}</p>" if self.notes else "")

    def _tabulate(self, style: str) -> str:
        from tabulate import tabulate

        align = self.align if self.rows else None
        return tabulate(self.rows, self.headers, style, disable_numparse=True, colalign=align)


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str], *, notes: Sequence[str] = ()) -> Table:
    """A `Table` of `rows`: numbers right-aligned, thousands separated, floats to four digits, None left blank.

    Raises:
        ValueError: a row has not as many cells as there are headers.
    """
    rows = [tuple(row) for row in rows]
    for index, row in enumerate(rows):
        if len(row) != len(headers):
            raise ValueError(f"row {index} has {len(row)} cells, expected one for each header of {list(headers)}")
    columns = list(zip(*rows, strict=True)) or [()] * len(headers)
    align = tuple("right" if _is_numeric(column) else "left" for column in columns)
    cells = tuple(tuple(_format_cell(value) for value in row) for row in rows)
    return Table(cells, tuple(headers), tuple(notes), align)


def _is_numeric(column: Sequence[Any]) -> bool:
    present = [value for value in column if value is not None]
    return bool(present) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present)


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return format_number(value, digits=4) if isinstance(value, float) else str(value)


def format_number(value: float, *, digits: int = 3) -> str:
    """`value` rounded to `digits` significant digits and without an exponent where that stays readable.

    >>> [format_number(x) for x in (604.0, 1234567.0, 0.05, 2.5e13)]
    ['604', '1,230,000', '0.05', '2.5e+13']
    """
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits}g}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:,.10f}".rstrip("0")


def format_bytes(count: float) -> str:
    """`count` bytes in the binary unit that fits, to three significant digits.

    >>> [format_bytes(x) for x in (512, 1536, 604 * 2**20)]
    ['512 B', '1.5 KiB', '604 MiB']
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1000 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{format_number(float(count))} {units[0]}"
