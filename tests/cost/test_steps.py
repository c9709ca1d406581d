"""Steps of whole models: what is read and multiplied follows from their weights and caches."""

import pytest

from flashlib.cost.counts import Problem, formula
from flashlib.cost.devices import device
from flashlib.cost.models import model
from flashlib.cost.parallel import Parallel
from flashlib.cost.roofs import UNCERTAIN_ASSUMED, UNCERTAIN_MEASURED, attention_time
from flashlib.cost.steps import PHASES, Requests, StepCost, chunked, decode, prefill, speculative, step_of

H200 = device("h200")


def test_decoding_reads_weights_and_cache_once() -> None:
    for name in ("llama-3-8b", "qwen3-8b", "mistral-7b", "gemma-2-9b"):
        found = model(name)
        cost = StepCost.of(found, decode(4, 16384), H200)
        embedding = 0 if found.tied else found.weights["embedding"] * 2  # of which a token reads one row
        least = found.weight_bytes() - embedding + 4 * found.cache_bytes(16384)
        assert cost.whole.memory == pytest.approx(least, rel=0.02), name
        assert cost.whole.bound == "memory"


def test_prefill_multiplies_every_weight_and_visible_pair() -> None:
    for name in ("llama-3-8b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"):
        found, length = model(name), 4096
        cost = StepCost.of(found, prefill(2, length), H200)
        parts = found.weights
        inside = found.active_parameters - parts["head"] - parts["norms"] - found.hidden
        assert cost.whole.work.products >= 2 * 2 * length * inside, name
        pairs = sum(
            formula(Problem.causal(2, found.q_heads, found.q_heads, length, length, found.head_dim, v_head_dim=found.v_head_dim, window=layer.window and layer.window - 1)).products
            for layer in found.layers
        )  # fmt: skip
        others = sum(part.work.products for key, part in cost.parts.items() if key != "attention")
        assert others == pytest.approx(2 * 2 * length * inside, rel=0.02), name
        assert pairs <= cost.parts["attention"].work.products <= 1.6 * pairs, name


def test_attention_of_a_step_is_that_of_its_layers() -> None:
    found = model("llama-3-8b")
    cost = StepCost.of(found, prefill(1, 8192), H200)
    one = attention_time(Problem.causal(1, 32, 8, 8192, 8192, 128), H200)
    assert cost.parts["attention"].seconds == pytest.approx(32 * one.seconds)
    assert cost.attention_share == pytest.approx(cost.parts["attention"].seconds / cost.seconds)


def test_windows_bound_what_decoding_reads() -> None:
    """Of Gemma 2's layers every other one has a window: at 32k tokens they read an eighth of what the others read."""
    found = model("gemma-2-9b")
    read = StepCost.of(found, decode(1, 32768), H200).parts["attention"].memory
    assert read == pytest.approx(found.cache_bytes(32768), rel=0.01)
    assert read < 0.6 * found.cache_bytes(32768, rolling=False)


def test_absorption_reads_the_latent_once_and_makes_no_keys() -> None:
    found = model("deepseek-v3")
    latent, expanded = (StepCost.of(found, decode(8, 8192), H200, latent=latent) for latent in (True, False))
    assert latent.parts["attention"].memory == pytest.approx(8 * found.cache_bytes(8192), rel=0.1)
    assert expanded.parts["attention"].memory > 20 * latent.parts["attention"].memory
    assert expanded.seconds > 3 * latent.seconds


def test_experts_are_read_as_tokens_touch_them() -> None:
    found = model("gpt-oss-120b")
    one, many = (StepCost.of(found, decode(batch, 1024), H200).parts["experts"].memory for batch in (1, 512))
    all_experts = found.weights["experts"] * 2
    assert one == pytest.approx(all_experts * 4 / 128, rel=0.01)
    assert many == pytest.approx(all_experts, rel=0.02)


def test_quantised_weights_and_cache_are_fewer_bytes() -> None:
    found = model("llama-3-8b")
    plain, small = (
        StepCost.of(found, decode(16, 8192), H200, weights=weights, cache=cache)
        for weights, cache in (("", ""), ("int4", "fp8"))
    )
    assert small.parts["mlp"].memory == pytest.approx(plain.parts["mlp"].memory / 4, rel=0.02)
    assert small.parts["attention"].memory == pytest.approx(plain.parts["attention"].memory / 2, rel=0.02)
    assert small.tokens_per_s > plain.tokens_per_s


def test_tensor_parallel_devices_share_weights_and_heads() -> None:
    found = model("llama-3-70b")
    one, four = (StepCost.of(found, decode(32, 8192), H200, parallel=Parallel(tensor=n)) for n in (1, 4))
    assert four.whole.memory == pytest.approx(one.whole.memory / 4, rel=0.02)
    assert "communication" in four.parts and "communication" not in one.parts
    assert one.seconds / 4 < four.seconds < one.seconds


def test_context_parallel_devices_share_rows_and_in_decoding_keys() -> None:
    found = model("llama-3-8b")
    one, four = (
        StepCost.of(found, prefill(1, 65536), H200, parallel=Parallel(context=n)).parts["attention"] for n in (1, 4)
    )
    assert four.seconds == pytest.approx(one.seconds / 4, rel=0.1)
    one, four = (
        StepCost.of(found, decode(1, 65536), H200, parallel=Parallel(context=n)).parts["attention"] for n in (1, 4)
    )
    assert four.memory == pytest.approx(one.memory / 4, rel=0.01)
    assert one.seconds / 4 < four.seconds < one.seconds / 3


def test_a_chunk_among_decoding_requests_costs_less_than_both_apart() -> None:
    """The weights are read once for both. That is what chunked prefill is for."""
    found = model("llama-3-8b")
    mixed = StepCost.of(found, chunked(32, 4096, chunk=256), H200)
    apart = StepCost.of(found, decode(31, 4096), H200), StepCost.of(found, chunked(1, 4096, chunk=256), H200)
    assert mixed.tokens == 256 + 31
    assert mixed.seconds < sum(cost.seconds for cost in apart)
    attention = sum(cost.parts["attention"].seconds for cost in apart)
    assert mixed.parts["attention"].seconds == pytest.approx(attention)


def test_checking_guesses_costs_little_more_than_decoding() -> None:
    found = model("llama-3-8b")
    plain, checked = (
        StepCost.of(found, step, H200).seconds for step in (decode(8, 8192), speculative(8, 8192, drafted=4))
    )
    assert plain < checked < 1.3 * plain


def test_energy_lies_between_idle_and_the_power_cap() -> None:
    for phase in PHASES:
        cost = StepCost.of(model("llama-3-8b"), step_of(phase, 4, 4096), H200)
        assert 0.15 * H200.watts * cost.seconds <= cost.joules <= H200.watts * cost.seconds


def test_what_was_not_measured_is_less_certain_and_says_so() -> None:
    found = model("smollm2-135m")
    for name in ("epyc-9654", "a100"):
        cost = StepCost.of(found, decode(1, 1024), device(name))
        assert cost.whole.uncertainty == pytest.approx(UNCERTAIN_ASSUMED)
        assert any("data sheet" in note for note in cost.notes)
    measured = StepCost.of(found, decode(1, 1024), H200)
    assert measured.parts["attention"].uncertainty == pytest.approx(UNCERTAIN_MEASURED)
    assert UNCERTAIN_MEASURED < measured.whole.uncertainty < UNCERTAIN_ASSUMED
    assert not any("data sheet" in note for note in measured.notes)
    # No recorded run has a head_dim of 256, nor a cache in 8 bits.
    wide = StepCost.of(model("gemma-2-9b"), decode(1, 1024), H200, cache="fp8")
    assert wide.parts["attention"].uncertainty == pytest.approx(UNCERTAIN_ASSUMED)
    assert any("counted as if they did" in note for note in wide.notes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: step_of("pretrain", 1, 10), "phase must be one of prefill, decode, chunked, speculative; got 'pretrain'"),
        (lambda: decode(0, 10), "count must be at least 1; got 0"),
        (lambda: prefill(1, -5), "new must be at least 1; got -5"),
        (lambda: chunked(1, 100, chunk=200), "new must be at most the context, 100; got 200"),
        (lambda: Requests(1, 3, 2), "new must be at most the context, 2; got 3"),
        (lambda: StepCost.of(model("llama-3-8b"), decode(1, 10), H200, cache="fp7"), "cache must be one of"),
        (lambda: StepCost.of(model("llama-3-8b"), decode(1, 10), device("a100"), dtype="fp8"), "dtype must be one of"),
        (lambda: StepCost.of(model("llama-3-8b"), decode(1, 10), H200, parallel=Parallel(tensor=3)), "must divide the 32"),
    ],
)  # fmt: skip
def test_impossible_steps_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
