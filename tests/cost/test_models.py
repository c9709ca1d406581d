"""Parameters against transformers' own models on the meta device; caches and what fits, against the definition."""

import json

import pytest
import torch

from flashlib.cost.devices import device, device_names
from flashlib.cost.models import DATA, largest_tile, max_batch, max_context, model, model_names, read_config

KNOWN = json.loads(DATA.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", model_names())
def test_parameters_are_those_of_transformers(name: str) -> None:
    """All of them, to the last one, with as many layers as it takes to meet each kind of layer."""
    transformers = pytest.importorskip("transformers")
    config = dict(KNOWN[name])
    config["num_hidden_layers"] = min(config["num_hidden_layers"], 7)
    ours = read_config(config)
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(theirs)
    built.tie_weights()
    assert ours.parameters == sum(weight.numel() for weight in built.parameters())
    types = getattr(theirs, "layer_types", None)
    if types is not None:
        assert [layer.window is not None for layer in ours.layers] == [kind == "sliding_attention" for kind in types]


def test_published_sizes() -> None:
    """As the model cards have them."""
    sizes = {"llama-3-8b": 8.03, "llama-3-70b": 70.6, "gemma-2-9b": 9.24, "qwen3-30b-a3b": 30.5, "gpt-oss-120b": 116.8, "deepseek-v3": 671.0}  # fmt: skip
    for name, billions in sizes.items():
        assert model(name).parameters / 1e9 == pytest.approx(billions, rel=2e-3), name
    assert model("deepseek-v3").active_parameters / 1e9 == pytest.approx(37, rel=0.02)
    qwen = model("qwen3-30b-a3b")  # whose card counts the whole embedding
    assert (qwen.active_parameters + qwen.weights["embedding"]) / 1e9 == pytest.approx(3.3, rel=0.02)


def test_cache_bytes() -> None:
    llama = model("llama-3-8b")
    assert llama.cache_bytes(32768) == 2 * 8 * 128 * 2 * 32 * 32768
    assert llama.cache_bytes(32768, dtype="fp8") == llama.cache_bytes(32768) / 2
    deepseek = model("deepseek-v3")
    assert deepseek.cache_bytes(1) == (512 + 64) * 2 * 61
    assert deepseek.cache_bytes(1, latent=False) / deepseek.cache_bytes(1) == pytest.approx(128 * 320 / 576)
    # Alternating windows: half of the layers keep no more than 4096 tokens.
    gemma = model("gemma-2-9b")
    assert gemma.cache_bytes(8192) == 2 * 8 * 256 * 2 * (21 * 8192 + 21 * 4096)
    assert gemma.cache_bytes(8192, rolling=False) == 2 * 8 * 256 * 2 * 42 * 8192


@pytest.mark.parametrize("name", ["llama-3-8b", "gemma-3-27b", "deepseek-v3", "smollm2-135m"])
def test_what_fits_is_the_most_that_fits(name: str, rng) -> None:
    found, memory = model(name), device("h200").memory_bytes
    devices = 16 if name == "deepseek-v3" else 1
    context, batch = rng.randint(100, 50_000), rng.randint(1, 30)
    free = 0.9 * memory * devices - found.weight_bytes()
    most = max_batch(found, memory, context, devices=devices)
    assert most * found.cache_bytes(context) <= free < (most + 1) * found.cache_bytes(context)
    longest = max_context(found, memory, batch, devices=devices)
    assert batch * found.cache_bytes(longest) <= free < batch * found.cache_bytes(longest + 1)


def test_weights_that_do_not_fit_leave_nothing() -> None:
    assert max_batch(model("llama-3-70b"), device("rtx-4090").memory_bytes, 1000) == 0
    assert max_context(model("llama-3-70b"), device("rtx-4090").memory_bytes) == 0
    assert max_context(model("llama-3-70b"), device("h200").memory_bytes, dtype="int4") > 100_000


def test_a_tile_depends_on_the_head_and_not_on_the_sequence() -> None:
    for name in device_names():
        target = device(name)
        for head_dim in (64, 128, 256):
            rows = largest_tile(head_dim, target)
            assert rows * head_dim * 2 * 5 <= target.local_bytes < 2 * rows * head_dim * 2 * 5
    assert largest_tile(64, device("h200")) >= 2 * largest_tile(256, device("h200"))


def test_experts_touched_by_a_batch() -> None:
    experts = model("deepseek-v3").experts
    assert experts.touched(1) == pytest.approx(8)
    assert experts.touched(8) < 64
    assert 255.9 < experts.touched(512) <= 256


def test_a_model_of_text_and_pictures_is_read_by_its_text() -> None:
    inner = KNOWN["gemma-3-4b"]
    assert read_config({"model_type": "gemma3", "text_config": inner}).parameters == model("gemma-3-4b").parameters


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "mamba2"}, ValueError, "model_type 'mamba2' is not known; known are llama, "),
        ({}, ValueError, "model_type None is not known"),
        ({**KNOWN["llama-3-8b"], "num_hidden_layers": None}, ValueError, "must have the field num_hidden_layers"),
        ({**KNOWN["llama-3-8b"], "hidden_size": -1}, ValueError, "hidden_size must be at least 1; got -1"),
        ({**KNOWN["llama-3-8b"], "num_key_value_heads": 5}, ValueError, "multiple of num_key_value_heads; got 32 and 5"),
        ({**KNOWN["llama-3-8b"], "vocab_size": "many"}, TypeError, "vocab_size must be a whole number; got 'many'"),
        ({**KNOWN["gpt-oss-20b"], "sliding_window": None}, ValueError, "must have the field sliding_window"),
        ([1], TypeError, "config must be a mapping of fields; got list"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_read_say_why(config, error, message) -> None:
    with pytest.raises(error, match=message):
        read_config(config)


def test_unknown_names_are_refused_with_a_hint(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there is no model 'llama-3-9b'; .* did you mean llama-3-8b\?"):
        model("llama-3-9b")
    with pytest.raises(ValueError, match=r"there is no device 'h20'; .* did you mean h200\?"):
        device("h20")
    with pytest.raises(ValueError, match=r"there is no file .*missing\.json"):
        model(tmp_path / "missing.json")
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        model(broken)
    broken.write_text(json.dumps(KNOWN["smollm2-135m"]))
    assert model(broken).parameters == 134_515_008
