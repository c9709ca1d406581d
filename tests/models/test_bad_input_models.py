"""Bad input to every public function of this area: the call, the exception, and what its message must say."""

import re

import pytest
import torch

from flashlib.course import models
from flashlib.inference.cache import KVCache
from flashlib.interop.transformers import FlashlibCache, register, set_attention
from flashlib.rotary import apply_rotary, rotary_frequencies, rotary_table

X = torch.zeros(2, 3, 5, 8)
POSITIONS = torch.arange(5)
FREQUENCIES = rotary_frequencies(8)


def cache(**options):
    made = KVCache(2, 3, 10, 8, **options)
    made.append(X, X)
    return made


ROTARY = [
    (lambda: rotary_frequencies(7), ValueError, "rotary_dim must be even and positive, since channels turn in pairs; got 7"),
    (lambda: rotary_frequencies(0), ValueError, "rotary_dim must be even and positive, since channels turn in pairs; got 0"),
    (lambda: rotary_frequencies(8.0), TypeError, "rotary_dim must be an int; got float"),
    (lambda: rotary_frequencies(True), TypeError, "rotary_dim must be an int; got bool"),
    (lambda: rotary_frequencies(8, 1.0), ValueError, "base must be above 1 and finite; got 1.0"),
    (lambda: rotary_frequencies(8, float("inf")), ValueError, "base must be above 1 and finite; got inf"),
    (lambda: rotary_frequencies(8, float("nan")), ValueError, "base must be above 1 and finite; got nan"),
    (lambda: rotary_frequencies(8, "1e4"), TypeError, "base must be a number; got str"),
    (lambda: rotary_table([0, 1], FREQUENCIES), TypeError, "positions must be a torch.Tensor; got list"),
    (lambda: rotary_table(POSITIONS > 2, FREQUENCIES), TypeError, "positions must be integers or floats; got torch.bool"),
    (lambda: rotary_table(POSITIONS, 1e4), TypeError, "frequencies must be a torch.Tensor; got float"),
    (lambda: rotary_table(POSITIONS, POSITIONS), TypeError, "frequencies must be floats; got torch.int64"),
    (lambda: rotary_table(POSITIONS, FREQUENCIES[None]), ValueError, "frequencies must be [R]; got [1, 4]"),
    (lambda: rotary_table(POSITIONS, FREQUENCIES, torch.float16), TypeError, "dtype must be torch.float32 or torch.float64; got torch.float16"),
    (lambda: apply_rotary(None, POSITIONS, FREQUENCIES), TypeError, "x must be a torch.Tensor; got NoneType"),
    (lambda: apply_rotary(X.int(), POSITIONS, FREQUENCIES), TypeError, "x must be float64, float32, float16 or bfloat16; got torch.int32"),
    (lambda: apply_rotary(X[0], POSITIONS, FREQUENCIES), ValueError, "x must be [B, H, S, D]; got [3, 5, 8]"),
    (lambda: apply_rotary(X, 0, FREQUENCIES), TypeError, "positions must be a torch.Tensor; got int"),
    (lambda: apply_rotary(X, torch.arange(4), FREQUENCIES), ValueError, "positions must be [S] or [B, S], here [5] or [2, 5] for x [2, 3, 5, 8]; got [4]"),
    (lambda: apply_rotary(X, POSITIONS[None], FREQUENCIES), ValueError, "positions must be [S] or [B, S], here [5] or [2, 5] for x [2, 3, 5, 8]; got [1, 5]"),
    (lambda: apply_rotary(X, POSITIONS, rotary_frequencies(10)), ValueError, "frequencies must have at most D / 2 entries, here 4 for x [2, 3, 5, 8]; got 5"),
]  # fmt: skip

CACHE = [
    (lambda: KVCache(-1, 3, 10, 8), ValueError, "batch must be at least 0; got -1"),
    (lambda: KVCache(2, 0, 10, 8), ValueError, "kv_heads must be at least 1; got 0"),
    (lambda: KVCache(2, 3, 10.0, 8), TypeError, "capacity must be an int; got float"),
    (lambda: KVCache(2, 3, 10, "8"), TypeError, "head_dim must be an int; got str"),
    (lambda: KVCache(2, 3, 10, 8, v_head_dim=0), ValueError, "v_head_dim must be at least 1; got 0"),
    (lambda: KVCache(2, 3, 10, 8, dtype=torch.int8), TypeError, "dtype must be torch.float64, float32, float16 or bfloat16; got torch.int8"),
    (lambda: cache().append(None, X), TypeError, "k must be a torch.Tensor; got NoneType"),
    (lambda: cache().append(X, X.half()), TypeError, "v must be torch.float32, as the cache is; got torch.float16"),
    (lambda: cache().append(X[:1], X), ValueError, "k must be [2, 3, S, 8]; got [1, 3, 5, 8]"),
    (lambda: cache().append(X[0], X[0]), ValueError, "k must be [2, 3, S, 8]; got [3, 5, 8]"),
    (lambda: cache().append(X, X[..., :7]), ValueError, "v must be [2, 3, S, 8]; got [2, 3, 5, 7]"),
    (lambda: cache().append(X, X[:, :, :4]), ValueError, "k and v must hold equally many tokens; got k [2, 3, 5, 8] and v [2, 3, 4, 8]"),
    (lambda: cache().append(X.to("meta"), X), ValueError, "k must be on cpu, where the cache is; got meta"),
    (lambda: cache().append(X.clone().requires_grad_(), X), ValueError, "k requires a gradient, which a cache cannot carry: append under torch.no_grad()"),
    (lambda: cache().append(X, X, counts=[1]), ValueError, "counts must be [2]; got [1]"),
    (lambda: cache().append(X, X, counts=[1, 6]), ValueError, "counts must lie between 0 and S = 5; got [1, 6]"),
    (lambda: cache().append(X, X, counts=[-1, 5]), ValueError, "counts must lie between 0 and S = 5; got [-1, 5]"),
    (lambda: cache().append(X, X, counts=[1.0, 2.0]), TypeError, "counts must be integers; got torch.float32"),
    (lambda: cache().append(X, X, counts="12"), TypeError, "counts must be integers, one per request; got str"),
    (lambda: cache().mask("1"), TypeError, "q_len must be an int; got str"),
    (lambda: cache().mask(-1), ValueError, "q_len must be at least 0; got -1"),
    (lambda: cache().mask(1, counts=[2, 0]), ValueError, "counts must lie between 0 and q_len = 1; got [2, 0]"),
    (lambda: cache().next_positions(-1), ValueError, "count must be at least 0; got -1"),
    (lambda: cache().truncate(6), ValueError, "lengths must lie between 0 and what each request holds, [5, 5]; got [6, 6]"),
    (lambda: cache().truncate(-1), ValueError, "lengths must lie between 0 and what each request holds, [5, 5]; got [-1, -1]"),
    (lambda: cache().truncate([1, 2, 3]), ValueError, "lengths must be [2]; got [3]"),
    (lambda: cache().truncate(2.0), TypeError, "lengths must be integers; got torch.float32"),
    (lambda: cache().truncate(None), TypeError, "lengths must be integers, one per request; got NoneType"),
    (lambda: cache().select([0, 2]), ValueError, "requests must lie between 0 and 1; got [0, 2]"),
    (lambda: cache().select([[0]]), ValueError, "requests must be [B]; got [1, 1]"),
    (lambda: cache().select([True, False]), TypeError, "requests must be integers; got torch.bool"),
]  # fmt: skip

TRANSFORMERS = [
    (
        lambda: set_attention(torch.nn.Linear(1, 1)),
        TypeError,
        "model must be a transformers PreTrainedModel; got Linear",
    ),
    (lambda: register("sdpa"), ValueError, "backend must be 'auto', one of reference, tiled"),
    (lambda: register(3), TypeError, "backend must be a name or a function; got int"),
    (lambda: register("auto", name="my_flash"), ValueError, "name must not contain flash"),
    (lambda: register("auto", name=3), ValueError, "got 3"),
    (lambda: FlashlibCache(0), ValueError, "capacity must be at least 1; got 0"),
    (lambda: FlashlibCache("12"), TypeError, "capacity must be an int; got str"),
]

# Of these, m and t are the model and the tokenizer.
MODEL = [
    (lambda m, t: models.load_smollm2("float32"), TypeError, "dtype must be a floating-point torch.dtype; got 'float32'"),
    (lambda m, t: models.load_smollm2(torch.int8), TypeError, "dtype must be a floating-point torch.dtype; got torch.int8"),
    (lambda m, t: models.load_smollm2(attention="fast"), ValueError, "backend must be 'auto', one of reference, tiled"),
    (lambda m, t: models.sample_text(0), ValueError, "tokens must be between 1 and 14,311, the whole text; got 0"),
    (lambda m, t: models.sample_text(20_000), ValueError, "tokens must be between 1 and 14,311, the whole text; got 20,000"),
    (lambda m, t: models.sample_text(1.5), TypeError, "tokens must be an int or None; got float"),
    (lambda m, t: models.load_smollm2(attention=None), TypeError, "backend must be a name or a function; got NoneType"),
    (lambda m, t: models.chat_prompt(None, "Hi"), TypeError, "tokenizer must be a transformers tokenizer; got NoneType"),
    (lambda m, t: models.generate_greedy(None, t, "Hi"), TypeError, "model must be a transformers PreTrainedModel; got NoneType"),
    (lambda m, t: models.generate_greedy(m, None, "Hi"), TypeError, "tokenizer must be a transformers tokenizer; got NoneType"),
    (lambda m, t: models.capture_qkv(m, "text", 0, tokenizer="t"), TypeError, "tokenizer must be a transformers tokenizer; got str"),
    (lambda m, t: models.chat_prompt(t, ["Hi"]), TypeError, "question must be a str; got list"),
    (lambda m, t: models.capture_qkv(None, "text", 0), TypeError, "model must be a transformers PreTrainedModel; got NoneType"),
    (lambda m, t: models.capture_qkv(m, "text", 30), ValueError, "layer must be between 0 and 29; got 30"),
    (lambda m, t: models.capture_qkv(m, "text", -1), ValueError, "layer must be between 0 and 29; got -1"),
    (lambda m, t: models.capture_qkv(m, "text", "0"), TypeError, "layer must be an int; got str"),
    (lambda m, t: models.capture_qkv(m, "", 0), ValueError, "text must hold at least one token; got none"),
    (lambda m, t: models.capture_qkv(m, b"text", 0), TypeError, "text must be a str or token ids; got bytes"),
    (lambda m, t: models.capture_qkv(m, [1.5], 0), TypeError, "text must be a str or token ids; got list"),
    (lambda m, t: models.capture_qkv(m, torch.ones(3), 0), TypeError, "text must be integer token ids; got torch.float32"),
    (lambda m, t: models.capture_qkv(m, torch.ones(2, 3).long(), 0), ValueError, "text must be one sequence of token ids, [S] or [1, S]; got [2, 3]"),
    (lambda m, t: models.capture_qkv(m, [1, 49_152], 0), ValueError, "text must hold token ids below 49152; got 1 to 49152"),
    (lambda m, t: models.generate_greedy(m, t, None), TypeError, "prompt must be a str or token ids; got NoneType"),
    (lambda m, t: models.generate_greedy(m, t, "text", -1), ValueError, "max_new_tokens must be at least 0; got -1"),
    (lambda m, t: models.generate_greedy(m, t, "text", 2.0), TypeError, "max_new_tokens must be an int; got float"),
    (lambda m, t: models.generate_greedy(m, t, "text", cache={}), TypeError, "cache must be a FlashlibCache or None; got dict"),
    (lambda m, t: models.generate_greedy(m, t, "text", cache=FlashlibCache(9), use_cache=False), ValueError, "cache must be None when use_cache is False; got one"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "exception", "message"), [*ROTARY, *CACHE, *TRANSFORMERS], ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input(call, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        call()


@pytest.mark.weights
@pytest.mark.parametrize(("call", "exception", "message"), MODEL, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_to_the_model(smollm2, call, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        call(*smollm2)


def test_a_model_without_a_known_tokenizer_needs_one():
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="tokenizer must be given for a model that is not from load_smollm2; got None"):
        models.capture_qkv(tiny, [1, 2], 0)


@pytest.mark.weights
def test_a_model_of_another_make_is_refused(smollm2):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(ValueError, match=r"model must be laid out as Llama is .* got BertModel"):
        models.capture_qkv(bert, [1, 2], 0, tokenizer=smollm2[1])
