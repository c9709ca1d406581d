"""Figures say in words what they draw, and the words are right."""

import io
import math

import pytest
import torch
from PIL import Image

from flashlib.course import figures
from flashlib.course.figures import style
from flashlib.masks import Causal, KeyLengths, Tile, Window


def assert_drawn(figure):
    image = Image.open(io.BytesIO(figure.png)).convert("RGB")
    assert len(image.getcolors(1 << 24)) > 10, "an empty picture"
    assert figure.size[0] <= 900, "wider than a notebook's output"
    return image


def test_attention_matrix():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    figure = figures.attention_matrix(weights, ["The", " cat", "\n"], title="Layer 4, head 2")
    assert_drawn(figure)
    assert figure.alt == (
        "Layer 4, head 2: heat map of 3 queries by 3 keys. Strongest key of each query: 'The' to 'The' 1.00; "
        "'cat' to 'cat' 0.75. 1 rows see nothing."
    )
    assert_drawn(figures.attention_matrix(torch.rand(2, 60), tokens_k=[f"t{i}" for i in range(60)]))
    assert_drawn(figures.attention_matrix(torch.rand(70, 70).softmax(-1), ["$\\alpha_", *["x"] * 69]))


@pytest.mark.parametrize(
    "weights, options, says",
    [
        (torch.rand(2, 3, 4), {}, r"weights must be \[Sq, Sk\] of one head, and not empty; got shape \(2, 3, 4\)"),
        (torch.rand(0, 3), {}, "not empty"),
        (torch.rand(2, 3), {"tokens_q": ["a"]}, "tokens_q must be 2 labels, .* got 1"),
        (torch.rand(2, 3), {"tokens_k": ["a"]}, "tokens_k must be 3 labels"),
    ],
)
def test_attention_matrix_bad_input(weights, options, says):
    with pytest.raises(ValueError, match=says):
        figures.attention_matrix(weights, **options)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_running_softmax_is_the_softmax(block):
    x = torch.randn(10, dtype=torch.float64) * 5
    steps = figures.running_softmax(x, block)
    assert len(steps) == math.ceil(10 / block)
    m, _, kept, added = steps[-1]
    assert m == x.max()
    assert m + math.log(kept + added) == pytest.approx(float(x.logsumexp(0)), abs=1e-12)


def test_running_softmax_of_masked_scores():
    steps = figures.running_softmax(torch.tensor([-math.inf, -math.inf, 1.0, -math.inf]), 2)
    assert steps[0] == (-math.inf, 0.0, 0.0, 0.0)
    assert steps[1] == (1.0, 0.0, 0.0, 1.0)


def test_online_softmax_trace():
    figure = figures.online_softmax_trace([0.0, math.log(2), math.log(4), 0.0], 2)
    assert_drawn(figure)
    assert figure.alt == (
        "Online softmax over 4 scores in blocks of 2. block 1: m = 0.69, factor 0, l = 1.50; "
        "block 2: m = 1.39, factor 0.5, l = 2.00."
    )
    first = figures.online_softmax_trace([0.0, math.log(2), math.log(4), 0.0], 2, upto=1)
    assert "block 2" not in first.alt
    assert_drawn(figures.online_softmax_trace([-math.inf] * 4, 2))
    for options, says in [
        ({"block": 0}, "block must be at least 1; got 0"),
        ({"block": 2, "upto": 3}, "upto must be 1 to 2"),
    ]:
        with pytest.raises(ValueError, match=says):
            figures.online_softmax_trace([0.0, 1.0, 2.0, 3.0], **options)
    with pytest.raises(ValueError, match=r"x must be one row of scores \[N\], and not empty; got shape \(2, 2\)"):
        figures.online_softmax_trace(torch.ones(2, 2), 1)


def test_mask_figure():
    figure = figures.mask_figure(Causal(), 8, 16, 4, 4)
    assert_drawn(figure)
    assert figure.alt == (
        "Causal: 8 query rows by 16 keys; 100 of 128 pairs visible (78%). Tiles of 4 x 4: 5 full, 2 partial, 1 skipped."
    )
    assert figures.mask_figure(Causal(), 8, 8).alt == "Causal: 8 query rows by 8 keys; 36 of 64 pairs visible (56%)."


def test_mask_figure_of_a_ragged_batch():
    figure = figures.mask_figure(Window(2, 0) & KeyLengths([6, 3]), 6, 6, 3, 3, batch=2, title="Two lengths")
    assert_drawn(figure)
    assert (
        figure.alt.startswith("Two lengths: 6 query rows by 6 keys, 2 sequences;") and "rows see nothing" in figure.alt
    )


def test_the_colors_of_a_mask_are_in_the_picture():
    """A tile that is skipped, partial or full shows as such."""
    image = assert_drawn(figures.mask_figure(Causal(), 8, 16, 4, 4))
    present = {color for count, color in image.getcolors(1 << 24) if count > 200}
    for kind_and_visible in [(Tile.SKIP, False), (Tile.PARTIAL, False), (Tile.PARTIAL, True), (Tile.FULL, True)]:
        hex_color = figures.tiles._CELL[kind_and_visible].lstrip("#")
        assert tuple(int(hex_color[at : at + 2], 16) for at in (0, 2, 4)) in present, kind_and_visible


@pytest.mark.parametrize(
    "options, says",
    [
        ({"q_len": 8, "kv_len": 8, "block_q": 4}, "block_q and block_k come together; got 4 and None"),
        ({"q_len": 0, "kv_len": 8}, "q_len and kv_len must be at least 1; got 0 and 8"),
    ],
)
def test_mask_figure_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        figures.mask_figure(Causal(), **options)


def test_steps_of_both_loops_visit_each_visible_tile_once():
    outer_q = figures.tile_steps(40, 64, 8, 16, Causal())
    outer_kv = figures.tile_steps(40, 64, 8, 16, Causal(), "kv_outer")
    visible = {
        (i, j)
        for i in range(5)
        for j in range(4)
        if Causal().intervals(1, 40, 64).tile_map(8, 16)[0, i, j] != Tile.SKIP
    }
    assert [(s.i, s.j) for s in outer_q] == sorted(visible)
    assert [(s.j, s.i) for s in outer_kv] == sorted((j, i) for i, j in visible)


def test_loads_and_stores_of_both_loops():
    """Without a mask: Tr x Tc tiles. Dao et al. 2022 algorithm 1 and Dao 2023 algorithm 1."""
    rows, columns = 5, 8
    last = figures.tile_steps(40, 64, 8, 8)[-1]
    assert (last.q_loads, last.kv_loads, last.o_loads, last.o_stores) == (rows, rows * columns, 0, rows)
    last = figures.tile_steps(40, 64, 8, 8, loop_order="kv_outer")[-1]
    assert (last.q_loads, last.kv_loads, last.o_loads, last.o_stores) == (
        rows * columns,
        columns,
        rows * (columns - 1),
        rows * columns,
    )


def test_tile_sweep():
    figure = figures.tile_sweep(32, 32, 8, 8, 5, Causal())
    assert_drawn(figure)
    assert figure.alt == (
        "FlashAttention-2: rows outside. Step 5 of 10, over 4 x 4 tiles, 6 of them skipped. In fast memory: Q2, K1, V1, O2. "
        "Loaded so far: 3 tiles of Q, 5 of K, 5 of V, 0 of O; stored: 2 of O."
    )
    assert_drawn(figures.tile_sweep(4, 130, 4, 10, 12, loop_order="kv_outer"))
    assert_drawn(figures.tile_sweep(256, 8, 8, 8, 1))
    for options, says in [
        ({"step": 11, "mask": Causal()}, "step must be 1 to 10 for this loop; got 11"),
        ({"step": 0}, "step must be 1 to 16 for this loop; got 0"),
        ({"step": 1, "loop_order": "inside_out"}, "loop_order must be 'q_outer' or 'kv_outer'; got 'inside_out'"),
    ]:
        with pytest.raises(ValueError, match=says):
            figures.tile_sweep(32, 32, 8, 8, **options)
    with pytest.raises(ValueError, match="block_k must be at least 1; got 0"):
        figures.tile_sweep(32, 32, 8, 0, 1)


def test_memory_scaling():
    figure = figures.memory_scaling([1024, 2048], {"naive": [2**22, 2**24], "tiled": [2**20, None]}, wall_bytes=2**23)
    assert_drawn(figure)
    assert figure.alt == (
        "Memory against sequence length. Memory over sequence length N. naive: 4 MiB at 1,024 to 16 MiB at 2,048; "
        "tiled: 1 MiB at 1,024 to 1 MiB at 1,024. Line across: this machine's memory, 8 MiB."
    )


def test_what_is_continued_is_drawn_and_said_to_be():
    points = [1024, 2048, 4096]
    figure = figures.memory_scaling(points, {"naive": [2**20, 2**22, 2**24]}, measured_to=2048)
    assert_drawn(figure)
    assert figure.alt.endswith("Measured up to 2,048, continued beyond.")
    assert figure.png != figures.memory_scaling(points, {"naive": [2**20, 2**22, 2**24]}).png


def test_line_chart():
    measured = {"ours": [1.0, 2.0], "theirs": [1.01, 2.01], "not run": [None, None]}
    labels = {"xlabel": "N", "ylabel": "time (ms)", "title": "Forward time"}
    figure = figures.line_chart([1, 2], measured, **labels, source=figures.recorded("NVIDIA H200", "2026-11-21"))
    assert_drawn(figure)
    assert "not run: no values" in figure.alt and figure.alt.endswith("Source: recorded on NVIDIA H200, 2026-11-21.")
    assert figures.line_chart([1, 2], measured, **labels, alt="Ours is as fast.").alt == "Ours is as fast."
    for x, series, options, says in [
        ([1, 2], {}, {}, "series must hold at least one series"),
        ([1, 2], {"a": [1]}, {}, "series 'a' must have 2 values, one for each point; got 1"),
        ([0, 2], {"a": [1, 2]}, {"log_x": True}, "x must be positive on a logarithmic axis; got 0"),
        ([1, 2], {"a": [1, -2]}, {"log_y": True}, "series 'a' must be positive on a logarithmic axis; got -2"),
    ]:
        with pytest.raises(ValueError, match=says):
            figures.line_chart(x, series, **labels, **options)


def test_bars():
    figure = figures.bars(["Q", "K"], [1, 8], ylabel="times read", title="Reads")
    assert_drawn(figure)
    assert figure.alt == "Reads. Bars of times read: Q 1, K 8."
    grouped = figures.bars(
        ["512"], {"naive": [2**20], "tiled": [2**10]}, ylabel="bytes read", title="Traffic", bytes_y=True
    )
    assert_drawn(grouped)
    assert grouped.alt == "Traffic. Bars of bytes read: naive: 512 1 MiB; tiled: 512 1 KiB."
    with pytest.raises(ValueError, match="series '' must have 2 values"):
        figures.bars(["Q", "K"], [1], ylabel="x", title="y")


def test_operands_keep_their_color_in_charts():
    image = assert_drawn(figures.bars(["bytes"], {"K": [1], "Q": [2]}, ylabel="bytes", title="Traffic"))
    present = {color for count, color in image.getcolors(1 << 24) if count > 1000}
    assert {(0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2)} <= present


@pytest.mark.parametrize(
    "q_heads, kv_heads, says",
    [
        (9, 3, "Grouped-query attention (GQA): 9 query heads and 3 KV heads; 3 query heads to each KV head"),
        (8, 8, "Multi-head attention (MHA): 8 query heads and 8 KV heads; 1 query head to each KV head"),
        (32, 1, "Multi-query attention (MQA): 32 query heads and 1 KV head; 32 query heads to each KV head"),
    ],
)
def test_layout_heads(q_heads, kv_heads, says):
    figure = figures.layout_heads(q_heads, kv_heads)
    assert_drawn(figure)
    assert figure.alt.startswith(says)
    with pytest.raises(ValueError, match="kv_heads must divide q_heads, both at least 1; got q_heads=9, kv_heads=4"):
        figures.layout_heads(9, 4)


def test_rotary_figure():
    figure = figures.rotary_figure(64, [0, 1, 2], 10_000.0, pairs=[0, 31])
    assert_drawn(figure)
    assert (
        "positions 0, 1, 2: pair 0 turns once in 6.28 positions; pair 31 turns once in 47,100 positions." in figure.alt
    )
    assert_drawn(figures.rotary_figure(8, range(20)))
    with pytest.raises(ValueError, match=r"pairs must be among 0 to 31; got \[32\]"):
        figures.rotary_figure(64, [0], pairs=[32])
    with pytest.raises(ValueError, match="positions must hold at least one"):
        figures.rotary_figure(64, [])


def test_cache_figure():
    figure = figures.cache_figure(6, 2, 16, bytes_per_token=1024)
    assert_drawn(figure)
    assert figure.alt == (
        "KV cache of 16 slots: prefill writes 6, then 2 decoding steps write one each and read all before; "
        "8 slots are full at the end, 8 KiB."
    )
    with pytest.raises(ValueError, match="must fit into capacity; got prompt_len=6, new_tokens=20, capacity=16"):
        figures.cache_figure(6, 20, 16)


def test_tile_budget():
    figure = figures.tile_budget(4096, 64, 64, 32, 64 * 1024)
    assert_drawn(figure)
    assert figure.alt == (
        "Tile 64 x 32: 56 KiB, fits into 64 KiB. For N = 4,096 and head_dim 64, the loop moves 130 MiB: K and V 64 times, "
        "Q and O once. Naive attention moves 260 MiB. Beside 32 keys, at most 76 rows fit."
    )
    assert "does not fit" in figures.tile_budget(4096, 64, 64, 64, 64 * 1024).alt
    with pytest.raises(ValueError, match="block_k must be at least 1; got 0"):
        figures.tile_budget(4096, 64, 64, 0, 1)


def test_the_largest_block_fits_and_one_more_row_does_not():
    from flashlib.course.figures.traffic import largest_block_q

    for head_dim, block_k, sram, itemsize in [(64, 32, 65_536, 4), (128, 64, 232_448, 2), (16, 16, 5000, 4)]:
        rows = largest_block_q(head_dim, block_k, sram, itemsize)
        assert sum(figures.tile_bytes(head_dim, rows, block_k, itemsize).values()) <= sram
        assert sum(figures.tile_bytes(head_dim, rows + 1, block_k, itemsize).values()) > sram
    assert largest_block_q(128, 64, 1000, 4) == 0


@pytest.mark.parametrize("n, block_q", [(512, 32), (600, 48)])
def test_the_bytes_that_figures_state_are_those_that_the_code_moves(n, block_q):
    """`moved_bytes` and `naive_moved_bytes` are formulas; the meter counts the real thing."""
    from flashlib.backends.pytorch import tiled_attention
    from flashlib.measure import TrafficMeter

    d = 32
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    stated = figures.moved_bytes(n, d, block_q, 4)
    with TrafficMeter(q=q, k=k, v=v, fast_memory=5 * block_q * block_q * 4 + 12 * block_q * d * 4) as meter:
        out = tiled_attention(q, k, v, block_q=block_q, block_k=16)
    assert {name.upper(): meter.bytes_read[name] for name in "qkv"} == {name: stated[name] for name in "QKV"}
    assert stated["O"] == out.nbytes

    with TrafficMeter(q=q, k=k, v=v) as meter:
        scores = q @ k.mT
        del scores
        (torch.ones(1, 1, n, n)).softmax(-1) @ v
    made = 2 * n * n * 4  # S written and read; P written and read: the ones stand for S
    assert meter.bytes_read["made inside"] == made
    assert figures.naive_moved_bytes(n, d, 4) == 4 * n * d * 4 + 2 * made


def test_colors_can_be_told_apart_without_color():
    """Mask tiles get darker with work, so that a black-and-white print still shows them."""

    def lightness(hex_color):
        red, green, blue = (int(hex_color.lstrip("#")[at : at + 2], 16) for at in (0, 2, 4))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    cells = figures.tiles._CELL
    shades = [lightness(cells[kind]) for kind in [(Tile.SKIP, False), (Tile.PARTIAL, True), (Tile.FULL, True)]]
    assert shades[0] - shades[1] > 60 and shades[1] - shades[2] > 60
    assert len({style.Q, style.K, style.V, style.S, style.O, style.LSE}) == 6
