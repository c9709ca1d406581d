"""Calls under the roofs, and estimates against measurements: the words are those of the numbers."""

import io

import pytest
from PIL import Image

from flashlib.cost import Problem, attention_time, device, formula
from flashlib.cost.verdict import Point
from flashlib.course import figures

H200 = device("h200")


def assert_drawn(figure):
    assert len(Image.open(io.BytesIO(figure.png)).convert("RGB").getcolors(1 << 24)) > 10, "an empty picture"
    assert figure.size[0] <= 900, "wider than a notebook's output"


def test_a_call_lies_where_its_counts_and_its_time_put_it():
    step = Problem.causal(64, 32, 8, 1, 8192, 128)
    figure = figures.under_roofs({"decoding": (step, "decode")}, H200)
    assert_drawn(figure)
    least, seconds = formula(step), attention_time(step, H200, direction="decode").seconds
    assert f"decoding: {least.products / least.bytes:.3g} FLOPs a byte" in figure.alt
    assert f"{1e3 * seconds:.3g} ms, waits for memory" in figure.alt


def test_several_calls_share_the_roofs():
    calls = {
        "prefill": (Problem.causal(1, 32, 8, 8192, 8192, 128), "forward"),
        "decode": (Problem.causal(16, 32, 8, 1, 8192, 128), "decode"),
    }
    figure = figures.under_roofs(calls, H200, title="Two phases")
    assert_drawn(figure)
    assert figure.alt.startswith("Two phases, NVIDIA H200 SXM. prefill: ") and "; decode: " in figure.alt
    with pytest.raises(ValueError, match="calls must hold at least one call"):
        figures.under_roofs({}, H200)


def test_estimates_are_counted_by_kind_and_band():
    def point(kind, measured, estimate):
        return Point("record", "case", kind, measured, estimate, "memory", False, {}, {})

    points = [point("forward", 1.0, 1.1), point("forward", 2.0, 1.9), point("decode", 0.1, 0.15)]
    figure = figures.estimates(points, source="recorded on a GPU")
    assert_drawn(figure)
    assert figure.alt == (
        "Estimated against measured: 3 points, 2 within 20%. forward: -5% to +10%; decode: +50% to +50%. recorded on a GPU."
    )
    with pytest.raises(ValueError, match="points must hold at least one point"):
        figures.estimates([])
