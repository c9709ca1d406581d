"""Widgets: the controls are driven as a reader would, and the figure's words must follow."""

import base64
import html
import itertools

import pytest
import torch
from matplotlib.figure import Figure as MatplotlibFigure

from flashlib.course import display, figures, widgets
from flashlib.course.display import Figure
from flashlib.course.widgets import Choice, Explorer, Slider, explore
from flashlib.masks import Causal

EXPLORERS = {
    "tile_stepper": lambda: widgets.tile_stepper(32, 32, 8, 8, Causal()),
    "mask_explorer": lambda: widgets.mask_explorer(16, 16),
    "tile_size_explorer": lambda: widgets.tile_size_explorer(1024, 64),
    "online_softmax_stepper": lambda: widgets.online_softmax_stepper([1.0, 3.0, 2.0, 5.0, 4.0, 0.0], 2),
    "heads_explorer": lambda: widgets.heads_explorer(9, 3),
    "cache_explorer": lambda: widgets.cache_explorer(weight_bytes=270 * 2**20),
    "memory_wall_explorer": widgets.memory_wall_explorer,
    "page_stepper": widgets.page_stepper,
    "roofline_explorer": widgets.roofline_explorer,
    "timing_explorer": widgets.timing_explorer,
    "row_by_hand": widgets.row_by_hand,
    "tiles_by_hand": widgets.tiles_by_hand,
}


@pytest.fixture
def undrawn(monkeypatch):
    """Take the drawing out, which `test_figures` looks at: a PNG's header and a serial number stand for the picture."""
    serial = itertools.count()
    header = Figure(MatplotlibFigure(), alt="blank").png[:24]
    monkeypatch.setattr(display, "_render", lambda fig: header + str(next(serial)).encode())


@pytest.mark.parametrize("name", EXPLORERS)
def test_static_and_interactive_start_with_the_same_figure(name, reader, monkeypatch):
    explorer = EXPLORERS[name]()
    assert type(explorer) is Explorer
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    figure = EXPLORERS[name]()
    assert type(figure) is Figure
    assert figure.alt == explorer.figure.alt


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_changes_the_figure(name, reader, undrawn):
    explorer = EXPLORERS[name]()
    for control_name, control in explorer.controls.items():
        before = explorer.figure.alt
        control.value = other_value(control)
        assert explorer.figure.alt != before, f"{control_name} does nothing"
        assert base64.b64encode(explorer.figure.png).decode() in explorer._image.value
        assert f'alt="{html.escape(explorer.figure.alt)}"' in explorer._image.value
        assert html.escape(explorer.figure.alt) in explorer._caption.value


def other_value(control):
    if hasattr(control, "options"):
        values = [option[1] if isinstance(option, tuple) else option for option in control.options]
        return values[(values.index(control.value) + 1) % len(values)]
    return control.max if control.value != control.max else control.min


def test_tile_stepper_walks_the_loop(reader, undrawn):
    explorer = widgets.tile_stepper(32, 32, 8, 8, Causal(), step=1)
    assert explorer.controls["step"].max == 10
    assert "Step 1 of 10" in explorer.figure.alt and "In fast memory: Q0, K0, V0, O0" in explorer.figure.alt
    explorer.controls["step"].value = 10
    assert "In fast memory: Q3, K3, V3, O3" in explorer.figure.alt and "stored: 4 of O" in explorer.figure.alt
    explorer.controls["step"].value = 2
    assert "In fast memory: Q1, K0" in explorer.figure.alt
    explorer.controls["loop_order"].value = "kv_outer"
    assert explorer.figure.alt.startswith("FlashAttention-1") and "Q1, K0" in explorer.figure.alt
    explorer.controls["step"].value = 5
    assert "Q1, K1" in explorer.figure.alt


def test_mask_explorer_counts_tiles(reader, undrawn):
    explorer = widgets.mask_explorer(16, 16)
    expected = {
        "everything": "Tiles of 4 x 4: 16 full, 0 partial, 0 skipped",
        "causal": "Tiles of 4 x 4: 6 full, 4 partial, 6 skipped",
        "prefix": "Tiles of 4 x 4: 9 full, 2 partial, 5 skipped",
        "documents": "Tiles of 4 x 4: 2 full, 4 partial, 10 skipped",
        "key length": "Tiles of 4 x 4: 8 full, 0 partial, 8 skipped",
    }
    explorer.controls["block_q"].value = explorer.controls["block_k"].value = 4
    explorer.controls["size"].value = 8
    for kind, counts in expected.items():
        explorer.controls["kind"].value = kind
        assert counts in explorer.figure.alt, kind
    explorer.controls["kind"].value = "causal"
    explorer.controls["queries"].value = 4  # bottom-right: four queries at the end of sixteen keys
    assert "Tiles of 4 x 4: 3 full, 1 partial, 0 skipped" in explorer.figure.alt
    explorer.controls["kind"].value = "documents"
    assert "16 keys" in explorer.figure.alt


def test_tile_size_explorer_says_what_fits(reader, undrawn):
    explorer = widgets.tile_size_explorer(4096, 64, 100 * 1024)
    assert "Tile 64 x 64: 80 KiB, fits into 100 KiB" in explorer.figure.alt
    explorer.controls["block_q"].value = 128
    assert "does not fit" in explorer.figure.alt and "K and V 32 times" in explorer.figure.alt
    explorer.controls["block_k"].value = 16
    assert "80 KiB, fits into" in explorer.figure.alt


def test_online_softmax_stepper_lets_blocks_arrive(reader, undrawn):
    explorer = EXPLORERS["online_softmax_stepper"]()
    assert "block 1" in explorer.figure.alt and "block 2" not in explorer.figure.alt
    explorer.controls["blocks_seen"].value = 3
    assert "block 3" in explorer.figure.alt


def test_examples_by_hand_agree_with_softmax(reader, undrawn):
    row = widgets.row_by_hand()
    assert "Nothing seen yet" in row.figure.alt and "m = -∞" in row.figure.alt
    row.controls["blocks_seen"].value = 3
    weights = torch.softmax(torch.tensor([1.0, 3.0, 2.0, 5.0]), 0)
    assert f"= {weights @ torch.tensor([1.0, 2.0, 3.0, 4.0]):.3f}" in row.figure.alt
    tiles = widgets.tiles_by_hand()
    tiles.controls["step"].value = 4
    scores = torch.tensor([[1.0, 0, 2, 1], [0, 3, 1, 2], [2, 1, 0, 4], [1, 2, 3, 0]])
    outputs = torch.softmax(scores, -1) @ torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert all(f"row {i} {output:.3f}" in tiles.figure.alt for i, output in enumerate(outputs))


@pytest.mark.parametrize(
    "change, says",
    [({"values": (1, 2)}, "a value each"), ({"block": 3}, "must divide 4 scores"), ({"seen": 4}, "from 0 to 3; got 4")],
)
def test_a_row_that_cannot_be_drawn_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        figures.row_by_hand(**({"scores": (1, 3, 2, 5), "values": (1, 2, 3, 4), "block": 2, "seen": 1} | change))


def test_tiles_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="square"):
        figures.tiles_by_hand([[1, 2]], [1, 2], 1, 0)
    with pytest.raises(ValueError, match="from 0 to 4; got 5"):
        figures.tiles_by_hand([[1, 2], [3, 4]], [1, 2], 1, 5)


def test_cache_explorer_multiplies_out(reader, undrawn):
    explorer = widgets.cache_explorer(layers=30, q_heads=9, kv_heads=3, head_dim=64)
    explorer.controls["context"].value = 1024
    # K and V, 30 layers, 3 heads of 64, bf16: 22.5 KiB a token.
    assert "KV cache at 1,024 tokens x 1: MHA 67.5 MiB, GQA 22.5 MiB, MQA 7.5 MiB" in explorer.figure.alt
    explorer.controls["batch"].value = 16
    assert "GQA 360 MiB" in explorer.figure.alt
    explorer.controls["itemsize"].value = 4
    assert "GQA 720 MiB" in explorer.figure.alt


def test_roofline_explorer_says_what_binds(reader, undrawn):
    explorer = widgets.roofline_explorer()
    assert "decode of 16 x 8,192 tokens" in explorer.figure.alt and "waits for memory" in explorer.figure.alt
    explorer.controls["phase"].value = "prefill"
    assert "waits for products, then exponentials" in explorer.figure.alt
    explorer.controls["phase"].value = "decode"
    explorer.controls["batch"].value, explorer.controls["length"].value = 1, 512
    assert "waits for starting kernels" in explorer.figure.alt
    explorer.controls["gpu"].value = "a100"
    assert "NVIDIA A100" in explorer.figure.alt


def test_memory_wall_explorer_finds_the_wall(reader, undrawn):
    explorer = widgets.memory_wall_explorer(heads=9, head_dim=64)
    assert "does not fit into 16 GiB" in explorer.figure.alt
    explorer.controls["memory"].value = 32 * 2**30
    assert "which fits into 32 GiB" in explorer.figure.alt


def test_a_combination_that_cannot_be_is_explained_and_the_figure_stays(reader, undrawn):
    def draw(heads, kv_heads):
        return figures.layout_heads(heads, kv_heads)

    explorer = explore(draw, heads=Slider(1, 9, 8), kv_heads=Choice({"one": 1, "two": 2}, 2))
    before = explorer.figure
    explorer.controls["heads"].value = 9
    assert explorer.figure is before
    assert "kv_heads must divide q_heads" in explorer._caption.value
    explorer.controls["kv_heads"].value = 1
    assert "9 query heads and 1 KV head" in explorer.figure.alt


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Slider(0, 5, 6), "value must be from 0 to 5; got 6"),
        (lambda: Choice([1, 2], 3), r"value must be one of \[1, 2\]; got 3"),
        (lambda: Choice({"a": 1}, "a"), r"value must be one of \[1\]; got 'a'"),
        (lambda: widgets.tile_stepper(32, 32, 8, 8, step=99), "value must be from 1 to 16; got 99"),
    ],
)
def test_bad_controls(make, says):
    with pytest.raises(ValueError, match=says):
        make()
