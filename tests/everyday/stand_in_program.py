"""A program that knows flash_attn and transformers, and flashlib only by ``install()``. Run in a process of its own by test_stand_in.py."""

# ruff: noqa: E402 (what is imported when is what is tested)
from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys

import torch

if "--transformers-first" in sys.argv:
    import transformers

import flashlib.interop.flash_attn as stand_in

assert importlib.util.find_spec("flash_attn") is None
stand_in.install()
stand_in.install()  # twice is as once

import flash_attn
import transformers
from flash_attn import flash_attn_func
from flash_attn.bert_padding import pad_input, unpad_input  # noqa: F401
from flash_attn.flash_attn_interface import flash_attn_varlen_func
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils import is_flash_attn_2_available

from flashlib import BackendUnavailableError, FlashAttentionConfig, attention, use_config
from flashlib.backends import available

logging.disable(logging.WARNING)
assert (
    flash_attn.__version__
    == importlib.metadata.version("flash_attn")
    == importlib.metadata.version("flash-attn")
    == "2.8.3"
)
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
assert importlib.util.find_spec("flash_attn").name == "flash_attn" and is_flash_attn_2_available()
assert flash_attn_func is stand_in.flash_attn_func and flash_attn_varlen_func is stand_in.flash_attn_varlen_func

# A backend of that name would be ourselves.
assert "standing in" in available()["flash_attn_2"]
q = torch.randn(1, 2, 5, 16)
try:
    with use_config(FlashAttentionConfig(backend="flash_attn_2")):
        flash_attn_func(*[q.transpose(1, 2)] * 3)
    raise SystemExit("flash_attn_2 ran")
except BackendUnavailableError as error:
    assert "standing in" in str(error), error
compiled = torch.compile(lambda q: attention(q, q, q, causal=True), fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(q), attention(q, q, q, causal=True))

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SIZES |= {"initializer_range": 0.3}  # so that what is generated is not one token again and again


def pair(config_class, model_class, **extra):
    """The same model with our functions, and with transformers' own formula."""
    torch.manual_seed(torch.seed() % 2**31)
    ours = model_class._from_config(
        config_class(**SIZES, **extra), attn_implementation="flash_attention_2", dtype=torch.float32
    )
    own = model_class._from_config(config_class(**SIZES, **extra), attn_implementation="eager", dtype=torch.float32)
    own.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation == "flash_attention_2"
    return ours.eval(), own.eval()


def close(found, expected, what):
    scale = expected.abs().max().clamp(min=1.0)
    assert ((found.double() - expected).abs() <= 2e-4 * scale).all(), (what, (found.double() - expected).abs().max())


MODELS = [(LlamaConfig, LlamaForCausalLM, {}), (MistralConfig, MistralForCausalLM, {"sliding_window": 5})]
for config_class, model_class, extra in MODELS[1:] if "--transformers-first" in sys.argv else MODELS[:1]:
    ours, own = pair(config_class, model_class, **extra)
    ids, mask = torch.randint(2, 64, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        padded = [model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, own)]
        close(*padded, "padded")
        right = torch.flip(mask, (1,))
        close(*(model(ids, attention_mask=right).logits[right.bool()] for model in (ours, own)), "padded on the right")
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
        packed = ours(ids[:1], position_ids=positions).logits
        close(packed, torch.cat([own(ids[:1, :5]).logits, own(ids[:1, 5:]).logits], dim=1), "packed")
    greedy = {"max_new_tokens": 8, "do_sample": False}
    tokens = [model.generate(ids, attention_mask=mask, **greedy) for model in (ours, own)]
    assert torch.equal(*tokens), tokens
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    prompts = [ids[0, 5:].tolist(), ids[1].tolist()]
    batched = ours.generate_batch(prompts, generation_config=settings)
    generated = [batched[name].generated_tokens for name in sorted(batched)]
    alone = [own.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :][:6].tolist() for prompt in prompts]
    assert generated == alone, (generated, alone)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5] = -100  # it would be predicted from padding
    losses = [model.train()(ids, attention_mask=mask, labels=labels).loss for model in (ours, own)]
    close(*losses, "loss")
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), own.parameters(), strict=True):
        close(mine.grad, theirs.grad, name)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < losses[0] / 2, (loss, losses[0])

stand_in.uninstall()
assert importlib.util.find_spec("flash_attn") is None and "flash_attn" not in sys.modules
assert (
    not transformers.utils.is_flash_attn_2_available()
    and not transformers.utils.import_utils.is_flash_attn_2_available()
)
try:
    LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="flash_attention_2")
    raise SystemExit("flash_attention_2 without flash_attn")
except ImportError:
    pass
with stand_in.installed():
    import flash_attn as again

    assert again is not flash_attn and again.flash_attn_func is flash_attn_func
assert importlib.util.find_spec("flash_attn") is None
print("all of it")
