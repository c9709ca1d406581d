"""The two editions of a chapter: as it is handed out, and as it ran.

`notebooks/` holds the chapters that readers open, in whatever opens them: the questions are to be seen, and no output. `notebooks/answers/`
holds the same cells with all their outputs, which are compared when the notebooks are tested, and which show the answer to every question.

    python -m flashlib.course.editions     # after the chapters have been executed into notebooks/answers
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output

from flashlib.course.predictions import as_asked

__all__ = ["ANSWERS", "CHAPTERS", "handed_out", "question_of"]

CHAPTERS = Path(__file__).resolve().parents[2] / "notebooks"
ANSWERS = CHAPTERS / "answers"

_ASKS = re.compile(r'\w+ = predict\("([^"]+)"\)')


def question_of(cell: NotebookNode) -> str | None:
    """The id of the question that a cell asks, and nothing else; None if it does something else."""
    found = _ASKS.fullmatch(cell.source.strip()) if cell.cell_type == "code" else None
    return found[1] if found else None


def handed_out(chapter: NotebookNode) -> NotebookNode:
    """A chapter as a reader first sees it: no outputs but the questions, whose code is folded away.

    Raises:
        ValueError: it asks a question that there is not.
    """
    chapter = copy.deepcopy(chapter)
    for cell in chapter.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        for leftover in ("execution", "collapsed", "lines_to_next_cell"):
            cell.metadata.pop(leftover, None)
        if id := question_of(cell):
            cell.metadata["jupyter"] = {"source_hidden": True}
            cell.outputs = [new_output("display_data", data=as_asked(id))]
    return chapter


def main(folder: Path = CHAPTERS) -> int:
    for path in sorted(folder.glob("*.ipynb")):
        nbformat.write(handed_out(nbformat.read(path, as_version=4)), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
