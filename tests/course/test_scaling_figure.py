"""Lines on logarithmic axes, and the exponents written beside them."""

import io

import pytest
from PIL import Image

from flashlib.course.figures.scaling import power_laws

N = (512, 1024, 2048)


def test_exponents_and_ends_are_told():
    square, linear = {n: 4.0 * n * n for n in N}, {n: 1024.0 * n for n in N}
    figure = power_laws({"made": {"standard": square, "tiled": linear}, "moved": {"tiled": square}}, title="Counted")
    assert figure.alt == (
        "Counted. Over sequence length N. made: standard from 1 MiB at 512 to 16 MiB at 2,048, as N^2.00, "
        "tiled from 512 KiB at 512 to 2 MiB at 2,048, as N^1.00; moved: tiled from 1 MiB at 512 to 16 MiB at 2,048, "
        "as N^2.00."
    )
    image = Image.open(io.BytesIO(figure.png)).convert("RGB")
    assert len(image.getcolors(1 << 24)) > 10 and figure.size[0] <= 900


@pytest.mark.parametrize(
    "panels, says",
    [
        ({}, "panels must hold at least one panel"),
        ({"made": {"tiled": {512: 1.0}}}, "'made', 'tiled': a power law needs at least 2 points; got 1"),
    ],
)
def test_bad_input(panels, says):
    with pytest.raises(ValueError, match=says):
        power_laws(panels, title="x")
