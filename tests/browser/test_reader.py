"""What a reader does in a chapter, done in a browser: predicts, settles, experiments, writes, and moves what can be moved."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from browser.page import Chapter, contrast
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect

READABLE = 4.5  # WCAG 2, level AA
EXPLORERS = {
    "tile_stepper()": "step",
    "mask_explorer()": "size of the mask",
    "row_by_hand()": "blocks seen",
    "page_stepper()": "step",
    "program_explorer()": "program",
}


def _notebook(path: Path, sources: list[str]) -> None:
    """A notebook of a few cells that opens without asking for a kernel."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_prediction_is_made_settled_run_again_and_experimented_with(lab, page, theme):
    name = f"{theme}.ipynb"  # a copy of chapter 02 for each, so that the other's answers are not in it
    chapter_02 = nbformat.read(lab.folder / "notebooks/02_online_softmax.ipynb", as_version=4)
    nbformat.write(chapter_02, lab.folder / "notebooks" / name)
    chapter = Chapter(page, lab.url(f"notebooks/{name}"))
    chapter.use(theme)
    question = 'overflow = predict("02-exp-overflow")'
    asked = chapter.select(question)
    assert "From which score on" in asked.inner_text() and "Run this cell to answer" in asked.inner_text()

    chapter.run("from flashlib.course import (")
    chapter.write(question, "from flashlib.course.predictions import start_over\n\nstart_over('02')\n" + question)
    asked = chapter.run(question)
    box = asked.get_by_label("Your prediction")
    assert contrast(asked.locator("b", has_text="Predict:")) >= READABLE

    settled = chapter.run("overflow.settle(limit)")  # before it is answered: nothing is told
    assert (
        "Make your prediction" in settled.inner_text() and "11.1" not in settled.locator(".jp-OutputArea").inner_text()
    )

    asked = chapter.select(question)
    box.fill("a lot")
    asked.get_by_role("button", name="Record").click()
    expect(asked).to_contain_text("Not a number")
    box.fill("12")
    box.press("Enter")
    expect(asked).to_contain_text("You predicted 12; it is 11.1. Right, within a factor of 1.2.")
    assert contrast(asked.get_by_text("You predicted 12")) >= READABLE

    settled = chapter.run("overflow.settle(limit)")
    assert "it is 11.1" in settled.inner_text()
    chapter.write(
        "overflow.settle(limit)",
        "scores = torch.arange(0, 40, 0.01)\nlimit = 13.0\noverflow.settle(limit)  # an experiment",
    )
    settled = chapter.run("# an experiment")
    assert "it is 11.1" in settled.inner_text() and "In this run it is 13" in settled.inner_text()
    assert "Error" not in settled.inner_text()


def test_shift_enter_in_the_box_does_not_lose_what_was_typed(lab, page):
    path = lab.folder / "notebooks/keys.ipynb"
    cells = ["from flashlib.course import predict", 'p = predict("01-largest-tensor")']
    _notebook(path, cells)
    chapter = Chapter(page, lab.url("notebooks/keys.ipynb"))
    asked = chapter.run(*cells)
    asked.get_by_label("Your prediction").click()
    page.keyboard.type("0.2 GB")
    page.keyboard.press("Shift+Enter")
    asked = chapter.select(cells[1])
    expect(asked).to_contain_text("Recorded: 200 MB")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_long_choices_are_whole_and_each_can_be_read(lab, page, theme):
    path = lab.folder / "notebooks/choices.ipynb"
    cells = ["from flashlib.course import predict", f'p = predict("06-unmasked")  # {theme}']
    _notebook(path, cells)
    page.set_viewport_size({"width": 760, "height": 800})
    chapter = Chapter(page, lab.url("notebooks/choices.ipynb"))
    chapter.use(theme)
    asked = chapter.run(*cells)
    for text in (
        "an error",
        "the right 1,000 numbers, no harm done",
        "the right 1,000 numbers, and foreign memory changed",
    ):
        choice = asked.get_by_text(text, exact=True)
        assert choice.evaluate(
            "e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().right <= innerWidth"
        )
        assert contrast(choice) >= READABLE
    asked.get_by_role("button", name="B").click()
    expect(asked).to_contain_text("Recorded: the right 1,000 numbers, no harm done")


def test_a_task_is_failed_and_then_passed(lab, page):
    chapter = Chapter(page, lab.url("notebooks/02_online_softmax.ipynb"))
    stub = 'attempt("02-update", update)'
    tried = chapter.run("from flashlib.course import (", stub)
    assert "To do: update. Ours takes 2 lines." in tried.inner_text()
    body = (
        "def update(m, l, block):\n    m_new = torch.maximum(m, block.max())\n    return m_new, {}torch.exp(block - m_new).sum()\n\n\n"
        + stub
    )
    chapter.write(stub, body.format("l + "))
    tried = chapter.run(stub)
    assert "It looks like this: the old sum is not brought into line." in tried.inner_text()
    chapter.write(stub, body.format("l * torch.exp(m - m_new) + "))
    tried = chapter.run(stub)
    assert "update: right, in all 3 cases." in tried.inner_text()


def test_five_widgets_follow_their_controls(lab, page):
    path = lab.folder / "notebooks/widgets.ipynb"
    cells = ["from flashlib.course import widgets", *(f"widgets.{call}" for call in EXPLORERS)]
    _notebook(path, cells)
    chapter = Chapter(page, lab.url("notebooks/widgets.ipynb"))
    chapter.run(cells[0])
    for call, control in EXPLORERS.items():
        shown = chapter.run(f"widgets.{call}")
        picture = shown.locator("img")
        before = picture.get_attribute("alt")
        assert before and len(before) > 20 and "_" not in shown.locator(".widget-label").first.inner_text()
        slider = shown.locator(".widget-slider", has_text=control).get_by_role("slider")
        slider.focus()
        page.keyboard.press("ArrowRight")
        expect(picture).not_to_have_attribute("alt", before)
