"""Models of transformers generate on flashlib.attention what they generate in float64: with every cache, padded, by beams, assisted, batched continuously."""

import pytest
import torch
from everyday.small_models import (
    DECODERS,
    exactly,
    padded_on_the_left,
    prompts_without_near_ties,
    sharp_decoder,
    tokens,
)
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from flashlib.interop.transformers import FlashlibCache, set_attention

NEW = 9
LENGTHS = [7, 3, 11]  # beyond the window of 5 tokens, and within it


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(seed := torch.seed() % 2**32)
    print(f"weights from seed {seed}")
    return {name: sharp_decoder(name) for name in DECODERS}


def generated(model, prompts, **options):
    made = model.generate(**prompts, max_new_tokens=NEW, do_sample=False, **options)
    return made[:, -NEW:]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_with_every_cache(models, name, rng):
    model = models[name]
    prompts, expected = prompts_without_near_ties(model, LENGTHS, NEW)
    alone = {"input_ids": prompts["input_ids"][2:]}  # the longest, without padding
    for backend in ("auto", "tiled"):
        set_attention(model, backend)
        for options in (
            lambda: {},
            lambda: {"cache_implementation": "static"},
            lambda: {"past_key_values": FlashlibCache(capacity=max(LENGTHS) + NEW)},
            lambda: {"use_cache": False},
        ):
            assert torch.equal(generated(model, prompts, **options()), expected), (backend, options())
            assert torch.equal(generated(model, alone, **options()), expected[2:]), (backend, options())


@pytest.mark.parametrize("name", DECODERS)
def test_continuous_batching(models, name, rng):
    model = models[name]
    prompts, expected = prompts_without_near_ties(model, LENGTHS, NEW)
    requests = [ids[mask.bool()].tolist() for ids, mask in zip(*prompts.values(), strict=True)]
    set_attention(model)
    name = model.config._attn_implementation
    # Of 16 tokens a step not all prompts fit into the first, and the longest is read in pieces, between others' new tokens.
    results = model.generate_batch(
        requests,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(page_size=4, num_blocks=32, max_batch_tokens=16),
        progress_bar=False,
    )
    made = [results[f"req_{number}"].generated_tokens for number in range(len(requests))]
    assert made == expected.tolist()
    assert model.config._attn_implementation == name  # given back
    assert torch.equal(generated(model, prompts), expected)


def test_the_name_for_continuous_batching_is_for_nothing_else(models, rng):
    model = models["llama"]
    set_attention(model, "tiled")
    model.config._attn_implementation_internal = "fl_tiled_paged_flash"
    with pytest.raises(ValueError, match=r"'fl_tiled_paged_flash' is for model.generate_batch alone"):
        model(input_ids=tokens(1, 4))
    set_attention(model, "tiled")


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_beams_and_drafts(models, name, rng):
    """In float64: which of two beams is better is a matter of rounding now and then."""
    model = models[name]
    exact, ours = exactly(model), exactly(model)
    set_attention(ours, "tiled")
    prompts = padded_on_the_left(LENGTHS)
    beams = {"num_beams": 3}
    expected = generated(exact, prompts, **beams)
    assert torch.equal(generated(ours, prompts, **beams), expected)
    cache = FlashlibCache(capacity=max(LENGTHS) + NEW)
    assert torch.equal(generated(ours, prompts, **beams, past_key_values=cache), expected)
    assert torch.equal(generated(ours, prompts, **beams, cache_implementation="static"), expected)
    alone = {"input_ids": tokens(1, 6).repeat(1, 3)}  # repeats itself, so that there are drafts
    drafts = {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generated(ours, alone, **drafts), generated(exact, alone))


def test_sampling_under_autocast(models, rng):
    model = models["llama"]
    set_attention(model)
    prompts = padded_on_the_left(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, {"past_key_values": FlashlibCache(capacity=32)}):
            assert generated(model, prompts, **options).shape == (3, NEW)


# Packed batches


@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences_are_as_if_alone(models, name, rng):
    """Said by positions that start again, by flash_attn's cumulative lengths, or by both."""
    model, lengths = models[name], [7, 1, 12]
    set_attention(model, "tiled")
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    alone = torch.cat([model(input_ids=piece, use_cache=False).logits for piece in ids.split(lengths, dim=1)], dim=1)
    # The model of gpt_oss does not tell its masks where positions start again, whatever computes attention.
    for how in (told,) if name == "gpt_oss" else ({}, told):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False, **how).logits
        assert (packed - alone).abs().max() <= 1e-4 * alone.abs().max()
    with pytest.raises(ValueError, match="cu_seq_lens_q says that sequences are packed into one; got a batch of 2"):
        model(input_ids=ids.repeat(2, 1), use_cache=False, **told)


# Compiled and exported


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_whole(rng, fresh_compiler):
    """One graph, for the lengths that it has seen and for others; padded or not. A batch that no mask of ours can say is refused in it too."""
    model = sharp_decoder("llama", num_hidden_layers=1)
    set_attention(model, "tiled")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for lengths in ([6, 9], [4, 13], [5, 21, 2]):
        prompts = padded_on_the_left(lengths)
        expected = model(**prompts, use_cache=False).logits
        logits = compiled(**prompts, use_cache=False).logits
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    holes = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(RuntimeError, match="attention_mask: a row sees several separate runs of keys"):
        compiled(input_ids=tokens(2, 6), attention_mask=holes, use_cache=False)
    assert len(graphs) == 1


def test_exported_for_all_lengths(rng):
    model = sharp_decoder("mistral", num_hidden_layers=1)
    set_attention(model)
    sizes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": tokens(2, 8), "use_cache": False}, dynamic_shapes=sizes, strict=False
        ).module()
        for batch, length in ((2, 8), (3, 17)):
            ids = tokens(batch, length)
            expected = model(input_ids=ids, use_cache=False).logits
            assert (
                program(input_ids=ids, use_cache=False).logits - expected
            ).abs().max() <= 1e-4 * expected.abs().max()


def test_a_static_cache_in_compiled_code(rng, fresh_compiler):
    model = sharp_decoder("llama", num_hidden_layers=1)
    prompts, expected = prompts_without_near_ties(model, LENGTHS, NEW)
    set_attention(model)
    how = CompileConfig(backend="eager", fullgraph=True)
    how._compile_all_devices = True  # generate would compile on GPUs alone
    assert torch.equal(generated(model, prompts, cache_implementation="static", compile_config=how), expected)
