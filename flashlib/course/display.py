"""How a figure or a table gets into a notebook: once for the eye, and once in words.

A picture cannot be read by a screen reader, cannot be searched, and cannot be compared when the notebook is run again
on another machine. So each figure carries an *alt text* that states what it shows in words and rounded numbers, and
each table carries its plain text. Both go into the notebook as `text/plain` beside the picture.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

_LEFT_CELL = '<td style="text-align: left;">'
PNG_DPI = 192  # twice the 96 dots per inch of a browser's pixel, so that text stays sharp on dense screens


class Figure:
    """A matplotlib figure, rendered once to PNG at twice the screen's density, with its description.

    Args:
        fig: the figure, laid out and complete. It is closed here, so that the notebook does not show it twice.
        alt: what the figure shows, in words and rounded numbers. It is stored in the notebook and compared when the
            notebook is tested, so it must not hold anything that changes from run to run.

    Attributes:
        png: the image, as bytes.
        alt: the description.

    Raises:
        TypeError: `fig` is not a matplotlib figure, or `alt` is not a string.
        ValueError: `alt` is empty.
    """

    def __init__(self, fig: MatplotlibFigure, *, alt: str) -> None:
        import matplotlib.figure
        import matplotlib.pyplot as plt

        if not isinstance(fig, matplotlib.figure.Figure):
            raise TypeError(f"fig must be a matplotlib Figure, got {type(fig).__name__}")
        if not isinstance(alt, str):
            raise TypeError(f"alt must be a str, got {type(alt).__name__}")
        if not alt.strip():
            raise ValueError("alt must describe what the figure shows; it is empty")
        self.alt = alt.strip()
        self.png = _render(fig)
        plt.close(fig)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page, in CSS pixels."""
        width, height = (int.from_bytes(self.png[at : at + 4], "big") for at in (16, 20))  # PNG's IHDR fields
        return round(width * 96 / PNG_DPI), round(height * 96 / PNG_DPI)

    def save(self, path: str) -> None:
        """Write the PNG to `path`."""
        with open(path, "wb") as file:
            file.write(self.png)

    def __str__(self) -> str:
        return self.alt

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = self.size
        data = {"image/png": base64.b64encode(self.png).decode("ascii"), "text/plain": self.alt}
        return data, {"image/png": {"width": width, "height": height, "alt": self.alt}}


def _render(fig: MatplotlibFigure) -> bytes:
    """`fig` as a PNG of 256 colors: no difference to see, and a third of the bytes, which a notebook under git keeps."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png", dpi=PNG_DPI, bbox_inches="tight", pad_inches=0.08)
    colors = Image.open(full).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    colors.save(small, "PNG", optimize=True)
    return small.getvalue()


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


def widgets_run() -> bool:
    """Whether somebody can press a button: a Jupyter kernel with ipywidgets, and not told otherwise.

    A kernel cannot see who is in front of it. Whatever executes notebooks without a reader (tests, a build of the
    pages) sets `FLASHLIB_NONINTERACTIVE=1`.
    """
    if os.environ.get("FLASHLIB_NONINTERACTIVE", "0") not in ("", "0"):
        return False
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def show(value: Any) -> None:
    """Display `value` in a notebook, or print it elsewhere."""
    try:
        from IPython import get_ipython
    except ImportError:
        get_ipython = lambda: None  # noqa: E731
    if get_ipython() is None:
        print(value)
    else:
        from IPython.display import display

        display(value)
