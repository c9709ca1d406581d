"""Figures of a race say what the record says."""

import dataclasses

import pytest

from flashlib.course.figures.speed import (
    memory_by_length,
    ratio_to_best,
    ratios_to_best,
    roofline,
    save_figures,
    speed_by_length,
)
from flashlib.measure.racing.cases import parse_grid
from flashlib.measure.records.record import new_record

RATES = {"triton": 500.0, "torch_sdpa_cudnn": 400.0, "flex_attention": 250.0, "somebody_else": 100.0}


@pytest.fixture
def record():
    rows = []
    for case in parse_grid("length=1024,4096 head_dim=64,128 mask=full,causal"):
        for peer, rate in RATES.items():
            slow = 0.5 if peer == "triton" and case.causal else 1.0
            rows.append({**case.columns(), "peer": peer, "tflops": rate * slow, "why_not": None})
        rows.append({**case.columns(), "peer": "flash_attn_3", "ms": None, "why_not": "not installed"})
    extra = {"device": "cuda", "matmul_flops_per_s": 7e14, "stream_bytes_per_s": 4e12}
    return dataclasses.replace(new_record("speed", rows, [], **extra), device="a GPU")


def test_ours_is_held_against_the_fastest_other(record):
    ratios = ratios_to_best(record)
    assert {best for _, best, _ in ratios} == {"torch_sdpa_cudnn"}
    assert [ratio for label, _, ratio in ratios if "full" in label] == [1.25] * 4
    assert [ratio for label, _, ratio in ratios if "causal" in label] == [0.625] * 4
    assert "causal S4096 D128: 0.62 of torch_sdpa_cudnn" in ratio_to_best(record).alt


def test_the_pictures_are_described_and_saved(record, tmp_path):
    assert "forward, full, D 128: at S 4096, triton leads" in speed_by_length(record).alt
    assert "forward, causal, D 64: at S 4096, torch_sdpa_cudnn leads" in speed_by_length(record).alt
    assert "The nearest to the first is triton with 71%" in roofline(record).alt
    paths = save_figures(record, tmp_path)
    assert [path.name for path in paths] == ["speed_speed.png", "speed_roofline.png", "speed_ratio.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_memory_is_drawn_from_a_record_of_memory(record, tmp_path):
    rows = [
        {**row, "tflops": None, "peak_bytes": row["length"] * 1000} for row in record.rows if row["peer"] != "triton"
    ]
    memory = dataclasses.replace(record, rows=rows)
    assert "peak memory" in memory_by_length(memory).alt
    assert [path.name for path in save_figures(memory, tmp_path)] == ["speed_memory.png"]
    with pytest.raises(ValueError, match="no row of 'speed' has a value of 'tflops'"):
        speed_by_length(memory)
    with pytest.raises(ValueError, match="triton was timed in no case together with another peer"):
        ratio_to_best(memory)
    assert save_figures(dataclasses.replace(record, rows=[]), tmp_path) == []
