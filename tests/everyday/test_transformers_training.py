"""Models of transformers train on flashlib.attention: in mixed precision, in bf16, by Trainer, checkpointed, with dropout and with sinks."""

import contextlib

import pytest
import torch
from everyday.small_models import DECODERS, VOCABULARY, decoder, exactly, sharp_decoder, tokens
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from flashlib.backends import BACKENDS as BACKENDS_BY_NAME
from flashlib.config import FlashAttentionConfig, use_config
from flashlib.interop.transformers import FlashlibCache, set_attention
from flashlib.interop.transformers_memory import encode_memory, with_memory
from flashlib.reference import naive_attention, one_rounding

STEPS = 20
BACKENDS = ("auto", "tiled", "reference")


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def losses(model, ids, under=contextlib.nullcontext):
    """The loss before each step on one batch, which a model can learn by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(STEPS):
        with under():
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def assert_it_learns(seen):
    assert len(seen) == STEPS and seen[-1] < 0.7 * seen[0], seen


@pytest.mark.parametrize("name", DECODERS)
def test_under_autocast(name, rng):
    """Rotary embeddings leave q and k in fp32 there, and v in bf16."""
    model = decoder(name)
    set_attention(model)
    assert_it_learns(losses(model, tokens(4, 12), under=autocast))
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_on_each_backend(backend, rng):
    model = decoder("llama")
    set_attention(model, backend)
    assert_it_learns(losses(model, tokens(4, 12), under=autocast))


@pytest.mark.parametrize("name", DECODERS)
def test_in_bf16(name, rng):
    model = decoder(name).to(torch.bfloat16)
    set_attention(model, "tiled")
    assert_it_learns(losses(model, tokens(4, 12)))


class OneBatch(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids) * STEPS

    def __getitem__(self, at):
        ids = self.ids[at % len(self.ids)]
        return {"input_ids": ids, "labels": ids}


CHECKPOINTS = {"kept": None, "reentrant": {"use_reentrant": True}, "without reentrant": {"use_reentrant": False}}


@pytest.mark.parametrize("backend, checkpoints", list(zip(BACKENDS, CHECKPOINTS, strict=True)))
def test_by_trainer_in_bf16(backend, checkpoints, rng, tmp_path):
    model = decoder("llama")
    set_attention(model, backend)
    ids = tokens(4, 12)
    options = CHECKPOINTS[checkpoints]
    arguments = TrainingArguments(
        output_dir=tmp_path, bf16=True, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=len(ids),
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True, report_to=[], save_strategy="no",
        gradient_checkpointing=options is not None, gradient_checkpointing_kwargs=options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=OneBatch(ids))
    trainer.train()
    assert_it_learns([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("configured", ["inside", "outside"])
@pytest.mark.parametrize("checkpoints", ["reentrant", "without reentrant"])
def test_checkpoints_run_again_as_they_ran(checkpoints, configured, rng, monkeypatch):
    """Backward is called after the block of use_config; inside and outside of autocast the gradients are those without checkpoints."""
    ran = []

    def spy(q, k, v, spec, config):
        ran.append(q.dtype)
        return usual(q, k, v, spec, config)

    usual = BACKENDS_BY_NAME["reference"].run
    monkeypatch.setattr(BACKENDS_BY_NAME["reference"], "run", spy)
    inside = configured == "inside"
    model, ids, gradients = decoder("llama"), tokens(2, 9), []
    set_attention(model, "auto" if inside else "reference")
    for options in (None, CHECKPOINTS[checkpoints]):
        if options:
            model.gradient_checkpointing_enable(options)
        model.zero_grad()
        with use_config(FlashAttentionConfig(backend="reference")) if inside else contextlib.nullcontext(), autocast():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert ran == [torch.bfloat16] * (2 + 4)  # two layers, and twice the two with checkpoints
    kept, recomputed = gradients
    assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_as_near_to_the_exact_ones_as_those_of_eager(name, dtype, rng):
    """At most twice as far, plus one rounding of the result."""
    model, ids = sharp_decoder(name), tokens(3, 14)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    computed = torch.bfloat16 if dtype == "autocast" else dtype
    if dtype != "autocast":
        model.to(dtype)

    def logits(run):
        with autocast() if dtype == "autocast" and run is model else contextlib.nullcontext():
            return run(**inputs).logits[mask.bool()].double()

    exact = logits(exactly(model))
    model.set_attn_implementation("eager")
    eager = (logits(model) - exact).abs().max()
    for backend in BACKENDS:
        set_attention(model, backend)
        assert (logits(model) - exact).abs().max() <= 2 * eager + one_rounding(exact, computed), backend


def test_sinks_get_their_gradient(rng):
    model, ids, gradients = decoder("gpt_oss").double(), tokens(2, 12), {}
    for backend in ("exact", *BACKENDS):
        model.set_attn_implementation("exact_everyday") if backend == "exact" else set_attention(model, backend)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients[backend] = torch.stack([layer.self_attn.sinks.grad for layer in model.model.layers])
    assert gradients["exact"].abs().min() > 0
    for backend in BACKENDS:
        assert torch.allclose(gradients[backend], gradients["exact"], rtol=1e-9, atol=1e-15), backend


# Dropout of attention weights

SMALL_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_bert_trains_with_its_usual_dropout(rng):
    model = BertForMaskedLM(BertConfig(**SMALL_BERT)).train()
    assert model.config.attention_probs_dropout_prob == 0.1
    set_attention(model)
    assert_it_learns(losses(model, tokens(4, 12), under=autocast))


def test_dropout_is_drawn_from_the_random_state_and_is_off_when_evaluating(rng):
    model, ids = BertForMaskedLM(BertConfig(**SMALL_BERT, hidden_dropout_prob=0.0)), tokens(4, 12)

    def loss(backend, seed):
        set_attention(model, backend)
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    model.train()
    first, again, other = loss("tiled", 1), loss("tiled", 1), loss("tiled", 2)
    assert first == again != other
    assert loss("reference", 1) == pytest.approx(first, rel=1e-5)  # every backend drops the same pairs
    model.eval()
    assert loss("tiled", 1) == loss("tiled", 2)


def test_checkpoints_drop_the_same_again(rng):
    model, ids, gradients = decoder("llama", attention_dropout=0.3).double(), tokens(2, 9), []
    set_attention(model)
    for checkpoints in CHECKPOINTS.values():
        if checkpoints:
            model.gradient_checkpointing_enable(checkpoints)
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


# Functions of your own


def plain(q, k, v, *, mask, scale, softcap):
    return naive_attention(q, k, v, mask=mask, scale=scale, softcap=softcap)


def test_a_function_gets_dropout_and_sinks_only_where_the_model_asks(rng):
    seen = []

    def willing(q, k, v, *, mask, scale, softcap, **more):
        seen.append(set(more))
        return plain(q, k, v, mask=mask, scale=scale, softcap=softcap)

    for model, asked in (
        (decoder("llama"), set()),
        (decoder("llama", attention_dropout=0.1), {"dropout_p"}),
        (decoder("gpt_oss"), {"sinks"}),
        (decoder("gpt_oss", attention_dropout=0.1), {"dropout_p", "sinks"}),
    ):
        set_attention(model, willing)
        model(input_ids=tokens(1, 5))
        assert seen == [asked] * 2
        seen.clear()


def test_a_function_that_takes_neither_says_so_where_the_model_asks(rng):
    ids = tokens(1, 5)
    forgetting = decoder("llama", attention_dropout=0.1)
    set_attention(forgetting, plain)
    with pytest.raises(
        ValueError,
        match=r"asks for dropout of attention weights, but plain takes no argument dropout_p; got dropout = 0.1",
    ):
        forgetting(input_ids=ids)
    forgetting.eval()(input_ids=ids)
    sinking = decoder("gpt_oss")
    set_attention(sinking, plain)
    with pytest.raises(ValueError, match="asks for attention sinks, but plain takes no argument sinks; got s_aux"):
        sinking(input_ids=ids)


def test_a_function_under_autocast_gets_one_dtype(rng):
    model = decoder("llama")
    set_attention(model, plain)
    assert_it_learns(losses(model, tokens(4, 12), under=autocast))


# Caches


def test_our_cache_under_autocast_holds_its_dtype(rng):
    model, ids = decoder("llama").eval(), tokens(2, 9)
    set_attention(model, "tiled")
    cache, pieces = FlashlibCache(capacity=9), []
    with torch.no_grad(), autocast():
        whole = model(input_ids=ids).logits
        for new in (slice(0, 5), slice(5, 6), slice(6, 9)):
            pieces.append(model(input_ids=ids[:, new], past_key_values=cache).logits)
    assert all(store.dtype == torch.bfloat16 and store.keys.shape[2] == 9 for store in cache.stores)
    difference = (torch.cat(pieces, dim=1) - whole).abs().max()
    assert difference <= 16 * one_rounding(whole, torch.bfloat16)  # a lost token changes a large part


def test_a_memory_under_autocast(rng):
    model, text, question = decoder("llama").eval(), tokens(1, 7), tokens(1, 5)
    with torch.no_grad(), autocast():
        memory = encode_memory(model, text)
        with with_memory(model, memory):
            remembered = model(input_ids=question).logits
        whole = model(input_ids=torch.cat([text, question], dim=1)).logits[:, 7:]
    assert all(layer.k.dtype == torch.bfloat16 for layer in memory.layers)
    assert (remembered - whole).abs().max() <= 32 * one_rounding(whole, torch.bfloat16)
