"""The memory wall is measured: naive attention grows with N^2, the others with N, and the limit is kept."""

import torch

from flashlib.measure import memory_wall, time_call


def inputs(tokens):
    return tuple(torch.randn(1, heads, tokens, 16) for heads in (2, 1, 1))


def test_growth_and_wall():
    rows = memory_wall(inputs, [64, 128, 256, 512], ["reference", "tiled"], limit_bytes=3_000_000, budget_s=0.0)
    naive = [row for row in rows if row["backend"] == "reference"]
    tiled = [row for row in rows if row["backend"] == "tiled"]
    assert [row["tokens"] for row in tiled] == [64, 128, 256, 512]
    assert not any(row["wall"] for row in tiled)
    assert naive[-1]["wall"]
    assert naive[-1]["ms"] is None
    assert naive[2]["peak_bytes"] > 3 * naive[1]["peak_bytes"]
    assert tiled[3]["peak_bytes"] < 3 * tiled[2]["peak_bytes"]


def test_timing_counts_its_repeats():
    calls = []
    timing = time_call(lambda: calls.append(1), budget_s=0.0, min_repeats=4)
    assert timing.repeats == 4
    assert len(calls) == 6  # a warm-up and an estimate before
    assert timing.p20_ms <= timing.median_ms <= timing.p80_ms
