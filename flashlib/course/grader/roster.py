"""The list of a class: who is who, whatever their folders are called."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashlib.course.grader.text import one_line

_NAME = ("name", "student", "student name", "full name", "display name")
_FIRST, _LAST = ("first name", "first", "given name"), ("last name", "last", "surname", "family name")
_IDENTIFIES = re.compile(
    r"\b(id|number|login|user|username|email|e-mail|mail|alias|github|folder|sis)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Roster:
    """A line for each student.

    Attributes:
        names: as they stand in tables.
        lines: all columns of each line, by their headings.
    """

    names: Sequence[str]
    lines: Sequence[dict[str, str]]

    def find(self, student: str, number: str, entry: str) -> int | None:
        """The one line that an entry belongs to, or None.

        Args:
            student: the name that the entry bears.
            number: the platform's id, after a colon; or "".
            entry: the whole name of the entry. A login, id or email in it counts, too.
        """
        matches: dict[int, int] = {}
        whole, words = "".join(_words(student)), _words(entry)
        for line, aliases in enumerate(self._aliases()):
            for alias in aliases:
                joined = {"".join(alias), "".join((*alias[-1:], *alias[:-1]))}
                if whole in joined or alias == (number.rpartition(":")[2],):
                    matches[line] = max(matches.get(line, 0), 1000)
                elif _contains(words, alias) and (len(alias) > 1 or len(alias[0]) > 2):
                    matches[line] = max(matches.get(line, 0), len(alias))
        best = [line for line, length in matches.items() if length == max(matches.values())]
        return best[0] if len(best) == 1 else None

    def _aliases(self) -> list[list[tuple[str, ...]]]:
        found = []
        for name, line in zip(self.names, self.lines, strict=True):
            texts = [name, *(value for heading, value in line.items() if _IDENTIFIES.search(heading.replace("_", " ")))]
            texts += [text.partition("@")[0] for text in texts if "@" in text]
            found.append([words for text in texts if (words := _words(text))])
        return found


def read_roster(file: Path) -> Roster:
    """Read a CSV with a heading line: `name`, or `first name` and `last name`, and any of id, login, email, and so on.

    What Canvas, Moodle and Gradescope export as a list of participants is such a file.

    Raises:
        ValueError: it cannot be read, has no heading for the names, or lists a name twice.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the roster {file} cannot be read: {error}") from error
    headings = {str(heading).strip().lower(): heading for heading in (rows[0] if rows else {})}
    name = next((headings[each] for each in _NAME if each in headings), None)
    first = next((headings[each] for each in _FIRST if each in headings), None)
    last = next((headings[each] for each in _LAST if each in headings), None)
    if name is None and (first is None or last is None):
        raise ValueError(
            f"the roster {file} needs a column `name`, or `first name` and `last name`; it has {list(headings)}"
        )
    names, lines = [], []
    for row in rows:
        shown = one_line((row[name] if name else f"{row[first]} {row[last]}") or "").strip()
        if not shown:
            continue
        if shown in names:
            raise ValueError(f"the roster {file} lists {shown!r} twice: tell the two apart in their names")
        names.append(shown)
        lines.append(
            {one_line(str(key)).strip(): one_line(str(value or "")).strip() for key, value in row.items() if key}
        )
    if not names:
        raise ValueError(f"the roster {file} lists nobody")
    return Roster(tuple(names), tuple(lines))


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W\d_]+|\d+", text.casefold()))


def _contains(words: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return any(words[at : at + len(part)] == part for at in range(len(words) - len(part) + 1))
