"""A memory injected into transformers models: exact at the true positions, in any layers, with any cache, and learnable."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, T5Config, T5EncoderModel

from flashlib.config import InjectionConfig
from flashlib.course.chapters.memory_stories import HARBOR, ORCHARD, log_probabilities
from flashlib.course.models import sample_text
from flashlib.inference.injection import KVInjector, Memory
from flashlib.interop.transformers import FlashlibCache, set_attention
from flashlib.interop.transformers_memory import ModelMemory, encode_memory, with_memory

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def model(generator):
    """A tiny Llama in float64, so that only the method can be wrong."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3)  # the usual initialization is so small that attention is nearly uniform
    return model


def tokens(generator, *shape):
    return torch.randint(3, SIZES["vocab_size"], shape, generator=generator)


def same(a, b):
    """Equal but for the cosines and sines of RoPE, which transformers makes in float32, whatever the model's dtype is."""
    return torch.allclose(a, b, rtol=0, atol=1e-4)


def test_equals_reading_the_whole_text(model, generator):
    text, prompt = tokens(generator, 1, 20), tokens(generator, 1, 7)
    whole = model(torch.cat([text, prompt], dim=1)).logits[:, 20:]
    memory = encode_memory(model, text[0].tolist())
    assert (memory.start, memory.length, len(memory.layers)) == (-20, 20, 3)
    with with_memory(model, memory) as injector:
        assert same(model(prompt).logits, whole)
        assert not same(model(prompt, position_ids=torch.arange(20, 27)[None]).logits, whole)
    with with_memory(model, memory.at(0)):
        assert not same(model(prompt).logits, whole)
        assert same(model(prompt, position_ids=torch.arange(20, 27)[None]).logits, whole)
    assert [injector.statistics[layer].keys for layer in range(3)] == [20, 20, 20]
    assert all(0 < injector.statistics[layer].share < 1 for layer in range(3))


def test_a_padded_batch_shares_one_memory(model, generator):
    text, prompts = tokens(generator, 1, 12), tokens(generator, 3, 8)
    real = torch.tensor([8, 5, 1])
    padding = (torch.arange(8) >= 8 - real[:, None]).long()
    memory = encode_memory(model, text)
    with with_memory(model, memory):
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        batch = model(prompts, attention_mask=padding, position_ids=positions).logits
    for logits, prompt, length in zip(batch, prompts, real.tolist(), strict=True):
        whole = model(torch.cat([text, prompt[None, 8 - length :]], dim=1)).logits[0, 12:]
        assert same(logits[8 - length :], whole)


def clear_choices(model, generator, options):
    """A text, a prompt, and the tokens the model writes behind both, none of which would be another after the rounding of `same`."""
    while True:
        text, prompt = tokens(generator, 1, 15), tokens(generator, 1, 6)
        both = torch.cat([text, prompt], dim=1)
        written = model.generate(both, **options, output_logits=True, return_dict_in_generate=True)
        first, second = torch.cat(written.logits).topk(2).values.unbind(-1)
        if (first - second).min() > 1e-3:
            return text, prompt, written.sequences[:, 15:]


@pytest.mark.parametrize("cache", ["transformers", "flashlib"])
def test_generate_keeps_the_memory_out_of_the_cache(model, generator, cache):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    text, prompt, whole = clear_choices(model, generator, options)
    own_cache = {"past_key_values": FlashlibCache(capacity=16)} if cache == "flashlib" else {}
    with with_memory(model, encode_memory(model, text)):
        written = model.generate(prompt, **options, **own_cache)
    assert torch.equal(written, whole)
    if own_cache:
        assert own_cache["past_key_values"].get_seq_length() == 15  # 6 of the prompt and 9 that were written


def test_alpha_0_is_bitwise_no_memory_and_the_model_is_left_as_it_was(model, generator):
    prompt, memory = tokens(generator, 2, 9), encode_memory(model, tokens(generator, 30))
    set_attention(model, "auto")
    without, usual = model(prompt).logits, model.config._attn_implementation
    with with_memory(model, memory, alpha=0.0):
        assert torch.equal(model(prompt).logits, without)
    with with_memory(model, memory, alpha={}):
        assert torch.equal(model(prompt).logits, without)
    with pytest.raises(RuntimeError, match="stop"), with_memory(model, memory):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == usual
    assert torch.equal(model(prompt).logits, without)


@pytest.mark.parametrize("mode", ["blend", "gate"])
def test_alpha_of_each_layer(model, generator, mode):
    prompt, memory = tokens(generator, 1, 9), encode_memory(model, tokens(generator, 30))
    injector = KVInjector(InjectionConfig(mode=mode))
    logits = []
    for alpha in ({0: 0.5}, {2: 0.5}, [0.5, 0.0, 0.5], 0.5):
        with with_memory(model, memory, alpha=alpha, injector=injector):
            logits.append(model(prompt).logits)
    assert all(not same(a, b) for i, a in enumerate(logits) for b in logits[:i])
    assert injector.statistics[1].keys == 30 / 4  # one call in four had it in layer 1


def test_a_memory_is_learned_through_the_model(model, generator):
    prompt, wanted = tokens(generator, 4, 6), tokens(generator, 1)
    layers = tuple(
        Memory(*(torch.randn(1, 2, 4, 8, generator=generator).double().requires_grad_() for _ in range(2)))
        for _ in range(3)
    )
    memory = ModelMemory(layers, start=-4, frequencies=model.model.rotary_emb.inv_freq)
    optimizer = torch.optim.Adam([x for layer in layers for x in (layer.k, layer.v)], lr=0.1)
    losses = []
    with with_memory(model, memory, injector=KVInjector(backend="tiled")):
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(model(prompt).logits[:, -1], wanted.expand(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_two_models_have_their_own_memories(model, generator):
    other = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval().requires_grad_(False)
    prompt, text = tokens(generator, 1, 5), tokens(generator, 1, 10)
    whole = [each(torch.cat([text, prompt], dim=1)).logits[:, 10:] for each in (model, other)]
    with with_memory(model, encode_memory(model, text)), with_memory(other, encode_memory(other, text)):
        assert same(model(prompt).logits, whole[0])
        assert same(other(prompt).logits, whole[1])


def test_bad_input_is_named(model, generator):
    prompt, memory = tokens(generator, 1, 5), encode_memory(model, tokens(generator, 8))
    with pytest.raises(TypeError, match="ids must be integers; got torch.float32"):
        encode_memory(model, torch.ones(3))
    for ids in (torch.ones(2, 3, dtype=torch.int64), torch.ones(0, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids must be one text of at least one token"):
            encode_memory(model, ids)
    with pytest.raises(TypeError, match="start must be an int; got float"):
        memory.at(1.0)
    with pytest.raises(TypeError, match="memory must be a ModelMemory; got tuple"), with_memory(model, memory.layers):
        pass
    with pytest.raises(TypeError, match="injector must be a KVInjector"), with_memory(model, memory, injector=0.5):
        pass
    with pytest.raises(ValueError, match="alpha: layers are 0 to 2; got 3"), with_memory(model, memory, alpha={3: 1}):
        pass
    with pytest.raises(ValueError, match="memory has 2 layers, the model 3"):
        shorter = ModelMemory(memory.layers[:2], memory.start, memory.frequencies)
        with with_memory(model, shorter):
            pass
    with (
        pytest.raises(ValueError, match="already has a memory"),
        with_memory(model, memory),
        with_memory(model, memory),
    ):
        pass
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel"):
        encode_memory(torch.nn.Linear(2, 2), [1])
    with pytest.raises(ValueError, match="laid out as Llama is"):
        encode_memory(T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=1)), [1])
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)).double().eval()
    with with_memory(windowed, memory), pytest.raises(ValueError, match="layer 0 has a sliding window of 5 tokens"):
        windowed(prompt)


@pytest.mark.weights
def test_smollm2_with_a_memory_is_smollm2_that_read_the_text(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer(sample_text(220)).input_ids])
    cut = 170
    with torch.no_grad():
        whole = model(ids).logits[:, cut:]
        memory = encode_memory(model, ids[:, :cut])
        with with_memory(model, memory):
            injected = model(ids[:, cut:]).logits
        with with_memory(model, memory.at(0)):
            overlapping = model(ids[:, cut:]).logits
    assert (injected - whole).abs().max() < 1e-3
    assert (overlapping - whole).abs().max() > 1


@pytest.mark.weights
def test_log_probabilities_of_a_batch_are_those_of_its_questions(smollm2):
    model, tokenizer = smollm2
    together = log_probabilities(model, tokenizer, HARBOR.questions)
    for question, log_probability in zip(HARBOR.questions, together, strict=True):
        text, answer = (tokenizer(part).input_ids for part in (question.prompt + question.answer, question.answer))
        with torch.no_grad():
            scores = model(torch.tensor([text])).logits[0].log_softmax(-1)
        alone = sum(float(scores[-len(answer) - 1 + at, token]) for at, token in enumerate(answer))
        assert text[-len(answer) :] == answer
        assert abs(alone - log_probability) < 1e-2


@pytest.mark.weights
def test_smollm2_answers_from_its_memory(smollm2):
    model, tokenizer = smollm2
    helpful, other = (encode_memory(model, tokenizer(story.text).input_ids) for story in (HARBOR, ORCHARD))
    scores = {}
    for name, memory, alpha in (("control", helpful, 0.0), ("remembered", helpful, 1.0), ("unrelated", other, 1.0)):
        with with_memory(model, memory, alpha=alpha):
            scores[name] = log_probabilities(model, tokenizer, HARBOR.questions)
    for question, *answers in zip(HARBOR.questions, *scores.values(), strict=True):
        control, remembered, unrelated = answers
        assert remembered > control + 2, question
        assert remembered > unrelated + 2, question
