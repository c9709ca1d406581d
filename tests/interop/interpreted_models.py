"""Language models of transformers on our Triton kernels, chosen by name, in Triton's interpreter: padded and packed batches.

A program of its own: the interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/interop/interpreted_models.py tiny
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashlib import attention
from flashlib.interop.transformers import set_attention
from flashlib.reference import assert_within_budget

calls = 0


def triton_checked(q, k, v, **options):
    """The triton backend, each call held to the oracle."""
    global calls
    calls += 1
    out = attention(q, k, v, **options, backend="triton")
    assert_within_budget(out, q, k, v, **options)
    return out


def tiny_model():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, intermediate_size=32, num_hidden_layers=1, initializer_range=0.2, **sizes)
    )
    return model.eval()


def smollm2():
    """The first layers of the real model: the interpreter is slow."""
    from flashlib.course.models import load_smollm2

    model, _ = load_smollm2()
    model.model.layers = model.model.layers[:3]
    return model


def padded(model):
    """Three requests of 9, 5 and 1 tokens, padded on the left."""
    ids = torch.randint(3, model.config.vocab_size, (3, 9))
    real = torch.arange(9) >= torch.tensor([[0], [4], [8]])
    return {"input_ids": ids, "attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0)}, real


def packed(model):
    """Documents of 7, 1 and 6 tokens in one row: positions that start again say where."""
    ids = torch.randint(3, model.config.vocab_size, (1, 14))
    positions = torch.cat([torch.arange(n) for n in (7, 1, 6)])[None]
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}, torch.ones_like(ids, dtype=torch.bool)


def check(model, inputs, real):
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(**inputs).logits[real]
        set_attention(model, "triton")
        assert model.config._attn_implementation == "fl_triton"
        logits = model(**inputs).logits
        set_attention(model, triton_checked)
        assert torch.equal(model(**inputs).logits, logits)
    # Each call is within its budget. Through the layers rounding grows, but a wrong mask changes the logits by a large part.
    assert (logits[real] - expected).abs().max() <= 1e-3 * expected.abs().max()


def check_training(model, inputs, real):
    gradients = []
    for backend in ("tiled", "triton"):
        set_attention(model, backend)
        model.zero_grad()
        model(**inputs).logits[real].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    tiled, triton = gradients
    assert (triton - tiled).norm() <= 1e-5 * tiled.norm()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["tiny", "smollm2"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    print(f"seed = {seed}", flush=True)
    model = tiny_model() if options.model == "tiny" else smollm2()
    check(model, *padded(model))
    check(model, *packed(model))
    if options.model == "tiny":
        check_training(model, *packed(model))
    print(f"{calls} calls within the budget")


if __name__ == "__main__":
    main()
