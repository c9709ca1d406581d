"""On a GPU: the steps of naive attention timed one by one, and what the machine can do at best.

python benchmarks/attention_steps.py --out benchmarks/h200
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.measure import matmul_flops_per_s, naive_steps, save_record, stream_bytes_per_s
from flashlib.measure.records.record import new_record

TOKENS = (2048, 16384)
SOURCES = ["measure/racing/machine.py", "measure/racing/steps.py", "backends/torch_sdpa.py"]
NOTES = "SmolLM2-135M shape: batch 1, 9 query heads, 3 KV heads, head_dim 64, bf16, causal; fused is torch_sdpa_cudnn"


def steps() -> list[dict]:
    rows = []
    for tokens in TOKENS:
        q, k, v = (torch.randn(1, heads, tokens, 64, dtype=torch.bfloat16, device="cuda") for heads in (9, 3, 3))
        measured, _ = naive_steps(q, k, v, fused="torch_sdpa_cudnn", budget_s=1.0)
        rows += [{"tokens": tokens, **row} for row in measured]
    return rows


def machine() -> dict:
    """Rates of the bare machine. Arrays of 8 MiB stay in the L2 cache, those of 4 GiB do not."""
    return {
        "matmul_flops_per_s": matmul_flops_per_s(8192, dtype=torch.bfloat16, device="cuda", budget_s=2.0),
        "stream_bytes_per_s": {size: stream_bytes_per_s(size, device="cuda") for size in (2**23, 2**32)},
        "memory_bytes": torch.cuda.get_device_properties("cuda").total_memory,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    record = new_record("attention_steps", steps(), SOURCES, NOTES, **machine())
    save_record(record, parser.parse_args().out)
    for row in record.rows:
        print(row)
    print(record.extra)


if __name__ == "__main__":
    main()
