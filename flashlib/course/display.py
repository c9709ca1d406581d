"""How a figure or a table gets into a notebook: once for the eye, and once in words.

A picture cannot be read by a screen reader, cannot be searched, and cannot be compared when the notebook is run again
on another machine. So each figure carries an *alt text* that states what it shows in words and rounded numbers, and
each table carries its plain text. Both go into the notebook as `text/plain` beside the picture.
"""

from __future__ import annotations

import base64
import io
import os
from typing import TYPE_CHECKING, Any

from flashlib.measure.records.tables import Table, format_bytes, format_number, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["Figure", "Table", "format_bytes", "format_number", "show", "table", "widgets_run"]

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
