"""Tiny randomly initialised transformers models on flashlib.attention, against their own eager code."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from transformers import (
    AttentionInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetModel,
    logging,
)
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

import flashlib.interop.transformers as interop
from flashlib import BackendUnavailableError, attention
from flashlib.backends import BACKENDS as BACKENDS_BY_NAME
from flashlib.inference.cache import CacheFullError
from flashlib.interop.transformers import FlashlibCache, attention_forward, make_mask, register, set_attention
from flashlib.masks import Mask
from flashlib.reference import error_budget, naive_attention

logging.set_verbosity_error()
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2}

DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **GQA)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**SIZES, **GQA, sliding_window=5)),
    "qwen2_some_layers_window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, **GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "gemma2_softcap_scale_window": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **GQA, sliding_window=5, attn_logit_softcapping=0.5, query_pre_attn_scalar=3)
    ),
}
ENCODERS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "modernbert_window": lambda: ModernBertModel(ModernBertConfig(**SIZES, **SPECIAL, local_attention=6)),
}
BACKENDS = ("auto", "tiled", "reference")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(secret := torch.seed() % 2**32)
    print(f"weights from seed {secret}")
    made = {name: make().eval().requires_grad_(False) for name, make in {**DECODERS, **ENCODERS}.items()}
    for model in made.values():
        for parameter in model.parameters():
            parameter.mul_(3)  # the usual initialization is so small that attention is nearly uniform
    return made


def tokens(generator, batch=3, length=21):
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padding(side, shape, generator):
    """A 2-D attention mask: request 0 has no padding, the last request one token."""
    batch, length = shape
    real = torch.randint(1, length + 1, (batch,), generator=generator)
    real[0], real[-1] = length, 1
    column = torch.arange(length)
    return (column < real[:, None] if side == "right" else column >= length - real[:, None]).long()


def positions(attention_mask):
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def exact_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """The formula in float64, under transformers' own mask matrix; returned in the dtype of ``query``."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    weights = scores.masked_fill(~attention_mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2).to(query.dtype), None


def dense_mask(**rule):
    return sdpa_mask(**{**rule, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", dense_mask)


def register_checked(backend):
    """An implementation that compares each call of each layer with the exact formula, within the error budget."""

    def checked(module, query, key, value, masks, scaling=None, softcap=None, **kwargs):
        ours, theirs = masks
        options = {"scaling": scaling, "softcap": softcap, **kwargs}
        out, weights = attention_forward(
            module, query, key, value, ours, compute=partial(attention, backend=backend), **options
        )
        exact, _ = exact_attention(module, query.double(), key.double(), value.double(), theirs, **options)
        budget = error_budget(query, key, value, mask=ours, scale=scaling, softcap=softcap or 0.0).out
        error = (out - exact).abs().max()
        assert error <= budget, f"layer {module.layer_idx}: error {error:.2e}, budget {budget:.2e}"
        module.calls = getattr(module, "calls", 0) + 1
        return out, weights

    name = f"checked_{backend}"
    AttentionInterface.register(name, checked)
    AttentionMaskInterface.register(name, lambda **rule: (make_mask(**rule), dense_mask(**rule)))
    return name


CHECKED = {backend: register_checked(backend) for backend in BACKENDS}


def run(model, implementation, inputs):
    """The model's first output: logits, or hidden states."""
    if implementation in ("eager", "exact", *CHECKED.values()):
        model.set_attn_implementation(implementation)
    else:
        set_attention(model, implementation)
    with torch.no_grad():
        return model(**inputs)[0]


def assert_same_model(output, expected, wanted=None):
    """A wrong mask, a lost token or a wrong position changes the output by a large part of itself. Rounding, which grows from
    layer to layer, does not; how large it may be is checked call by call, where there is a budget for it."""
    difference = (output - expected).abs() if wanted is None else (output - expected)[wanted.bool()].abs()
    assert difference.max() <= 1e-3 * expected.abs().max()


def assert_model_is_right(model, backend, inputs, wanted=None):
    """``wanted`` says where the output has a meaning: not at padding."""
    parts = [module for module in model.modules() if hasattr(module, "is_causal")]
    for part in parts:
        part.calls = 0
    output = run(model, CHECKED[backend], inputs)
    assert all(part.calls == 1 for part in parts) and len(parts) >= 2
    assert_same_model(run(model, backend, inputs), output)
    assert_same_model(output, run(model, "eager", inputs), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(models, name, side, backend, generator):
    ids = tokens(generator)
    inputs, wanted = {"input_ids": ids}, None
    if side != "none":
        wanted = padding(side, ids.shape, generator)
        inputs.update(attention_mask=wanted, position_ids=positions(wanted))
    assert_model_is_right(models[name], backend, inputs, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_see_both_ways(models, name, side, backend, generator):
    ids = tokens(generator)
    inputs, wanted = {"input_ids": ids}, None
    if side != "none":
        inputs["attention_mask"] = wanted = padding(side, ids.shape, generator)
    assert_model_is_right(models[name], backend, inputs, wanted)
    # The first token's output depends on the last token: nothing was made causal.
    other = ids.clone()
    other[:1, -1] = (other[:1, -1] - 2) % (VOCABULARY - 3) + 3
    if name == "bert":
        first, second = (run(models[name], backend, {"input_ids": x})[0, 0] for x in (ids, other))
        assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: FlashlibCache(64), lambda config: StaticCache(config, 64)],
                         ids=["dynamic", "flashlib", "static"])  # fmt: skip
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_chunks_and_decode(models, name, side, make_cache, generator):
    """Piece by piece through a cache gives what the whole sequence gives at once."""
    model, ids = models[name], tokens(generator)
    mask = padding(side, ids.shape, generator) if side != "none" else torch.ones_like(ids)
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    expected = run(model, "exact", whole)
    model.set_attn_implementation(CHECKED["tiled"])
    cache, done, pieces = make_cache(config=model.config), 0, []
    for count in (7, 4, 1, 1, 1, 6, 1):
        new = slice(done, done + count)
        done += count
        with torch.no_grad():
            piece = model(
                input_ids=ids[:, new],
                attention_mask=mask[:, :done],
                position_ids=positions(mask)[:, new],
                past_key_values=cache,
                use_cache=True,
            )
        pieces.append(piece.logits)
    assert_same_model(torch.cat(pieces, dim=1), expected, mask)


def test_an_encoder_and_a_decoder_that_looks_at_it(generator):
    """Cross-attention: queries and keys of different lengths, none of it causal, and padding on the encoder's side."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = BartModel(BartConfig(vocab_size=VOCABULARY, d_model=48, encoder_ffn_dim=64, decoder_ffn_dim=64, **layers))
    ids = tokens(generator, length=11)
    mask = padding("right", ids.shape, generator)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(generator, length=5)}
    assert_model_is_right(model.eval().requires_grad_(False), "tiled", inputs)


def test_images(generator):
    """A vision model makes no mask at all."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval().requires_grad_(False)
    images = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    eager = run(model, "eager", images)
    assert_same_model(run(model, "tiled", images), eager)


def test_packed_documents(models, generator):
    """Positions that start again mark a new document, which must not see the one before."""
    model, ids = models["llama"], tokens(generator, batch=1, length=20)
    restarting = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = {
        "input_ids": ids,
        "position_ids": restarting,
        "use_cache": False,
    }  # with a cache, transformers does not look
    assert_model_is_right(model, "tiled", packed)
    together = run(model, "tiled", packed)[:, 12:]
    alone = run(model, "tiled", {"input_ids": ids[:, 12:]})
    assert_same_model(together, alone)


def test_a_matrix_that_the_caller_made(models, generator):
    model, ids = models["llama"], tokens(generator, batch=1, length=12)
    visible = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril().triu(-3)
    additive = torch.zeros(1, 1, 12, 12).masked_fill(~visible, torch.finfo(torch.float32).min)
    eager = run(model, "eager", {"input_ids": ids, "attention_mask": additive})
    for matrix in (visible, additive):
        ours = run(model, "tiled", {"input_ids": ids, "attention_mask": matrix})
        assert_same_model(ours, eager)
    with pytest.raises(ValueError, match="attention_mask must hold only 0 and the dtype's minimum"):
        run(model, "tiled", {"input_ids": ids, "attention_mask": additive - 1})
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[B, 1, Sq, Sk\], one for all heads; got \[1, 6, 12, 12\]"
    ):
        run(model, "tiled", {"input_ids": ids, "attention_mask": additive.expand(1, 6, 12, 12)})


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_on_our_cache(models, name, beams, generator):
    """In float64: two tokens that are all but equally likely are told apart by rounding, and by that of float32 once in a while."""
    model, ids = deepcopy(models[name]).double(), tokens(generator, batch=2, length=9)
    mask = padding("left", ids.shape, generator)
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams,
    }  # fmt: skip
    model.set_attn_implementation("exact")
    expected = model.generate(ids, **options)
    set_attention(model, "tiled")
    cache = FlashlibCache(capacity=9 + 12)
    assert torch.equal(model.generate(ids, **options, past_key_values=cache), expected)
    assert len(cache.stores) == 3 and all(store.batch == 2 * beams for store in cache.stores)
    assert all(store.max_length == 9 + 11 for store in cache.stores)  # the last token is written, never read


def test_the_cache_runs_out_loudly(models, generator):
    model, ids = models["llama"], tokens(generator, batch=1, length=9)
    with pytest.raises(CacheFullError, match="request 0 holds 10 tokens and 1 more do not fit into its capacity of 10"):
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, past_key_values=FlashlibCache(capacity=10))


def test_the_cache_as_transformers_sees_it(models, generator):
    model, ids = models["llama"], tokens(generator, batch=2, length=9)
    set_attention(model, "tiled")
    cache = FlashlibCache(capacity=32)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and cache.get_mask_sizes(5, 0) == (5, 0)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        assert cache.get_seq_length() == 9 and cache.get_mask_sizes(5, 0) == (14, 0) and cache.get_max_length() == 32
        assert cache.nbytes == 3 * 2 * 32 * (2 * (8 + 8) * 4) and cache.bytes_per_token == 3 * 2 * (8 + 8) * 4
        # Forgetting three tokens and reading them again gives the same keys.
        keys = cache.layers[2].keys.clone()
        cache.crop(-3)
        assert cache.get_seq_length() == 6 and torch.equal(cache.layers[2].keys, keys[:, :, :6])
        model(input_ids=ids[:, 6:], past_key_values=cache)
        assert_same_model(cache.layers[2].keys, keys)
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].keys.shape[0] == 4 and torch.equal(cache.layers[0].keys[0], cache.layers[0].keys[1])
        cache.batch_select_indices(torch.tensor([3, 0]))
        assert cache.layers[0].store.batch == 2
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.layers[0].keys.shape[2] == 0
    with pytest.raises(ValueError, match="tokens_to_remove must be negative or 0; got 2"):
        cache.crop(2)
    with pytest.raises(NotImplementedError, match="offloading"):
        cache.layers[0].offload()


def test_gradients_flow_when_there_is_no_cache(generator):
    model = DECODERS["llama"]().train()
    ids = tokens(generator, batch=2, length=10)
    gradients = []
    for implementation in ("eager", "tiled"):
        run_with = (
            model.set_attn_implementation if implementation == "eager" else lambda name: set_attention(model, name)
        )
        run_with(implementation)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    eager, tiled = gradients
    assert (tiled - eager).norm() <= 1e-5 * eager.norm()


def test_every_layer_calls_the_backend_and_kv_heads_are_not_repeated(models, generator, monkeypatch):
    calls = []

    def spy(q, k, v, spec, config):
        calls.append((q.shape[1], k.shape[1], v.shape[1]))
        return usual(q, k, v, spec, config)

    usual = BACKENDS_BY_NAME["tiled"].run
    monkeypatch.setattr(BACKENDS_BY_NAME["tiled"], "run", spy)
    run(models["llama"], "tiled", {"input_ids": tokens(generator)})
    assert calls == [(6, 2, 2)] * 3


@pytest.mark.parametrize("name", DECODERS)
def test_a_function_of_your_own(models, name, generator):
    model, inputs = models[name], {"input_ids": tokens(generator)}
    seen = []

    def mine(q, k, v, *, mask, scale, softcap):
        seen.append((mask, scale, softcap))
        return naive_attention(q, k, v, mask=mask, scale=scale, softcap=softcap)

    assert torch.equal(run(model, mine, inputs), run(model, "reference", inputs))
    assert len(seen) == 3 and all(isinstance(mask, Mask) for mask, _, _ in seen)
    if name.startswith("gemma2"):
        assert {(scale, softcap) for _, scale, softcap in seen} == {(3**-0.5, 0.5)}


def test_a_function_that_returns_something_else_is_named(models, generator):
    def transposed(q, k, v, **options):
        return q.transpose(1, 2)

    def forgetful(q, k, v, **options):
        pass

    inputs = {"input_ids": tokens(generator, length=21)}
    message = r"transposed must return \[3, 6, 21, 8\] torch.float32; got \[3, 21, 6, 8\] torch.float32"
    with pytest.raises(ValueError, match=message):
        run(models["llama"], transposed, inputs)
    with pytest.raises(TypeError, match=r"forgetful must return a torch.Tensor; got NoneType"):
        run(models["llama"], forgetful, inputs)


def test_the_named_backend_runs_or_raises(models, generator):
    with pytest.raises(BackendUnavailableError, match="flash_attn_3"):
        run(models["llama"], "flash_attn_3", {"input_ids": tokens(generator)})
    with pytest.raises(BackendUnavailableError, match="SDPA has no softcap"):
        run(models["gemma2_softcap_scale_window"], "torch_sdpa_math", {"input_ids": tokens(generator)})


def test_names():
    assert register("tiled") == "fl_tiled" and register("torch_sdpa_flash") == "fl_torch_sdp_fa"
    assert (
        register("auto", name="mine") == "mine"
        and "mine" in AttentionInterface()
        and "mine" in AttentionMaskInterface()
    )
    for name in ("flashlib", "my_sdpa", "flex_attention", "eager", "a|b", "org/kernel", ""):
        with pytest.raises(ValueError, match="name must"):
            register("auto", name=name)


def test_models_that_need_more_than_attention_are_refused(generator):
    ids = tokens(generator)
    biased = T5EncoderModel(
        T5Config(vocab_size=VOCABULARY, d_model=48, d_kv=8, num_layers=1, num_heads=6, d_ff=64)
    ).eval()
    with pytest.raises(ValueError, match=r"position_bias \(a learned bias on the scores\) is not supported"):
        run(biased, "tiled", {"input_ids": ids})
    own_code = XLNetModel(XLNetConfig(vocab_size=VOCABULARY, d_model=48, n_layer=1, n_head=6, d_inner=64))
    with pytest.raises(ValueError, match="the attention of XLNetModel cannot be replaced"):
        set_attention(own_code)


@pytest.mark.parametrize("argument", ["position_bias", "head_mask", "cache", "block_table", "output_attentions"])
def test_what_would_change_the_result_is_refused_by_name(argument):
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=f"{argument} .* is not supported by flashlib.attention"):
        attention_forward(torch.nn.Module(), q, q, q, None, **{argument: [q]})


def test_a_window_without_a_mask_is_refused():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="sliding_window=4 came without a mask"):
        attention_forward(torch.nn.Module(), q, q, q, None, sliding_window=4)


def test_without_a_mask_the_layer_says_whether_it_is_causal(generator):
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=generator).unbind()
    for module_says, argument, causal in ((True, None, True), (False, None, False), (True, False, False)):
        module = torch.nn.Module()
        module.is_causal = module_says
        out, weights = attention_forward(module, q, k, v, None, is_causal=argument)
        assert weights is None
        assert torch.equal(out, attention(q, k, v, causal=causal).transpose(1, 2))


def test_generating_after_padding_on_the_right_is_refused(models, generator):
    ids = tokens(generator, batch=2, length=6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1]])
    with pytest.raises(
        ValueError,
        match=r"batch entry 1 sees several separate runs of keys, which begin at \[0, 5\].*padding_side = 'left'",
    ):
        run(models["llama"], "tiled", {"input_ids": ids, "attention_mask": mask})


# The mask function by itself

RULES = {
    "causal": lambda width: causal_mask_function,
    "bidirectional": lambda width: bidirectional_mask_function,
    "window": sliding_window_causal_mask_function,
    "both_ways_window": sliding_window_bidirectional_mask_function,
}


@pytest.mark.parametrize("strip_elements", [1, 50, 1 << 22], ids=["one_row", "some_rows", "all_rows"])
@pytest.mark.parametrize("use_vmap", [False, True], ids=["broadcast", "vmap"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_mask_is_the_rule(rule, side, use_vmap, strip_elements, generator, monkeypatch):
    monkeypatch.setattr(interop, "_STRIP_ELEMENTS", strip_elements)
    batch, q_len, past, width = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(4))
    arguments = {
        "batch_size": batch,
        "q_length": q_len,
        "kv_length": past + q_len,
        "q_offset": past,
        "mask_function": RULES[rule](width),
        "use_vmap": use_vmap,
    }
    if side != "none":
        arguments["attention_mask"] = padding(side, (batch, past + q_len), generator).bool()
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
    dense = make_mask(**arguments).intervals(batch, q_len, past + q_len).dense().expand(batch, -1, -1)
    assert torch.equal(dense, expected)


def test_mask_never_asks_for_the_whole_matrix(monkeypatch):
    largest = 0

    def spy(batch_size, q_length, kv_length, **kwargs):
        nonlocal largest
        largest = max(largest, batch_size * q_length * kv_length)
        return sdpa_mask(batch_size, q_length, kv_length, **kwargs)

    monkeypatch.setattr(interop, "sdpa_mask", spy)
    make_mask(2, 8192, 8192, mask_function=causal_mask_function)
    assert largest <= interop._STRIP_ELEMENTS < 2 * 8192 * 8192


def test_plain_rules_become_bands_that_every_backend_knows():
    rule = {"batch_size": 2, "q_length": 6, "kv_length": 10, "q_offset": 4}
    assert make_mask(**rule, mask_function=causal_mask_function).band() == (None, 0)
    assert make_mask(**rule, mask_function=bidirectional_mask_function).band() == (None, None)
    assert make_mask(**rule, mask_function=sliding_window_causal_mask_function(3)).band() == (2, 0)
    ones = torch.ones(2, 10, dtype=torch.bool)
    assert make_mask(**rule, mask_function=causal_mask_function, attention_mask=ones).band() == (None, 0)
    ones[1, 0] = False
    assert make_mask(**rule, mask_function=causal_mask_function, attention_mask=ones).band() is None


def test_a_mask_made_for_other_lengths_is_refused():
    holes = torch.ones(2, 10, dtype=torch.bool)
    holes[1, 0] = False
    mask = make_mask(2, 6, 10, q_offset=4, mask_function=causal_mask_function, attention_mask=holes)
    with pytest.raises(
        ValueError, match="made for 2 sequences of 6 queries and 10 keys; got 2 sequences of 6 queries and 9 keys"
    ):
        mask.intervals(2, 6, 9)
