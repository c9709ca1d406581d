"""Chapter 08: what the forward kernel visits, and what is read from its machine code."""

from dataclasses import replace

import pytest

from flashlib.course import figures
from flashlib.masks import Causal

pytest.importorskip("triton")


def test_compiled_beside_a_process_that_interprets(monkeypatch):
    from flashlib.course.chapters.machine_code import compile_apart, lines_with, product_shapes, resident_programs
    from flashlib.launch.tiles import TileConfig

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tiles = TileConfig(64, 32, 4, 2)
    (report,) = compile_apart({"small": {"head_dim": 64, "tiles": tiles}})["small"]
    assert report.tiles == tiles and lines_with(report.sass, "MUFU.EX2").startswith("MUFU.EX2 R")
    assert (64, 64, 16) in product_shapes(report)
    # 65,536 registers: 128 threads of 128 make 4 programs, and those of 129 have 136 each, which makes 3.
    assert resident_programs(replace(report, registers=128, shared_memory=0)) == 4
    assert resident_programs(replace(report, registers=129, shared_memory=0)) == 3
    assert resident_programs(replace(report, registers=16, shared_memory=113 * 1024)) == 2
    assert resident_programs(replace(report, shared_memory=report.shared_memory_limit + 1)) == 0
    assert resident_programs(replace(report, registers=16, shared_memory=0, num_warps=16)) == 4


def test_a_compilation_that_fails_is_told():
    from flashlib.course.chapters.machine_code import compile_apart

    with pytest.raises(RuntimeError, match="arch must be one of"):
        compile_apart({"x": {"arch": "sm_1"}})


def test_the_figure_tells_the_order():
    intervals = Causal().intervals(1, 32, 32)
    figure = figures.tile_visits(intervals, 16, 8, 1, (0, 1), (2, 3), tile_bytes=1024, title="Causal")
    assert figure.alt == "Causal. Block 1 of 2 visits full 0, 1, then partial 2, 3; K and V: 4 KiB of 4 KiB."
    nothing = figures.tile_visits(intervals, 16, 8, 0, (), (0, 1), tile_bytes=1024, title="Causal")
    assert "no full tile, then partial 0, 1" in nothing.alt and nothing.png != figure.png
    with pytest.raises(ValueError, match="row_block must be from 0 to 1; got 2"):
        figures.tile_visits(intervals, 16, 8, 2, (), (), tile_bytes=1, title="")
