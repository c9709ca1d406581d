"""The explorer of attention weights shows the weights of the layer and head that were chosen."""

import re

import pytest
import torch

from flashlib.course import capture_qkv, widgets
from flashlib.course.display import Figure

TEXT = "Alice saw the White Rabbit and Alice ran after the"


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (17, 5), (29, 8)])
def test_the_figure_tells_the_weights_of_its_head(smollm2, monkeypatch, layer, head):
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    figure = widgets.attention_explorer(smollm2[0], TEXT, layer=layer, head=head)
    assert type(figure) is Figure
    captured = capture_qkv(smollm2[0], TEXT, layer)
    scores = captured.q[0, head].double() @ captured.k[0, head // 3].double().T * captured.scale
    seen = torch.ones_like(scores).tril().bool()
    strongest = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1).max(-1).values
    told = [float(weight) for weight in re.findall(r"' (\d\.\d\d)", figure.alt)]
    assert told == pytest.approx(strongest.tolist(), abs=0.0051)
    assert figure.alt.startswith(f"Layer {layer}, head {head}:")
