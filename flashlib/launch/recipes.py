"""Recipes: how a plan follows from sizes, written down once, so that the plan of other sizes takes microseconds and not a hundred of them.

Lengths vary in life: prompts differ, caches grow, batches are packed anew. Every length is another class of problem, and its launches would be worked
out anew (:mod:`flashlib.launch.plans`) though nearly nothing of them differs: some strides, a grid, the sizes in a tensor map. So the same code is
run once with a :class:`Symbol` in place of each number. A symbol computes like the number that it stands for, and notes what was computed. Where
the code asks whether something holds of it, the answer is noted too, as what the recipe is good for. What comes out is a Python function of
the numbers, straight through: it returns what the code would have made of them, or None where one of the answers would have been another.

A symbol has no ``__index__`` and no hash: code that uses it as more than a number (an index, a key, a range) fails with a TypeError, and is not
written down, rather than written down wrongly.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Recipe", "Symbol", "computed", "number_type", "plain", "record", "recording", "settled"]

Recipe = Callable[..., Any]  # of the numbers, to what the code made of them, or None

_state = threading.local()
_REPEATABLE = (int, float, bool, str, bytes, type(None))


class Tape:
    """What was computed, line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, str] = {}
        self.checked: set[str] = set()
        self.constants: dict[str, Any] = {}
        self.constant_names: dict[int, str] = {}  # by identity: they live as long as the tape

    def named(self, text: str) -> str:
        """The name of what ``text`` computes."""
        name = self.names.get(text)
        if name is None:
            name = self.names[text] = f"t{len(self.names)}"
            self.lines.append(f"{name} = {text}")
        return name

    def check(self, text: str, holds: bool) -> None:
        if text not in self.checked:
            self.checked.add(text)
            self.lines.append(f"if {'not ' if holds else ''}({text}): return None")

    def text(self, x: Any) -> str:
        """``x``, which may hold symbols, as an expression."""
        kind = type(x)
        if kind is Symbol or kind is _Made:
            return x.name
        if kind is _Condition:
            return repr(bool(x))
        if kind is tuple or kind is list:
            inside = "".join(f"{self.text(each)}, " for each in x)
            return f"({inside})" if kind is tuple else f"[{inside}]"
        if kind in _REPEATABLE and x == x and x not in (float("inf"), -float("inf")):
            return repr(x)
        name = self.constant_names.get(id(x))
        if name is None:
            name = self.constant_names[id(x)] = f"c{len(self.constants)}"
            self.constants[name] = x
        return name


class _Noted:
    """Something on a tape. ``value``: what it is for the numbers with which the tape was made."""

    __slots__ = ("name", "tape", "value")

    def __init__(self, tape: Tape, name: str, value: Any):
        self.tape, self.name, self.value = tape, name, value


class _Made(_Noted):
    """What a function returned that is not a number."""

    __slots__ = ()


class _Condition(_Noted):
    """A comparison. Whoever asks for its truth has a recipe for numbers of which the same is true."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        self.tape.check(self.name, self.value)
        return self.value


class Symbol(_Noted):
    """A number on a tape."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        self.tape.check(self.name, bool(self.value))
        return bool(self.value)

    def __neg__(self) -> Symbol:
        return Symbol(self.tape, self.tape.named(f"-{self.name}"), -self.value)


def _binary(symbol: str, compute: Callable) -> tuple[Callable, Callable]:
    def forward(self: Symbol, other: Any) -> Symbol:
        if not _is_number(other):
            return NotImplemented
        text = f"{self.name} {symbol} {self.tape.text(other)}"
        return Symbol(self.tape, self.tape.named(text), compute(self.value, _value(other)))

    def backward(self: Symbol, other: Any) -> Symbol:
        if not _is_number(other):
            return NotImplemented
        text = f"{self.tape.text(other)} {symbol} {self.name}"
        return Symbol(self.tape, self.tape.named(text), compute(_value(other), self.value))

    return forward, backward


def _comparison(symbol: str, compute: Callable) -> Callable:
    def compared(self: Symbol, other: Any) -> _Condition:
        if not _is_number(other):
            return NotImplemented
        return _Condition(
            self.tape, f"{self.name} {symbol} {self.tape.text(other)}", compute(self.value, _value(other))
        )

    return compared


for _name, _symbol in (
    ("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//"), ("truediv", "/"), ("mod", "%"),
):  # fmt: skip
    _forward, _backward = _binary(_symbol, getattr(operator, _name))
    setattr(Symbol, f"__{_name}__", _forward)
    setattr(Symbol, f"__r{_name}__", _backward)
for _name, _symbol in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    setattr(Symbol, f"__{_name}__", _comparison(_symbol, getattr(operator, _name)))


def _is_number(x: Any) -> bool:
    return type(x) is int or type(x) is Symbol or type(x) is float


def _value(x: Any) -> Any:
    """``x`` with numbers in place of its symbols."""
    if isinstance(x, _Noted):
        return x.value
    return type(x)(map(_value, x)) if type(x) in (tuple, list) else x


def number_type(x: Any) -> type:
    """The type of a number, also of one that a symbol stands for."""
    return type(x.value) if type(x) is Symbol else type(x)


def plain(x: Any) -> Any:
    """``x``, without a symbol: a recipe is good for numbers for which it is the same."""
    if type(x) is Symbol:
        x.tape.check(f"{x.name} == {x.value!r}", True)
        return x.value
    return bool(x) if type(x) is _Condition else x


def recording() -> bool:
    """Whether this thread writes down a recipe."""
    return getattr(_state, "tape", None) is not None


def computed(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)``, which a recipe calls again with its own numbers. For what does more with numbers than symbols can."""
    tape = getattr(_state, "tape", None)
    if tape is None:
        return function(*arguments)
    value = function(*map(_value, arguments))
    name = tape.named(f"{tape.text(function)}({', '.join(map(tape.text, arguments))})")
    return (Symbol if type(value) in (int, float) else _Made)(tape, name, value)


def settled(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)``, a plain value; a recipe is good for numbers for which it is the same."""
    tape = getattr(_state, "tape", None)
    if tape is None:
        return function(*arguments)
    value = function(*map(_value, arguments))
    call = f"{tape.text(function)}({', '.join(map(tape.text, arguments))})"
    tape.check(f"{call} == {tape.text(value)}", True)
    return value


def record(make: Callable[[Sequence[Symbol]], Any], numbers: Sequence[float]) -> Recipe:
    """What ``make`` does with so many numbers, as a recipe.

    Args:
        make: returns tuples, lists, numbers, constants, and what :func:`computed` returned.
        numbers: those with which it is run once.

    Raises:
        TypeError: it does with them what symbols cannot.
    """
    tape = Tape()
    given = [Symbol(tape, f"n{at}", number) for at, number in enumerate(numbers)]
    _state.tape = tape
    try:
        result = tape.text(make(given))
    finally:
        _state.tape = None
    source = f"def recipe({', '.join(each.name for each in given)}):\n" + "".join(
        f"    {line}\n" for line in [*tape.lines, f"return {result}"]
    )
    scope = dict(tape.constants)
    exec(compile(source, "<recipe>", "exec"), scope)
    return scope["recipe"]
