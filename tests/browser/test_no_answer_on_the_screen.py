"""In no chapter, as it is opened, is an answer on the screen with its question."""

from __future__ import annotations

import re

import nbformat
import pytest
from browser.page import Chapter

from flashlib.course.editions import ANSWERS
from flashlib.course.questions import Question, questions_of

CHAPTERS = sorted(path.name for path in ANSWERS.glob("*.ipynb"))
_VERDICT = re.compile(r"The default was .*?; it is (.*?)\. (?:Right|Not so|Off by)", re.DOTALL)


def answers(name: str) -> list[str]:
    """What the chapter's questions were settled with when it ran, in their order."""
    told = []
    for cell in nbformat.read(ANSWERS / name, as_version=4).cells:
        for output in cell.get("outputs", []):
            told += _VERDICT.findall(output.get("data", {}).get("text/plain", ""))
    return told


def telling(answer: str) -> re.Pattern[str] | None:
    """What would give an answer away: a number with its unit or of three digits, or a choice of several words."""
    if re.fullmatch(r"[\d,.]+( \S+)?", answer):
        number, _, unit = answer.partition(" ")
        if unit or len(re.sub(r"\D", "", number)) >= 3:
            return re.compile(rf"(?<![\d.,]){re.escape(number)}{' ?' + re.escape(unit) if unit else ''}(?![\d]|[.,]\d)")
        return None
    return re.compile(re.escape(answer)) if len(answer.split()) >= 3 else None


def gives_away(question: Question, answer: str, cells: list[str]) -> list[str]:
    """The cells that say the reason, or the answer and no other of the choices. (Code that settles a choice names them all.)"""
    offered = answer in question.text  # as one of several that the question names
    pattern = None if offered else telling(answer)
    others = [choice for choice in question.choices or () if choice != answer]
    return [
        cell
        for cell in cells
        if question.reason[:60] in cell
        or (pattern and pattern.search(cell) and not any(other in cell for other in others))
    ]


def test_what_gives_an_answer_away_is_noticed() -> None:
    number = Question("01-a", "How many?", 1, unit="MB", reason="Because of this.")
    assert gives_away(number, "151 MB", ["It is 151 MB.", "12,151 MB", "x = 151", "Because of this."]) == [
        "It is 151 MB.",
        "Because of this.",
    ]
    choice = Question(
        "01-b", "Which?", "in the last digits", choices=("in the last digits", "not at all, no"), reason="Why."
    )
    both = '"not at all, no" if same else "in the last digits"'
    assert gives_away(choice, "not at all, no", [both, "So not at all, no."]) == ["So not at all, no."]


@pytest.fixture(scope="module")
def window(lab, browser):
    """One window for all chapters, which run no cell."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    yield Chapter(page, lab.url(f"notebooks/{CHAPTERS[0]}"))
    page.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_answer_stands_beside_its_question(window, name):
    asked, told = questions_of(name[:2]), answers(name)
    assert len(told) == len(asked), "each question is settled, and its verdict shown"
    window.turn_to(f"notebooks/{name}")
    for question, answer in zip(asked.values(), told, strict=True):
        cells = window.beside(f'predict("{question.id}")')
        assert len(cells) >= 2
        assert not gives_away(question, answer, cells), question.id
