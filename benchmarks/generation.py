"""Tokens per second of transformers' ``generate``, on :func:`flashlib.attention` and on PyTorch's SDPA, on a GPU.

    python benchmarks/generation.py --out benchmarks/h200

Two models with random weights: one shaped as SmolLM2-135M, and eight layers shaped as those of Llama-3-8B. A prompt of 4,096 tokens, 40 tokens generated
greedily. Implementations take turns in shuffled order; the rate is that of the median step of all turns after the eighth token, and quick_tokens_per_s
that of the fastest tenth: a step is mostly Python, and how fast that is changes by half as long as other programs run on the machine. first_ms: until the
first token, the median of the turns.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.interop.transformers import FlashlibCache, set_attention
from flashlib.measure.records.record import new_record, save_record
from flashlib.measure.records.sources import decode_sources, kernel_sources, launching_sources

PROMPT, FEW, MANY = 4096, 8, 40  # tokens
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


def steps(model, ids, cache: bool) -> list[float]:
    """Seconds until each token is known on the host."""
    times = [time.perf_counter()]

    def note(input_ids, scores, **_):
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    options = {"past_key_values": FlashlibCache(capacity=PROMPT + MANY)} if cache else {}
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MANY, min_new_tokens=MANY, do_sample=False,
        pad_token_id=0, stopping_criteria=StoppingCriteriaList([note]), **options
    )  # fmt: skip
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def rates(model, batch: int, turns: int) -> dict[str, dict[str, float]]:
    """Tokens per second, and milliseconds until the first."""
    ids = torch.randint(1, model.config.vocab_size, (batch, PROMPT), device="cuda")
    ways = ["sdpa", "flashlib", "flashlib, FlashlibCache"]
    found: dict[str, list[float]] = {way: [] for way in ways}
    first: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        random.shuffle(ways)
        for way in ways:
            if way == "sdpa":
                model.set_attn_implementation("sdpa")
            else:
                set_attention(model)
            times = steps(model, ids, "Cache" in way)
            if turn:  # the first compiles
                found[way] += times[FEW:]
                first[way].append(times[0])
    return {
        way: {
            "tokens_per_s": round(batch / statistics.median(each), 1),
            "quick_tokens_per_s": round(batch / sorted(each)[len(each) // 10], 1),
            "first_ms": round(1e3 * statistics.median(first[way]), 1),
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
