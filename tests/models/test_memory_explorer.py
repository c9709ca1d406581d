"""The explorer of injected memories shows what the chosen alpha, mode and layers give."""

import re

import pytest

from flashlib.config import InjectionConfig
from flashlib.course import widgets
from flashlib.course.chapters.memory_stories import HARBOR, Story, log_probabilities
from flashlib.inference.injection import KVInjector
from flashlib.interop.transformers_memory import encode_memory, with_memory

SHORT = Story(HARBOR.text, HARBOR.questions[:2])


@pytest.mark.weights
def test_the_figure_tells_both_log_probabilities(smollm2, monkeypatch):
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    model, tokenizer = smollm2
    figure = widgets.memory_explorer(model, tokenizer, SHORT)
    memory = encode_memory(model, tokenizer(HARBOR.text).input_ids)
    without = log_probabilities(model, tokenizer, SHORT.questions)
    with with_memory(model, memory, alpha=0.25, injector=KVInjector(InjectionConfig(mode="gate"))):
        remembered = log_probabilities(model, tokenizer, SHORT.questions)
    told = [float(number) for number in re.findall(r"(?:Brask|green) (-\d+\.?\d*)", figure.alt)]
    assert told == pytest.approx([*without, *remembered], abs=0.051)
    assert "gate, alpha = 0.25, layers 0 to 29" in figure.alt


@pytest.mark.weights
def test_controls_redraw_and_say_what_cannot_be(smollm2, monkeypatch):
    monkeypatch.setattr(widgets, "widgets_run", lambda: True)
    explorer = widgets.memory_explorer(*smollm2, SHORT)
    explorer.controls["mode"].value = "blend"
    assert "blend, alpha = 0.25, layers 0 to 29" in explorer.figure.alt
    before = explorer.figure
    explorer.controls["last_layer"].value = 3
    assert "layers 0 to 3" in explorer.figure.alt
    explorer.controls["first_layer"].value = 9
    assert explorer.figure is not before
    assert "there is no layer from 9 to 3" in explorer._caption.value
