"""A reader's own copy of the course, so that running it changes no file that git tracks: `python -m flashlib.course.workspace`.

Chapters and exercises are copied into `my_course/`. When the course has moved on (`git pull`), the next call brings what is new into the
copy, and keeps what the reader wrote: a merge of three, with the version that was copied last as the common ancestor, which is kept in
`my_course/.course/`. Where both have changed the same place, the reader's stays, and the course's new version stands behind it.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import nbformat
from merge3 import Merge3
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

__all__ = ["CHANGED_HERE", "COPY", "REPOSITORY", "bring_up_to_date"]

REPOSITORY = Path(__file__).resolve().parents[2]
COPY = "my_course"
PARTS = (("notebooks", "*.ipynb"), ("exercises", "ex*.py"))
CHANGED_HERE = "**The course has changed here.** Your version stands above, the new one follows."

_Cells = list[tuple[str, str, str]]


def bring_up_to_date(repository: Path = REPOSITORY) -> list[str]:
    """Make the reader's copy, or bring what has changed in the course into it.

    Args:
        repository: with `notebooks/` and `exercises/`; the copy is its folder `my_course/`.

    Returns:
        what was done, a line for each file that is new or has changed.

    Raises:
        nbformat.reader.NotJSONError: a notebook of the copy cannot be read. Nothing is written over it.
    """
    told = []
    for folder, pattern in PARTS:
        for source in sorted((repository / folder).glob(pattern)):
            name = f"{folder}/{source.name}"
            mine, base = repository / COPY / name, repository / COPY / ".course" / name
            course = source.read_text(encoding="utf-8")
            known = base.read_text(encoding="utf-8") if base.exists() else None
            if mine.exists() and known == course:
                continue
            if mine.exists() and known is None:
                raise FileExistsError(f"{mine} is there, but not from this course: move it away")
            if not mine.exists():
                _write(mine, course)
                told.append(f"new: {COPY}/{name}")
            elif source.suffix == ".ipynb":
                clashes = _merge_notebook(mine, known, course)
                beside = "; where you changed it too, both versions stand" if clashes else ""
                told.append(f"brought up to date: {COPY}/{name}{beside}")
            else:
                told.append(_merge_text(mine, known, course, f"{COPY}/{name}"))
            _write(base, course)
    return told


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _merge_text(path: Path, base: str, course: str, name: str) -> str:
    mine = path.read_text(encoding="utf-8")
    groups = list(Merge3(*(text.splitlines(keepends=True) for text in (base, mine, course))).merge_groups())
    if any(group[0] == "conflict" for group in groups):
        beside = path.with_suffix(".new.py")
        _write(beside, course)
        return f"kept as you have it: {name}; the course's new version lies beside it as {beside.name}"
    _write(path, "".join(line for group in groups for line in group[1]))
    return f"brought up to date: {name}"


def _merge_notebook(path: Path, base: str, course: str) -> int:
    """Merge cell by cell; a cell that stays as it was keeps its outputs. Returns how many places both had changed."""
    mine, theirs = nbformat.read(path, as_version=4), nbformat.reads(course, as_version=4)
    ran = {_key(cell): cell for cell in mine.cells}
    fresh = {_key(cell): cell for cell in theirs.cells}
    merge = Merge3(_keys(nbformat.reads(base, as_version=4)), _keys(mine), _keys(theirs))
    cells: list[NotebookNode] = []
    clashes = 0
    for kind, *parts in merge.merge_groups():
        if kind != "conflict":
            cells += [ran.get(key) or fresh[key] for key in parts[0]]
            continue
        _, own, new = parts
        clashes += 1
        cells += [ran[key] for key in own]
        cells += [new_markdown_cell(CHANGED_HERE), *(fresh[key] for key in new)] if new else []
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            cell.id = uuid.uuid4().hex[:8]
        seen.add(cell.id)
    mine.cells = cells
    _write(path, nbformat.writes(mine) + "\n")
    return clashes


def _key(cell: NotebookNode) -> tuple[str, str, str]:
    return cell.id, cell.cell_type, cell.source


def _keys(notebook: NotebookNode) -> _Cells:
    return [_key(cell) for cell in notebook.cells]


def main() -> int:
    for line in bring_up_to_date():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
