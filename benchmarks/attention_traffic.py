"""On a GPU: the bytes that attention moves, by the hardware's own counters (needs Nsight Compute's `ncu`), and its time.

python benchmarks/attention_traffic.py --out benchmarks/h200

Two borders are counted: between the multiprocessors and the L2 cache, and between the L2 cache and the device memory. Each
kernel starts with cold caches, and the clocks are left alone.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.course.chapters.io_model import standard_attention
from flashlib.measure import save_record, time_call
from flashlib.measure.counting.counters import marked, read
from flashlib.measure.records.record import new_record

TOKENS = (1024, 2048, 4096, 8192, 16384)
HEADS, HEAD_DIM = 16, 64  # enough heads to keep all multiprocessors busy with whole rows
COUNTERS = ("l2_read", "l2_written", "dram_read", "dram_written")
SOURCES = ["course/chapters/io_model.py"]
NOTES = (
    f"{HEADS} heads, head_dim {HEAD_DIM}, bf16, no mask; bytes and time of all heads. standard: three steps, scores and weights written out; "
    "flash: PyTorch's FlashAttention-2 kernel, whose tiles are 128 rows high."
)


def flash(q, k, v):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


METHODS = {"standard": standard_attention, "flash": flash}


def inputs(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3)]


def cases() -> list[tuple[str, int]]:
    return [(name, tokens) for tokens in TOKENS for name in METHODS]


def run_marked() -> None:
    """What `ncu` watches: each method once for each length, under its number."""
    for number, (name, tokens) in enumerate(cases()):
        q, k, v = inputs(tokens)
        METHODS[name](q, k, v)  # lazy initialization is not what is to be counted
        with marked(number):
            METHODS[name](q, k, v)


def rows() -> list[dict]:
    found = []
    watched = read([sys.executable, __file__, "--marked"], COUNTERS, stalls=False)
    for number, (name, tokens) in enumerate(cases()):
        counted = watched[number]
        total = {"kernels": len(counted.kernels), **{counter: int(counted.figures[counter]) for counter in COUNTERS}}
        q, k, v = inputs(tokens)
        ms = time_call(lambda: METHODS[name](q, k, v), device="cuda", budget_s=0.5).median_ms  # noqa: B023
        found.append(
            {"method": name, "tokens": tokens, "heads": HEADS, "head_dim": HEAD_DIM, "itemsize": 2, "ms": ms, **total}
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--marked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.marked:
        run_marked()
        return
    found = rows()
    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    record = new_record("attention_traffic", found, SOURCES, NOTES, l2_bytes=l2)
    save_record(record, options.out)
    for row in record.rows:
        print(row)


if __name__ == "__main__":
    main()
