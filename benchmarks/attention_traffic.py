"""On a GPU: the bytes that attention moves, by the hardware's own counters (needs Nsight Compute's `ncu`), and its time.

python benchmarks/attention_traffic.py --out benchmarks/h200

Two borders are counted: between the multiprocessors and the L2 cache, and between the L2 cache and the device memory. Each
kernel starts with cold caches, and the clocks are left alone.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.course.chapters.io_model import standard_attention
from flashlib.measure import save_record, time_call
from flashlib.measure.records.record import new_record

TOKENS = (1024, 2048, 4096, 8192, 16384)
HEADS, HEAD_DIM = 16, 64  # enough heads to keep all multiprocessors busy with whole rows
SECTOR = 32  # bytes that the L2 cache hands out at a time
METRICS = {
    "l2_read": ("lts__t_sectors_srcunit_tex_op_read.sum", SECTOR),
    "l2_written": ("lts__t_sectors_srcunit_tex_op_write.sum", SECTOR),
    "dram_read": ("dram__bytes_read.sum", 1),
    "dram_written": ("dram__bytes_write.sum", 1),
}
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


def run_marked() -> None:
    """What `ncu` watches: each method once for each length, in a range that names both."""
    for tokens in TOKENS:
        q, k, v = inputs(tokens)
        for name, method in METHODS.items():
            method(q, k, v)  # lazy initialization is not what is to be counted
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_push(f"case:{name}:{tokens}")
            method(q, k, v)
            torch.cuda.nvtx.range_pop()


def counted() -> dict[tuple[str, int], dict[str, int]]:
    """Bytes by method and length, over all the kernels of the call."""
    metrics = ",".join(metric for metric, _ in METRICS.values())
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--nvtx"]
    command += ["--clock-control", "none", "--metrics", metrics, sys.executable, __file__, "--marked"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = [line for line in answer.stdout.splitlines() if line.startswith('"')]
    if answer.returncode or not lines:
        raise RuntimeError(f"ncu failed ({answer.returncode}): {answer.stdout[-2000:]} {answer.stderr[-2000:]}")
    totals = defaultdict(lambda: defaultdict(int))
    for kernel in csv.DictReader(io.StringIO("\n".join(lines))):
        if case := re.search(r"case:(\w+):(\d+)", " ".join(filter(None, kernel.values()))):
            total = totals[case[1], int(case[2])]
            total["kernels"] += 1
            for name, (metric, unit) in METRICS.items():
                total[name] += int(float(kernel[metric].replace(",", "")) * unit)
    return totals


def rows() -> list[dict]:
    found = []
    for (name, tokens), total in counted().items():
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
    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    record = new_record("attention_traffic", rows(), SOURCES, NOTES, l2_bytes=l2)
    save_record(record, options.out)
    for row in record.rows:
        print(row)


if __name__ == "__main__":
    main()
