"""What transformers is given for a mask: right for each of its rules, as a tensor that goes wherever its own masks go, and without waiting for a GPU."""

import copy

import pytest
import torch
from everyday.small_models import DECODERS, padded_on_the_left, sharp_decoder, tokens
from transformers import DynamicCache, MistralConfig, StaticCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

import flashlib.interop.transformers as interop
from flashlib import attention
from flashlib.interop.transformers import FlashlibCache, attention_forward, make_mask_tensor, register, set_attention
from flashlib.masks import Causal, Intervals

RULES = {
    "causal": create_causal_mask,
    "window": create_sliding_window_causal_mask,
    "chunks": create_chunked_causal_mask,
    "both ways": create_bidirectional_mask,
    "window both ways": create_bidirectional_sliding_window_mask,
}
CACHES = {
    "no cache": None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=24),
    "flashlib": lambda config: FlashlibCache(24),
}


def config(implementation, width, **more):
    made = MistralConfig(num_hidden_layers=1, sliding_window=width, **more)
    made.attention_chunk_size = width
    made._attn_implementation = implementation
    return made


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_of_transformers(rule, cache, rng):
    """Against the matrices that it makes for itself, with and without padding, over a cache and without."""
    ours = register("tiled")
    for _ in range(12):
        batch, past, new = rng.randint(1, 3), rng.randint(0, 9), rng.randint(1, 9)
        width = rng.randint(2, 12)
        if rule.endswith("both ways") or cache == "no cache":
            past = 0
        # Windows and chunks are told apart by the configuration; here both are called the same at times.
        made = config(ours, width)
        if rng.random() < 0.5:
            made.attention_chunk_size = width if rule == "chunks" else width + 1
            made.sliding_window = width if rule != "chunks" else width + 1
        store = None if CACHES[cache] is None or rule.endswith("both ways") else CACHES[cache](made)
        if store is not None and past:
            keys = torch.zeros(batch, 1, past, 4)
            store.update(keys, keys, 0)
        padding = None
        if rng.random() < 0.6:
            real = torch.tensor([rng.randint(1, past + new) for _ in range(batch)])
            padding = (torch.arange(past + new) >= past + new - real[:, None]).long()
            if rng.random() < 0.3:
                padding.fill_(1)
        arguments = {
            "inputs_embeds": torch.empty(batch, new, 4), "attention_mask": padding, "past_key_values": store,
        }  # fmt: skip
        rows = RULES[rule](config=made, **copy.copy(arguments))
        theirs = copy.copy(made)
        theirs._attn_implementation = "exact_everyday"
        expected = RULES[rule](config=theirs, **arguments)[:, 0]
        assert rows.dtype == torch.int64 and rows.shape[1:] == (1, new, 2) and rows.is_contiguous()
        for mask in (
            interop._given_mask(rows, expected.shape[2]),
            interop._given_mask(rows.clone(), expected.shape[2]),
        ):
            held = mask.intervals(batch, new, expected.shape[2]).dense().expand(batch, -1, -1)
            assert torch.equal(held, expected), (mask, width, past, new, padding)


@pytest.mark.parametrize("name", DECODERS)
def test_without_padding_nothing_is_looked_at(name, rng, monkeypatch):
    """A GPU would have to be waited for. A padded batch is looked at once for each mask that a forward pass needs."""
    model = sharp_decoder(name)
    set_attention(model, "reference")
    looked = []
    usual = interop._can_look
    monkeypatch.setattr(interop, "_can_look", lambda x: looked.append(x) or usual(x))
    for cache in (None, DynamicCache(config=model.config), FlashlibCache(32)):
        for length in (9, 1, 4, 1):
            model(input_ids=tokens(2, length), past_key_values=cache, use_cache=cache is not None)
    assert not looked
    model(**padded_on_the_left([3, 8]))
    assert len(looked) == len(set(getattr(model.config, "layer_types", ["only one"])))


def test_layers_still_see_a_plain_band(rng):
    """Kernels know bands; a list of rows costs them more."""
    seen = []

    def mine(q, k, v, *, mask, scale, softcap):
        seen.append(mask)
        return attention(q, k, v, mask=mask, scale=scale, softcap=softcap)

    for name, bands in (("llama", [(None, 0)] * 2), ("mistral", [(4, 0)] * 2), ("gemma2", [(4, 0), (None, 0)])):
        model = sharp_decoder(name)
        set_attention(model, mine)
        ids = tokens(2, 9)
        for options in ({}, {"attention_mask": torch.ones_like(ids)}):
            model(input_ids=ids, **options)
            assert [mask.band() for mask in seen] == bands
            seen.clear()


def test_a_mask_tensor_by_itself(rng):
    q, k, v = torch.randn(3, 2, 2, 7, 8).unbind()
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[1, :3] = False
    rows = make_mask_tensor(2, 7, 7, attention_mask=padding, allow_is_causal_skip=True)
    assert rows[0, 0].tolist() == [[0, row + 1] for row in range(7)]
    assert rows[1, 0].tolist() == [[0, 0]] * 3 + [[3, row + 1] for row in range(3, 7)]
    layer = torch.nn.Module()
    out, _ = attention_forward(layer, q, k, v, rows)
    moved, _ = attention_forward(layer, q, k, v, rows.clone())  # it no longer remembers its mask
    assert isinstance(interop._given_mask(rows.clone(), 7), Intervals) and torch.equal(out, moved)
    causal = make_mask_tensor(2, 7, 7, allow_is_causal_skip=True)
    assert torch.equal(attention_forward(layer, q, k, v, causal)[0], attention(q, k, v, mask=Causal()).transpose(1, 2))
    with pytest.raises(ValueError, match=r"or \[B, 1, Sq, 2\] of ours; got \[2, 1, 7, 7\] int64"):
        attention_forward(layer, q, k, v, torch.ones(2, 1, 7, 7, dtype=torch.int64))
    with pytest.raises(TypeError, match="attention_mask must be bool or floating; got torch.int32"):
        attention_forward(layer, q, k, v, torch.ones(2, 1, 7, 7, dtype=torch.int32))
