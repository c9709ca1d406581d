"""Small models of transformers with random weights, one for each thing that attention does in them, and what is asked of all of them."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    logging,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

logging.set_verbosity_error()

VOCABULARY, PAD = 61, 0
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    ),
    # All experts are used: with a choice among them, rounding decides now and then which ones.
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
}


def decoder(name: str, **config) -> PreTrainedModel:
    """A model for training. Its sinks are as large as scores are: a random start makes them so small that nobody would miss them."""
    make, make_config, own = DECODERS[name]
    model = make(make_config(**{**_SIZES, **own, **config}))
    model.set_experts_implementation("eager")  # the usual one takes no float64
    with torch.no_grad():
        for parameter in (p for p_name, p in model.named_parameters() if p_name.endswith("sinks")):
            parameter.normal_()
    return model.train()


def sharp_decoder(name: str, **config) -> PreTrainedModel:
    """A model for generating, with weights so large that attention is far from uniform."""
    model = decoder(name, **config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model


def exact_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """The formula in float64, under transformers' own matrix. Its eager attention is no oracle: softmax is taken in float32 there."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    if s_aux is not None:
        sink = s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).to(query.dtype), None


def _dense_mask(**rule):
    return sdpa_mask(**{**rule, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("exact_everyday", exact_attention)
AttentionMaskInterface.register("exact_everyday", _dense_mask)


def exactly(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes all of it in float64."""
    exact = deepcopy(model).double()
    exact.set_attn_implementation("exact_everyday")
    return exact


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def padded_on_the_left(lengths: list[int]) -> dict[str, Tensor]:
    """A batch of random prompts of these lengths."""
    longest = max(lengths)
    real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(real, tokens(len(lengths), longest), PAD), "attention_mask": real.long()}


def prompts_without_near_ties(
    model: PreTrainedModel, lengths: list[int], count: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch of prompts, and the ``count`` tokens with which the model continues each when it computes in float64.

    At each step the best token is ahead of the second by a thousandth of the largest logit, so that rounding in float32 cannot change places.
    """
    exact = exactly(model)
    for _ in range(50):
        prompts = padded_on_the_left(lengths)
        made = exact.generate(
            **prompts, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        logits = torch.stack(made.logits)
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        if (best - second).min() >= 1e-3 * logits.abs().max():
            return prompts, made.sequences[:, -count:]
    raise AssertionError("no prompts without near ties in 50 draws: the model is not fit for this test")
