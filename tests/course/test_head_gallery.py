"""The heads of a layer in one picture: told in words, and drawn where the weight is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flashlib.course import figures


def looks_at(distance, length=8):
    """A head that looks `distance` tokens back, or at the first token where there are not so many."""
    weights = torch.zeros(length, length)
    weights[torch.arange(length), (torch.arange(length) - distance).clamp(min=0)] = 1.0
    return weights


def test_each_head_is_told_in_words():
    figure = figures.head_gallery(
        torch.stack([looks_at(0), looks_at(1), looks_at(99), looks_at(2)]), 2, title="Layer 7"
    )
    assert figure.alt == (
        "Layer 7. Mean weight of the first token, the token itself and the one before it. head 0: 0.00, 1.00, 0.00; "
        "head 1: 0.14, 0.00, 1.00; head 2: 1.00, 0.00, 0.14; head 3: 0.29, 0.00, 0.14."
    )


def test_weights_are_drawn_dark():
    def dark_share(weights):
        picture = np.asarray(Image.open(io.BytesIO(figures.head_gallery(weights, 1, title="x").png)).convert("L"))
        return (picture < 120).mean()

    none, diagonal = torch.zeros(1, 8, 8), looks_at(0)[None]
    assert dark_share(diagonal) - dark_share(none) > 0.04
    assert figures.head_gallery(torch.rand(9, 16, 16), 3, title="x").size[0] <= 900


@pytest.mark.parametrize(
    "weights, kv_heads, says",
    [
        (torch.rand(8, 8), 1, r"weights must be \[Hq, S, S\] with S at least 2; got shape \(8, 8\)"),
        (torch.rand(2, 4, 8), 1, r"got shape \(2, 4, 8\)"),
        (torch.rand(2, 1, 1), 1, "S at least 2"),
        (torch.rand(9, 4, 4), 2, "kv_heads must divide the 9 heads of weights; got 2"),
        (torch.rand(9, 4, 4), 0, "got 0"),
    ],
)
def test_bad_input(weights, kv_heads, says):
    with pytest.raises(ValueError, match=says):
        figures.head_gallery(weights, kv_heads, title="x")
