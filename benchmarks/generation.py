"""Tokens per second of transformers' ``generate``, on :func:`flashlib.attention` and on PyTorch's SDPA, on a GPU.

    python benchmarks/generation.py --out benchmarks/h200

Two models with random weights: one shaped as SmolLM2-135M, and eight layers shaped as those of Llama-3-8B. A prompt of 4,096 tokens, 32 tokens generated
greedily. A rate is that of the tokens after the eighth: the time of 40 tokens less that of 8. Implementations take turns in shuffled order, and the
best of their turns counts: what is timed is mostly Python, whose slow turns tell of the machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.interop.transformers import FlashlibCache, set_attention
from flashlib.measure.records.record import new_record, save_record
from flashlib.measure.records.sources import decode_sources, kernel_sources, launching_sources

PROMPT, FEW, MANY = 4096, 8, 40
MODELS = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "Llama-3-8B, 8 layers": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}  # fmt: skip
SOURCES = sorted({*launching_sources(), *kernel_sources(), *decode_sources(), "interop/transformers.py"})


def seconds(model, ids, tokens: int, cache: bool) -> float:
    options = {"past_key_values": FlashlibCache(capacity=PROMPT + MANY)} if cache else {}
    torch.cuda.synchronize()
    started = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, **options
    )  # fmt: skip
    torch.cuda.synchronize()
    return time.perf_counter() - started


def rates(model, batch: int, turns: int) -> dict[str, dict[str, float]]:
    """Tokens per second, and milliseconds until the eighth token."""
    ids = torch.randint(1, model.config.vocab_size, (batch, PROMPT), device="cuda")
    ways = ["sdpa", "flashlib", "flashlib, FlashlibCache"]
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        random.shuffle(ways)
        for way in ways:
            if way == "sdpa":
                model.set_attn_implementation("sdpa")
            else:
                set_attention(model)
            few = seconds(model, ids, FEW, "Cache" in way)
            many = seconds(model, ids, MANY, "Cache" in way)
            if turn:  # the first compiles
                found[way].append((many - few, few))
    return {
        way: {
            "tokens_per_s": round(batch * (MANY - FEW) / min(rest for rest, _ in each), 1),
            "first_ms": round(1e3 * min(few for _, few in each), 1),
        }
        for way, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args()
    rows = []
    for name, shape in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(max_position_embeddings=2 * PROMPT, **shape)
        model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
        for batch in (1, 16):
            for way, figures in rates(model, batch, options.turns).items():
                rows.append({"model": name, "batch": batch, "attention": way, **figures})
                print(rows[-1], flush=True)
            notes = " ".join(__doc__.split("\n\n")[2].split())
            save_record(new_record("generation", rows, SOURCES, notes), options.out)
        del model


if __name__ == "__main__":
    main()
