"""What is handed out shows no answer, and holds the same cells as what was executed and compared."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from flashlib.course.editions import ANSWERS, CHAPTERS, handed_out, question_of
from flashlib.course.questions import question, questions_of

NOTEBOOKS = sorted(CHAPTERS.glob("*.ipynb"))


def test_both_editions_have_the_same_chapters() -> None:
    assert NOTEBOOKS and [path.name for path in NOTEBOOKS] == sorted(path.name for path in ANSWERS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_is_handed_out_as_it_ran_but_for_the_outputs(path: Path) -> None:
    """`make notebooks` makes both."""
    told, ran = (nbformat.read(folder / path.name, as_version=4) for folder in (CHAPTERS, ANSWERS))
    assert told.cells == handed_out(ran).cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_answer_is_handed_out(path: Path) -> None:
    """No output but the questions, whose own code is folded away; and no reason is anywhere in the file."""
    text = json.dumps(nbformat.read(path, as_version=4), ensure_ascii=False)
    asked = []
    for cell in nbformat.read(path, as_version=4).cells:
        id = question_of(cell)
        if cell.cell_type != "code" or id is None:
            assert not cell.get("outputs"), cell.source
            continue
        asked.append(id)
        assert cell.metadata.jupyter.source_hidden
        (output,) = cell.outputs
        assert question(id).text in output.data["text/plain"] and output.data["text/plain"].endswith(
            "Run this cell to answer."
        )
    assert asked == list(questions_of(path.name[:2])), (
        "each question is asked once, in the order in which it is written down"
    )
    for one in questions_of(path.name[:2]).values():
        assert one.reason and not re.search(re.escape(one.reason[:40]), text), one.id
