"""Chapter 16: the machine whose clock is turned by hand, ways to time on it, and what counters refute."""

import pytest

from flashlib.cost import device
from flashlib.course.chapters.diagnosis import BUSY, HYPOTHESES, diagnose, told
from flashlib.course.chapters.timing_machine import COMPILE_MS, FLUSH_MS, HABITS, LAUNCH_MS, WAYS, Machine, measured
from flashlib.measure.records.record import load_record


def _costs(rng) -> dict[str, float]:
    return {name: rng.uniform(2, 9) for name in "abc"}


@pytest.mark.parametrize("habit", HABITS)
def test_the_careful_way_finds_what_is_true(habit, rng) -> None:
    """Where the machine slows down, the times to each other; everywhere else each of them."""
    costs = _costs(rng)
    found = measured("careful", costs, **HABITS[habit])
    scale = found["a"] / costs["a"] if habit == "slows down" else 1.0
    for name, cost in costs.items():
        assert found[name] == pytest.approx(scale * cost, rel=0.06 if habit == "slows down" else 0.02), name


def test_each_other_way_fails_on_its_habit(rng) -> None:
    costs = _costs(rng)
    assert measured("launches only", costs, **HABITS["launches come back early"]) == dict.fromkeys(
        costs, pytest.approx(LAUNCH_MS)
    )
    assert all(
        ms > COMPILE_MS / 10 for ms in measured("first runs too", costs, **HABITS["first runs compile"]).values()
    )
    warm = measured("warm cache", costs, **HABITS["a cache"])
    assert all(warm[name] < 0.5 * cost for name, cost in costs.items())
    late = measured("one after the other", costs, **HABITS["slows down"])
    assert late["c"] / late["a"] > 1.05 * costs["c"] / costs["a"]
    assert all(ms > 3 * costs[name] for name, ms in measured("mean", costs, **HABITS["disturbed runs"]).items())
    with pytest.raises(ValueError, match=r"way must be one of .*; got 'hastily'"):
        measured("hastily", costs)


def test_a_launch_returns_and_a_wait_does_not_until_all_is_done() -> None:
    machine = Machine({"a": 4.0}, early=True)
    machine.run("a"), machine.flush()
    assert machine.answer(("clock",)) == pytest.approx(2 * LAUNCH_MS)
    machine.wait()
    assert machine.now == pytest.approx(LAUNCH_MS + 4.0 + FLUSH_MS)
    for request in (("run", "b"), ("look",), "wait", None, ["run"]):
        with pytest.raises(ValueError):
            machine.answer(request)
    assert len(WAYS) == 6


def _row(memory: float, tensor: float, exponentials: float, **stalls) -> dict:
    rate = device("h200").read_bytes_per_s
    return {"seconds": 0.001, "dram_read": memory * rate * 0.001, "dram_written": 0, "tensor_pipe": tensor, "exponential_unit": exponentials, "stalls": {"selected": 9.0, **stalls}}  # fmt: skip


def test_counters_refute_and_leave_one_hypothesis() -> None:
    h200 = device("h200")
    for row, binds in (
        (_row(0.9, 0.1, 0.1, barrier=1.0), "memory"),
        (_row(0.1, 0.9, 0.1, barrier=1.0), "tensor cores"),
        (_row(0.1, 0.2, 0.8, barrier=1.0), "exponentials"),
        (_row(0.1, 0.5, 0.4, barrier=1.0), "products and exponentials"),
        (_row(0.4, 0.2, 0.1, barrier=1.0, wait=2.0), "latency"),
    ):
        found = diagnose(row, h200)
        assert found.binds == binds and not found.refutes(binds)
        assert found.refutes("latency") is (binds != "latency")
        assert all(found.refutes(name) is (found.shares[name] < BUSY) for name in HYPOTHESES if name != "latency")
    assert found.waits == ("wait", 2.0)
    with pytest.raises(ValueError, match=r"hypothesis must be one of memory, .*; got 'luck'"):
        found.refutes("luck")


def test_recorded_counters_say_what_the_roofs_say() -> None:
    """Decoding of many requests is bound by memory, a forward by products and exponentials one after the other, one short request by neither."""
    h200 = device("h200")
    steps, training = load_record("h200/decode_counters"), load_record("h200/training_counters")
    binds = {(row["batch"], row["length"]): diagnose(row, h200).binds for row in steps.select(peer="flashlib")}
    assert binds[64, 4096] == binds[16, 8192] == "memory" and binds[1, 4096] == "latency"
    for row in training.select(peer="triton"):
        assert diagnose(row, h200).binds in ("products and exponentials", "tensor cores")
    for row in training.select(peer="naive"):
        assert diagnose(row, h200).refutes("tensor cores") and diagnose(row, h200).waits[0] == "long_scoreboard"
    assert "long_scoreboard" in str(told({"A": training.select(peer="naive")[0]}, h200))
