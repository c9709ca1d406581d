"""In no chapter, as it is opened, is an answer on the screen with its question."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from browser.page import Chapter
from playwright.sync_api import sync_playwright

from flashlib.course.editions import ANSWERS
from flashlib.course.questions import questions_of

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


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_answer_stands_beside_its_question(lab, chromium, name):
    asked, told = questions_of(name[:2]), answers(name)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        chapter = Chapter(
            browser.new_page(viewport={"width": 1280, "height": 900}), lab.url(f"notebooks/{Path(name).name}")
        )
        for question in asked.values():
            beside = chapter.beside(f'predict("{question.id}")')
            assert question.reason[:60] not in beside
            assert "it is" not in beside or "You predicted" not in beside
            for answer in told:
                pattern = telling(answer)
                own = told[list(asked).index(question.id)] if len(told) == len(asked) else None
                if pattern and answer == own:
                    assert not pattern.search(beside), (
                        f"{question.id}: {answer!r} is on the screen: {beside[max(0, pattern.search(beside).start() - 200) :][:400]}"
                    )
        browser.close()
    assert len(told) == len(asked)
