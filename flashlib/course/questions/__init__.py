"""What the chapters ask: each question with its reason, out of a reader's sight until it is settled.

A notebook says `predict("01-score-bytes")`. Were question, choices and reason written there, the reason would be read before the
prediction is made.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from flashlib.course.questions.question import Question

__all__ = ["Question", "question", "questions_of"]


@cache
def questions_of(chapter: str) -> dict[str, Question]:
    """The questions of a chapter (`"01"`) by their ids, in the order in which they are asked; none if it asks nothing."""
    name = f"{__name__}.ch{chapter}"
    if find_spec(name) is None:
        return {}
    return {asked.id: asked for asked in import_module(name).QUESTIONS}


def question(id: str) -> Question:
    """The question with this id.

    Raises:
        ValueError: there is none.
    """
    known = questions_of(str(id)[:2])
    if id not in known:
        there = f"chapter {str(id)[:2]} asks {list(known)}" if known else f"chapter {str(id)[:2]!r} asks nothing"
        raise ValueError(f"there is no question {id!r}; {there}")
    return known[id]
