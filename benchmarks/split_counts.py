"""On a GPU: one decoding step in every number of splits, to hold the model behind choose_num_splits against the clock.

python benchmarks/split_counts.py --out benchmarks/h200

Without a GPU it times plain PyTorch on small caches, to see that the script works.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.inference.decode import choose_num_splits, decode_attention
from flashlib.measure.racing.timing import capture, time_in_turns
from flashlib.measure.records.record import new_record, save_record
from flashlib.measure.records.sources import decode_sources
from flashlib.reference import assert_within_budget

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
Q_HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if ON_GPU else (4, 1, 16)
LENGTH = 8192 if ON_GPU else 256
BATCHES = (1, 4, 16) if ON_GPU else (1, 2)
COUNTS = (*range(1, 25), 28, 32, 40, 48, 56, 64) if ON_GPU else (1, 2, 4)
SPLIT_SIZES = (256, 512, 1024, 2048) if ON_GPU else (64, 128)
CACHES_FULL = 4  # input sets of a graph together are so many times the L2 cache
NOTES = (
    f"One query for each request, {Q_HEADS} query heads, {KV_HEADS} KV heads, head_dim {HEAD_DIM}, {LENGTH} keys; CUDA graphs over enough "
    "input sets to miss the L2 cache, all counts of a batch in turns; the median of the rounds, per call. The last request of each result was checked first."
)


def input_sets(batch: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k and v, as often as it takes for none of them to be found in the L2 cache when its turn comes again."""
    kv_bytes = 2 * batch * KV_HEADS * LENGTH * HEAD_DIM * DTYPE.itemsize
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 0
    shapes = ((batch, Q_HEADS, 1, HEAD_DIM), *[(batch, KV_HEADS, LENGTH, HEAD_DIM)] * 2)
    return [
        tuple(torch.randn(shape, dtype=DTYPE, device=DEVICE) for shape in shapes)
        for _ in range(1 + CACHES_FULL * cache // kv_bytes)
    ]


def launcher(sets: list, **how: int):
    """A function that decodes with all of the input sets, one after the other."""
    calls = [functools.partial(decode_attention, *inputs, **how) for inputs in sets]
    if not ON_GPU:
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    return capture(calls, stream)


def rows_of(batch: int, budget_s: float) -> list[dict]:
    """One row for each number and each size of splits."""
    sets = input_sets(batch)
    ways = [{"num_splits": count} for count in COUNTS] + [{"split_size": size} for size in SPLIT_SIZES]
    for how in ways:
        out, lse = decode_attention(*sets[0], **how, return_lse=True)
        assert_within_budget(out[-1:], *(x[-1:] for x in sets[0]), lse=lse[-1:])
    timed = time_in_turns({str(how): launcher(sets, **how) for how in ways}, device=DEVICE, budget_s=budget_s)
    sm_count = torch.cuda.get_device_properties(DEVICE).multi_processor_count if ON_GPU else 1
    chosen = choose_num_splits(batch, KV_HEADS, LENGTH, sm_count=sm_count)
    case = {"batch": batch, "kv_heads": KV_HEADS, "length": LENGTH, "sm_count": sm_count, "chosen": chosen}
    return [
        {
            **case,
            "num_splits": how.get("num_splits"),
            "split_size": how.get("split_size"),
            "ms": timing.median_ms / len(sets),
        }
        for how, timing in zip(ways, timed.values(), strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each number of splits")
    options = parser.parse_args()
    rows = [row for batch in BATCHES for row in rows_of(batch, options.seconds)]
    print(save_record(new_record("split_counts", rows, decode_sources(), NOTES), options.out))
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
