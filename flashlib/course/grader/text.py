"""Strangers' text made harmless: the one place where what came from a student's process, file or file name is cleaned.

Whatever a child sends is cleaned when it is received (`sandbox/session.py`), whatever goes into a report once more when the
report is made (`report.py`), and whatever goes into a table when the cell is written.
"""

from __future__ import annotations

import os
from typing import Any

_FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def clean(text: str, limit: int | None = None) -> str:
    """`text` without control characters, terminal escapes, directions of writing, lone surrogates or anything invisible.

    What remains can be encoded, printed and written anywhere. Each character taken out leaves a replacement character.

    Args:
        limit: characters kept; what is cut off is said.
    """
    cleaned = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    if limit is None or len(cleaned) <= limit:
        return cleaned
    return f"{cleaned[:limit]}... ({len(cleaned) - limit:,} characters more)"


def one_line(text: str, limit: int | None = None) -> str:
    """As `clean`, with line ends and tabs as spaces."""
    return clean(text.replace("\n", " ").replace("\t", " "), limit)


def clean_tree(value: Any, depth: int = 100) -> Any:
    """A JSON value with every string in it cleaned, names of entries included.

    Raises:
        ValueError: it is nested more than `depth` deep.
    """
    if depth < 0:
        raise ValueError("a value nested too deep")
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_tree(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean_tree(item, depth - 1) for key, item in value.items()}
    return value


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path for people: bytes that are no UTF-8 as `\\xff`, so that two names that differ are shown as two."""
    text = os.fspath(path)
    try:
        data = text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        data = text.encode("utf-8", errors="backslashreplace")
    return one_line(data.decode("utf-8", errors="backslashreplace"))


def cell(value: Any) -> Any:
    """A spreadsheet's cell. Numbers stay numbers; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return value
    text = one_line(str(value))
    return f"'{text}" if text.lstrip().startswith(_FORMULA_SIGNS) or str(value).startswith(_FORMULA_SIGNS) else text
