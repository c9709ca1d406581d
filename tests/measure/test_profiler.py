"""The profiler on a clock that tests turn by hand, so that every figure is known; and on a real model."""

import json
import math
import statistics
import sys
import threading

import pytest
import torch

from flashlib import FlashAttentionConfig, use_config
from flashlib.config import ProfilingConfig
from flashlib.measure.racing import profiler as module
from flashlib.measure.racing.profiler import AttentionProfiler, Clock, RunningStatistics, profile
from flashlib.measure.records.record import load_record


class Turned(Clock):
    """A clock that shows what it is set to, and counts how often it is looked at. ``behind``: marks that are not passed yet."""

    def __init__(self) -> None:
        self.now, self.looks, self.behind, self.waits = 0.0, 0, False, 0
        self.held = self.reached = None  # bytes; None where nobody counts

    def mark(self):
        self.looks += 1
        return self.now

    def ready(self, mark):
        return not self.behind

    def ms(self, start, end):
        self.waits += self.behind
        return end - start

    def allocate(self, more: int) -> None:
        self.held = (self.held or 0) + more
        self.reached = max(self.reached or 0, self.held)

    def forget_peak(self):
        self.reached = self.held

    def peak_bytes(self):
        self.looks += 1
        return self.reached


@pytest.fixture
def clock() -> Turned:
    return Turned()


@pytest.fixture
def profiler(clock) -> AttentionProfiler:
    return AttentionProfiler(ProfilingConfig(trace_events=100), clock=clock)


def test_running_statistics_are_those_of_the_samples(rng) -> None:
    samples = [rng.lognormvariate(0, 2) for _ in range(3000)]
    running = RunningStatistics()
    for sample in samples:
        running.add(sample)
    assert running.count == len(samples)
    assert running.mean == pytest.approx(statistics.fmean(samples))
    assert running.deviation == pytest.approx(statistics.stdev(samples))
    assert (running.least, running.most) == (min(samples), max(samples))
    ordered = sorted(samples)
    for share in (0.0, 0.01, 0.5, 0.9, 0.99, 1.0):
        exact = ordered[max(1, math.ceil(share * len(ordered))) - 1]
        assert running.percentile(share) == pytest.approx(exact, rel=0.006), share


def test_statistics_of_one_sample_of_zeros_and_of_none() -> None:
    running = RunningStatistics()
    assert math.isnan(running.percentile(0.5)) and running.to_dict()["count"] == 0
    running.add(7.0)
    assert running.percentile(0.99) == running.percentile(0.0) == 7.0 and running.deviation == 0.0
    running.add(0.0)
    assert running.percentile(0.5) == 0.0
    with pytest.raises(ValueError, match=r"share must be from 0 to 1; got 2"):
        running.percentile(2)


def test_memory_does_not_grow_with_the_number_of_samples(profiler, clock) -> None:
    """A million samples within a factor of 1000 of each other fill no more buckets than there are in ten doublings."""
    running = RunningStatistics()
    for n in range(100_000):
        running.add(1.0 + n % 1000)
    assert len(running._buckets) <= 10 * module.BUCKETS
    for _ in range(5000):
        with profiler.profile("step"):
            clock.now += 1
    assert len(profiler._pending) <= module.PENDING and len(profiler._events) == 100
    assert len(profiler.regions()) == 1


def test_regions_lie_inside_one_another(profiler, clock) -> None:
    for _ in range(3):
        with profiler.profile("layer", tokens=5):
            clock.now += 2
            with profiler.profile("attention"):
                clock.now += 7
            with profiler.profile("mlp"):
                clock.now += 1
    found = profiler.regions()
    assert set(found) == {"layer", "layer/attention", "layer/mlp"}
    assert found["layer"].ms.total == 30 and found["layer"].own_ms == 6
    assert found["layer/attention"].own_ms == found["layer/attention"].ms.total == 21
    assert found["layer"].tokens == 15 and found["layer"].tokens_per_s == 500


def test_a_decorated_function_is_a_region_and_follows_the_switch(profiler, clock) -> None:
    profiler.enabled = False

    @profiler.profile("work", tokens=2)
    def work(x: int) -> int:
        """Doubles."""
        clock.now += 4
        return 2 * x

    assert work(3) == 6 and work.__doc__ == "Doubles." and not profiler.regions()
    profiler.enabled = True
    assert work(4) == 8
    profiler.enabled = False
    assert work(5) == 10
    assert profiler.regions()["work"].ms.count == 1


def test_an_exception_ends_the_region(profiler, clock) -> None:
    @profiler.profile("fails")
    def fails():
        clock.now += 1
        raise RuntimeError("as it should")

    with pytest.raises(RuntimeError, match="as it should"), profiler.profile("outer"):
        fails()
    with profiler.profile("after"):
        clock.now += 1
    assert set(profiler.regions()) == {"outer", "outer/fails", "after"}


def test_off_it_looks_at_no_clock_and_calls_next_to_nothing(clock) -> None:
    """Counted, not timed: entering and leaving a region takes four calls of Python functions, and nothing else happens."""
    profiler = AttentionProfiler(ProfilingConfig(enabled=False), clock=clock)

    @profiler.profile("decorated")
    def nothing() -> None:
        pass

    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        with profiler.profile("region"):
            pass
        nothing()
    finally:
        sys.setprofile(None)
    assert calls == ["profile", "__init__", "__enter__", "__exit__", "measured", "nothing"]
    assert clock.looks == 0 and not profiler.regions()


def test_on_it_looks_at_the_clock_twice_for_each_region(clock) -> None:
    profiler = AttentionProfiler(ProfilingConfig(memory=False), clock=clock)
    for _ in range(10):
        with profiler.profile("region"):
            pass
    assert clock.looks == 20


def test_nothing_waits_for_the_device_before_a_result_is_asked_for(profiler, clock) -> None:
    """While marks are not passed they are kept; only when too many are is the oldest waited for."""
    clock.behind = True
    for _ in range(module.PENDING):
        with profiler.profile("step"):
            clock.now += 1
    assert clock.waits == 0
    with profiler.profile("step"):
        clock.now += 1
    assert clock.waits == 1
    assert profiler.regions()["step"].ms.count == module.PENDING + 1 and clock.waits == module.PENDING + 1


def test_threads_do_not_mix(profiler) -> None:
    """Each has regions of its own around its own; nothing is lost."""

    def work(name: str) -> None:
        shared = profiler.profile(name)  # entered again and again
        for _ in range(200):
            with shared, profiler.profile("inner"):
                pass

    threads = [threading.Thread(target=work, args=(f"thread {n % 3}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = profiler.regions()
    assert set(found) == {f"thread {n}{inner}" for n in range(3) for inner in ("", "/inner")}
    assert all(region.ms.count == 400 for region in found.values())


def test_peak_memory_of_a_region_holds_that_of_regions_inside(profiler, clock) -> None:
    clock.allocate(900), clock.allocate(-890)
    with profiler.profile("outer"):
        clock.allocate(5)
        with profiler.profile("inner"):
            clock.allocate(40), clock.allocate(-50)
        clock.allocate(20)
    found = profiler.regions()
    assert found["outer/inner"].peak_bytes == 55 and found["outer"].peak_bytes == 55
    # Before the inner one and after it.
    for before, after in ((70, 0), (0, 90)):
        profiler.reset()
        with profiler.profile("outer"):
            clock.allocate(before), clock.allocate(-before)
            with profiler.profile("inner"):
                clock.allocate(1), clock.allocate(-1)
            clock.allocate(after), clock.allocate(-after)
        found = profiler.regions()
        assert found["outer"].peak_bytes == clock.held + before + after
        assert found["outer/inner"].peak_bytes == clock.held + 1


def test_json_and_trace(profiler, clock, tmp_path) -> None:
    with profiler.profile("注意力", tokens=3):
        clock.now += 5
        with profiler.profile("kernel"):
            clock.now += 2
    profiler.export_json(tmp_path / "found.json")
    text = (tmp_path / "found.json").read_text(encoding="utf-8")
    assert "注意力/kernel" in text and "\\u" not in text
    told = json.loads(text)["注意力"]
    assert told["count"] == 1 and told["total_ms"] == 7 and told["own_ms"] == 5 and told["tokens"] == 3
    assert told["p50_ms"] == told["p99_ms"] == 7 and told["peak_bytes"] is None
    profiler.export_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    inner, outer = sorted(events, key=lambda event: event["dur"])
    assert all(event["ph"] == "X" and {"name", "pid", "tid", "ts", "dur"} <= event.keys() for event in events)
    # Microseconds; the kernel lies inside the region around it.
    assert (outer["ts"] - outer["ts"], inner["ts"] - outer["ts"], inner["dur"], outer["dur"]) == (0, 5000, 2000, 7000)
    assert "注意力" in str(profiler.table())
    profiler.reset()
    assert not profiler.regions()


def test_the_configuration_in_force_decides() -> None:
    config = FlashAttentionConfig.from_dict({"profiling": {"enabled": False, "trace_events": 7}})
    assert FlashAttentionConfig.from_dict(config.to_dict()) == config
    with use_config(config):
        assert not AttentionProfiler().enabled and AttentionProfiler().config.trace_events == 7
    assert AttentionProfiler().enabled
    with pytest.raises(ValueError, match=r"trace_events is 0"):
        AttentionProfiler().export_trace("nowhere.json")
    with pytest.raises(ValueError, match=r"trace_events must be at least 0; got -1"):
        ProfilingConfig(trace_events=-1)
    with pytest.raises(TypeError, match=r"config must be a ProfilingConfig; got dict"):
        AttentionProfiler({"enabled": True})


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("implementation", ["flashlib", "sdpa"])
def test_a_model_by_phase_and_layer(model, implementation) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == "flashlib":
        from flashlib.interop.transformers import set_attention

        set_attention(model, "tiled")
    else:
        model.set_attn_implementation("sdpa")
    name = model.config._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS[name]
    tokens = torch.randint(1, 50, (2, 9))  # 0 is padding
    with torch.no_grad():
        expected = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with profile(model) as seen:
            got = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        model(tokens)  # behind the block: not seen
    assert torch.equal(got, expected)
    phases = seen.phases()
    assert (phases["prefill"].steps, phases["prefill"].tokens) == (1, 18)
    assert (phases["decode"].steps, phases["decode"].tokens) == (4, 8)
    for times in phases.values():
        assert len(times.layer_ms) == 3
        assert all(0 < attention < whole for whole, attention in times.layer_ms)
        assert 0 < times.attention_ms < sum(whole for whole, _ in times.layer_ms) < times.total_ms
        assert times.rest_ms == pytest.approx(times.total_ms - times.attention_ms)
    assert "prefill" in str(seen.table()) and "layer 2" in str(seen.table())
    # Nothing of it stays.
    assert ALL_ATTENTION_FUNCTIONS[name] is before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_model_that_fails_is_left_as_it_was(model) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model.set_attn_implementation("sdpa")
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(IndexError), profile(model) as seen:
        model(torch.tensor([[51]]))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert seen.phases()["decode"].steps == 1 and not seen.profiler._stack()


def test_what_cannot_be_profiled_is_refused(model) -> None:
    with (
        pytest.raises(TypeError, match=r"model must be a transformers model; got Linear"),
        profile(torch.nn.Linear(1, 1)),
    ):
        pass
    model.set_attn_implementation("eager")
    with (
        pytest.raises(ValueError, match=r"'eager' is no function that can be wrapped; call set_attention"),
        profile(model),
    ):
        pass


def test_what_it_costs_on_a_gpu_was_recorded() -> None:
    """Off, less than a microsecond; on, less than 3% of a call of a millisecond; and its times are those of the bench harness to 2%."""
    rows = load_record("h200/profiler_cost").rows
    (off,) = (row for row in rows if row["what"] == "region" and not row["enabled"])
    assert off["us"] < 1
    (on,) = (row for row in rows if row["what"] == "call" and not row["waiting"])
    assert 0.9 < on["bare_ms"] < 1.1 and on["share"] < 0.03
    agreeing = [row for row in rows if row["what"] == "agreement"]
    assert len(agreeing) >= 3 and all(abs(row["share"]) < 0.02 for row in agreeing)
