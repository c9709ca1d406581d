"""Few query rows through :func:`flashlib.attention`, beside :func:`flashlib.inference.decode_attention`, on a GPU.

    python benchmarks/front_door.py --out benchmarks/h200

GB/s of K and V, each counted once, in CUDA graphs, as a program calls them from Python, and PyTorch's SDPA beside them; in turns, shuffled. Query
tokens see all keys up to their own. Enough sets of keys and values that each has left the L2 cache when its turn comes again.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib import attention
from flashlib.inference import decode_attention
from flashlib.measure.racing.timing import capture, time_in_turns
from flashlib.measure.records.record import new_record, save_record
from flashlib.measure.records.sources import decode_sources, kernel_sources, launching_sources

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
CELLS = [(1, 4096), (1, 131072), (16, 8192)]
ROWS = (1, 4, 16)
CACHES = 3  # all sets together are so many times the L2 cache


def rates(batch: int, keys: int, rows: int, seconds: float) -> list[dict]:
    size = 2 * batch * KV_HEADS * keys * DIM * 2
    sets = max(2, math.ceil(CACHES * torch.cuda.get_device_properties(0).L2_cache_size / size))
    q = torch.randn(batch, Q_HEADS, rows, DIM, device="cuda", dtype=torch.bfloat16)
    caches = [torch.randn(2, batch, KV_HEADS, keys, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    ways = {
        "attention": lambda k, v: attention(q, k, v, causal=True),
        "decode_attention": lambda k, v: decode_attention(q, k, v),
    }
    if rows == 1:  # PyTorch aligns its causal mask at the first key
        ways["sdpa"] = lambda k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True)
    graphs, eager = {}, {}
    stream = torch.cuda.Stream()
    for name, call in ways.items():
        calls = [lambda call=call, kv=kv: call(*kv) for kv in caches]
        with torch.cuda.stream(stream):
            for each in calls:
                each()
        torch.cuda.synchronize()
        graphs[name] = capture(calls, stream)
        eager[name] = lambda calls=calls: ([each() for each in calls], torch.cuda.synchronize())
    by_graph = time_in_turns(graphs, device="cuda", budget_s=seconds)
    by_clock = time_in_turns(eager, budget_s=seconds)
    return [
        {
            "batch": batch, "keys": keys, "rows": rows, "way": name,
            "gb_per_s": round(size * sets / by_graph[name].median_ms / 1e6, 1),
            "eager_gb_per_s": round(size * sets / by_clock[name].median_ms / 1e6, 1),
        }
        for name in ways
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seconds", type=float, default=0.4)
    options = parser.parse_args()
    sources = sorted({*launching_sources(), *kernel_sources(), *decode_sources()})
    found = []
    for batch, keys in CELLS:
        for rows in ROWS:
            with torch.no_grad():
                found += rates(batch, keys, rows, options.seconds)
            print(*found[-3:], sep="\n", flush=True)
            torch.cuda.empty_cache()
    notes = " ".join(__doc__.split("\n\n")[2].split())
    save_record(new_record("front_door", found, sources, notes), options.out)


if __name__ == "__main__":
    main()
