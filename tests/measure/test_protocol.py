"""The protocol of short, middle and long prompts: what it holds, what its columns mean, and where nobody counts cache misses."""

import ctypes
import errno
import time

import psutil
import pytest
from typer.testing import CliRunner

from flashlib.cli import app
from flashlib.course.figures.speed import protocol_by_length, save_figures
from flashlib.measure.counting import events
from flashlib.measure.counting.events import EventsUnavailableError, count_events
from flashlib.measure.racing import protocol
from flashlib.measure.racing.bench import plan, run, summary
from flashlib.measure.racing.cases import Case
from flashlib.measure.racing.protocol import Protocol, latencies, protocol_cases

SMALL = Case(2, 4, 2, 24, 16, "causal", "forward", "fp32")


@pytest.fixture
def small(monkeypatch):
    """A plan of one small case and one of another batch."""
    monkeypatch.setattr("flashlib.measure.racing.bench.protocol_cases", lambda device: [SMALL, Case(1, 4, 2, 24, 16, "causal", "forward", "fp32")])  # fmt: skip
    return plan("protocol", device="cpu", peers=["tiled", "naive"], seconds=0.0, seed=1)


def test_every_length_comes_in_every_batch() -> None:
    for device in ("cpu", "cuda"):
        cases = protocol_cases(device)
        sizes = {(case.length, case.batch) for case in cases}
        assert sizes == {(length, batch) for length in (128, 1024, 4096, 8192) for batch in (1, 4, 16)}
        assert len({(case.q_heads, case.kv_heads, case.head_dim, case.dtype) for case in cases}) == 1
        assert all(case.causal and case.direction == "forward" for case in cases)


def test_percentiles_are_of_the_calls(rng) -> None:
    times = [float(n) for n in range(1, 101)]
    rng.shuffle(times)
    assert latencies(times) == {"ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "calls": 100}
    assert latencies([7.0])["p99_ms"] == 7.0


def test_a_record_of_it_is_told_and_drawn(small, tmp_path, monkeypatch) -> None:
    def refuses(call, events=None):
        raise EventsUnavailableError("hardware events cannot be counted: no counter")

    monkeypatch.setattr(protocol, "count_events", refuses)
    record = run(small, tmp_path)
    assert [(row["batch"], row["peer"]) for row in record.rows] == [
        (2, "tiled"),
        (2, "naive"),
        (1, "tiled"),
        (1, "naive"),
    ]
    for row in record.rows:
        assert row["calls"] == protocol.LEAST_CALLS and 0 < row["ms"] <= row["p90_ms"] <= row["p99_ms"]
        tokens = row["batch"] * row["length"]
        assert 1e3 * tokens / row["p99_ms"] <= row["tokens_per_s"] and row["processors"] > 0
        assert row["cache_misses"] is None and "no counter" in row["cache_why_not"]
    scores = 2 * 4 * 24 * 24 * 4
    assert record.rows[1]["peak_bytes"] >= 2 * scores
    told = str(summary(record))
    assert "Cache misses: hardware events cannot be counted: no counter." in told and "tokens/s" in told
    assert "batch of 2" in protocol_by_length(record).alt
    assert [path.name for path in save_figures(record, tmp_path)] == ["protocol_by_length.png"]


def test_what_would_not_fit_is_not_begun(small, monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10_000}))
    tiled, naive = Protocol(small)(SMALL)
    assert tiled["ms"] > 0
    assert naive["ms"] is None and naive["why_not"] == "its matrices of scores take 54 KiB, and 9.77 KiB are free"


def test_cache_misses_are_a_call_s_own(small, monkeypatch) -> None:
    monkeypatch.setattr(
        protocol, "count_events", lambda call: call() is None or {"cache_references": 9, "cache_misses": 4}
    )
    row = Protocol(small)(SMALL)[0]
    assert (row["cache_references"], row["cache_misses"], row["cache_why_not"]) == (9, 4, None)


def test_events_of_this_process_are_counted() -> None:
    """The time of this thread in nanoseconds is an event too, and one that virtual machines have."""
    spent = []

    def work() -> None:
        started = time.thread_time_ns()
        while time.thread_time_ns() - started < 20_000_000:
            pass
        spent.append(time.thread_time_ns() - started)

    try:
        found = count_events(work, {"task_clock": (events.SOFTWARE, 1)})
    except EventsUnavailableError as error:
        pytest.skip(str(error))
    assert found["task_clock"] >= 0.5 * spent[0]


@pytest.mark.parametrize(("code", "says"), [(errno.ENOENT, "shows no such counter"), (errno.EACCES, "for administrators"), (errno.EIO, "Input/output error")])  # fmt: skip
def test_why_events_are_not_counted_is_said(monkeypatch, code, says) -> None:
    class Refuses:
        def syscall(self, *arguments):
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(events.ctypes, "CDLL", lambda name, use_errno: Refuses())
    monkeypatch.setattr(events.platform, "system", lambda: "Linux")
    monkeypatch.setattr(events.platform, "machine", lambda: "x86_64")
    with pytest.raises(EventsUnavailableError, match=says):
        count_events(lambda: None)
    monkeypatch.setattr(events.platform, "system", lambda: "Darwin")
    with pytest.raises(EventsUnavailableError, match=r"on Linux only; this is Darwin"):
        count_events(lambda: None)


def test_a_preset_that_is_not_there_is_refused() -> None:
    answer = CliRunner().invoke(app, ["bench", "protocoll"])
    assert answer.exit_code == 1 and "presets are" in answer.output and "protocol" in answer.output
