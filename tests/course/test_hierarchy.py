"""The memory hierarchy figure tells sizes and rates, and puts things where they fit."""

from types import SimpleNamespace

import pytest

from flashlib.course.figures import h200_memory, hierarchy, memory_hierarchy
from flashlib.measure import MemoryLevel

LEVELS = [
    MemoryLevel("L1 cache", 2**15, None, "one core"),
    MemoryLevel("L2 cache", 2**20, 2.5e10, "one core"),
    MemoryLevel("main memory", 2**34, 3.0e12, "all cores"),
]


def test_words_hold_sizes_rates_and_places():
    marks = [("a tile", 2**15), ("a bit more", 2**15 + 1), ("all scores", 2**30)]
    figure = memory_hierarchy(LEVELS, title="Memory", marks=marks, source="measured here")
    assert figure.alt == (
        "Memory. Fastest first: L1 cache 32 KiB, one core; L2 cache 1 MiB, one core, 25 GB/s; main memory 16 GiB, "
        "all cores, 3 TB/s. Where it fits: a tile: L1 cache; a bit more: L2 cache; all scores: main memory. "
        "Source: measured here."
    )
    assert memory_hierarchy(LEVELS[:1], title="One").alt == "One. Fastest first: L1 cache 32 KiB, one core."
    assert memory_hierarchy(LEVELS, title="Memory", alt="Three levels.").alt == "Three levels."


def test_the_best_of_several_measurements_is_kept(monkeypatch):
    runs = iter([[LEVELS[0], MemoryLevel("L2 cache", 2**20, rate, "one core")] for rate in (1e10, 3e10, 2e10)])
    monkeypatch.setattr(hierarchy, "cpu_memory", lambda: next(runs))
    levels = hierarchy.best_of(3)
    assert [level.bytes_per_s for level in levels] == [None, 3e10]


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"marks: 'a library' of 1 TiB fits into none"):
        memory_hierarchy(LEVELS, title="Memory", marks=[("a library", 2**40)])
    with pytest.raises(ValueError, match="levels must hold at least one level"):
        memory_hierarchy([], title="Memory")


def test_the_rates_of_an_h200_come_from_the_record():
    # JSON has turned the sizes into strings, and "4294967296" sorts before "8388608".
    extra = {"stream_bytes_per_s": {"4294967296": 4.2e12, "8388608": 6.5e12}, "memory_bytes": 150 * 10**9}
    levels = h200_memory(SimpleNamespace(extra=extra))
    assert [level.bytes_per_s for level in levels[2:]] == [6.5e12, 4.2e12]
    assert levels[3].bytes == 150 * 10**9
    assert levels[1].bytes_per_s == pytest.approx(33.4e12, rel=0.01)  # as published for shared memory, 33 TB/s
