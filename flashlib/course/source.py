"""Show flashlib's own source in a notebook: taken from the package at run time, so that the two cannot drift apart."""

from __future__ import annotations

import ast
import html
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import flashlib

_PACKAGE = Path(flashlib.__file__).resolve().parent
_FRAME = "border:1px solid #d0d7de;border-radius:4px;margin:6px 0;background:#fbfbfb;color:#1f2328"
_PATH = "padding:3px 10px;border-bottom:1px solid #d0d7de;font-family:monospace;font-size:85%;color:#57606a"


@dataclass(frozen=True)
class Source:
    """A piece of flashlib's source. Prints as text, shows highlighted in a notebook.

    Attributes:
        path: the file, from the root of the repository (`"flashlib/tiled.py"`).
        name: what was shown (`"tiled_attention"`).
        code: the text, dedented.
        highlighted: indices of the lines to set off, counted from 0.
    """

    path: str
    name: str
    code: str
    highlighted: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"# {self._title()}\n{self.code}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer

        formatter = HtmlFormatter(
            noclasses=True,
            nobackground=True,
            hl_lines=[index + 1 for index in self.highlighted],
            prestyles="margin:0;padding:8px 10px;overflow-x:auto;white-space:pre;font-family:monospace;font-size:12px;background:#fbfbfb;color:#1f2328",
        )
        code = highlight(self.code, PythonLexer(stripnl=False), formatter)
        return f'<div style="{_FRAME}"><div style="{_PATH}">{html.escape(self._title())}</div>{code}</div>'

    def _title(self) -> str:
        return f"{self.path} · {self.name}" if self.name else self.path


def show_source(
    obj: Any,
    *,
    between: tuple[str, str] | None = None,
    docstring: bool = True,
    highlight: str | Sequence[str] = (),
) -> Source:
    """The source of a function, method, class or module of flashlib, or a part of it.

    Args:
        obj: the object itself, as in `show_source(flashlib.backends.pytorch.tiled_attention)`.
        between: show only the lines from the one that contains the first text to the next that contains the second,
            both included. Texts, not numbers: they move with the code.
        docstring: False leaves docstrings out.
        highlight: set off the lines that contain this text, or any of these texts.

    Raises:
        TypeError: `obj` has no Python source.
        ValueError: `obj` is not flashlib's, or a text of `between` or `highlight` is not found, or the first text of
            `between` is on several lines, so that it does not say which.

    Example:
        >>> show_source(tiled_attention, docstring=False, highlight="rescale")
        >>> show_source(tiled_attention, between=("for start in", "return"))
    """
    target = _python_object(obj)
    path = _repository_path(obj, target)
    code = inspect.getsource(target)
    code = textwrap.dedent(code) if docstring else _without_docstrings(textwrap.dedent(code))
    if between is not None:
        code = _cut(code, *between)
    texts = [highlight] if isinstance(highlight, str) else list(highlight)
    name = "" if isinstance(target, ModuleType) else target.__qualname__
    return Source(path, name, code.strip("\n"), _matching_lines(code.strip("\n"), texts))


def _python_object(obj: Any) -> Any:
    """The function, class or module behind `obj`: under a property, a decorator or a Triton kernel."""
    if isinstance(obj, property):
        obj = obj.fget
    obj = inspect.unwrap(getattr(obj, "fn", obj) if not inspect.isclass(obj) and not inspect.ismodule(obj) else obj)
    if not (inspect.ismodule(obj) or inspect.isclass(obj) or inspect.isfunction(obj) or inspect.ismethod(obj)):
        raise TypeError(f"obj must be a function, method, class or module with Python source, got {obj!r}")
    return obj


def _repository_path(obj: Any, target: Any) -> str:
    try:
        file = Path(inspect.getsourcefile(target) or "").resolve()
    except TypeError:
        raise TypeError(f"obj must have Python source, got {obj!r}") from None
    if not file.is_relative_to(_PACKAGE):
        raise ValueError(f"obj must be part of flashlib, got {obj!r} from {file.name}")
    return file.relative_to(_PACKAGE.parent).as_posix()


def _without_docstrings(code: str) -> str:
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is None or len(node.body) == 1:
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        following_blank = last < len(lines) and lines[last] is not None and not lines[last].strip()
        for at in range(first, last + following_blank):
            lines[at] = None
    return "\n".join(line for line in lines if line is not None)


def _cut(code: str, first: str, last: str) -> str:
    lines = code.splitlines()
    starts = [at for at, line in enumerate(lines) if first in line]
    if len(starts) != 1:
        found = "on no line" if not starts else f"on {len(starts)} lines, so it does not say where to start"
        raise ValueError(f"between: {first!r} is {found}")
    ends = [at for at in range(starts[0], len(lines)) if last in lines[at]]
    if not ends:
        raise ValueError(f"between: {last!r} is on no line from {first!r} on")
    return textwrap.dedent("\n".join(lines[starts[0] : ends[0] + 1]))


def _matching_lines(code: str, texts: list[str]) -> tuple[int, ...]:
    lines = code.splitlines()
    for text in texts:
        if not any(text in line for line in lines):
            raise ValueError(f"highlight: {text!r} is on no line shown")
    return tuple(at for at, line in enumerate(lines) if any(text in line for text in texts))
