"""Rates follow from sizes and time; caches are read as the system tells them."""

import pytest
import torch

from flashlib.measure import TrafficMeter
from flashlib.measure.racing import machine
from flashlib.measure.racing.machine import cpu_memory, matmul_flops_per_s, stream_bytes_per_s
from flashlib.measure.racing.timing import Timing


@pytest.fixture
def one_millisecond(monkeypatch):
    """Every call takes a millisecond by this clock, and half of one when nothing disturbs it."""

    def timed(call, **_):
        call()
        return Timing(1.0, 0.5, 2.0, 10)

    monkeypatch.setattr(machine, "time_call", timed)


def test_rates_are_work_by_undisturbed_time(one_millisecond):
    assert matmul_flops_per_s(64) == pytest.approx(2 * 64**3 / 0.5e-3)
    assert matmul_flops_per_s(64, dtype=torch.bfloat16) == pytest.approx(2 * 64**3 / 0.5e-3)
    assert stream_bytes_per_s(4096) == pytest.approx(2 * 4096 / 0.5e-3)


def test_what_is_timed_is_the_work_it_is_named_for(monkeypatch):
    meters = []

    def metered(call, **_):
        with TrafficMeter() as meter:
            call()
        meters.append(meter)
        return Timing(1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(machine, "time_call", metered)
    matmul_flops_per_s(32)
    stream_bytes_per_s(4096)
    product, stream = meters
    assert product.calls == {"aten.mm": 1}
    assert product.largest.shape == (32, 32)
    assert stream.calls == {"aten.neg": 1}
    assert stream.bytes_read.total() == stream.bytes_written.total() == 4096
    assert stream.live_bytes == 0


def _fake_cache(folder, index, **told):
    (folder / f"index{index}").mkdir()
    for name, text in told.items():
        (folder / f"index{index}" / name).write_text(f"{text}\n")


def test_linux_caches_are_read_without_those_for_instructions(tmp_path):
    _fake_cache(tmp_path, 0, level=1, type="Data", size="48K", shared_cpu_list="0")
    _fake_cache(tmp_path, 1, level=1, type="Instruction", size="32K", shared_cpu_list="0")
    _fake_cache(tmp_path, 2, level=3, type="Unified", size="32768K", shared_cpu_list="0-7")
    _fake_cache(tmp_path, 3, level=2, type="Unified", size="2048K", shared_cpu_list="0,8")
    assert machine._caches_from_sysfs(tmp_path) == [
        (1, 48 * 1024, "one core"),
        (2, 2 * 2**20, "several cores"),
        (3, 32 * 2**20, "several cores"),
    ]
    assert machine._caches_from_sysfs(tmp_path / "nowhere") == []


def test_macos_caches_are_those_that_sysctl_knows(monkeypatch):
    def sysctl(command, **_):
        known = {"hw.perflevel0.l1dcachesize": "131072\n"}.get(command[-1])
        return machine.subprocess.CompletedProcess(command, 1 if known is None else 0, stdout=known or "")

    monkeypatch.setattr(machine.subprocess, "run", sysctl)
    assert machine._caches_from_sysctl() == [(1, 131072, "one core")]


def test_levels_grow_and_all_but_l1_are_timed(monkeypatch, one_millisecond):
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    told = [(1, 32 * 2**10, "one core"), (2, 2**20, "one core"), (3, 2**25, "several cores")]
    monkeypatch.setattr(machine, "_caches_from_sysfs", lambda: told)
    levels = cpu_memory()
    assert [level.name for level in levels] == ["L1 cache", "L2 cache", "L3 cache", "main memory"]
    assert [level.bytes for level in levels] == sorted(level.bytes for level in levels)
    assert levels[0].bytes_per_s is None
    assert levels[1].bytes_per_s == pytest.approx(2 * 2**18 / 0.5e-3)
    assert all(level.bytes_per_s is None for level in cpu_memory(measure=False))
