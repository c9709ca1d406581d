"""Our kernels for processors against PyTorch's own, forward, backward and decoding, in turns by the time of one thread.

python benchmarks/cpu_attention.py --out benchmarks/cpu

FLASHLIB_CPU=avx2 takes that variant; its records carry its name. Several minutes; --seconds is the time for each peer in each case.
"""

import argparse
import os
import random
from pathlib import Path

import torch

from flashlib.launch.cpu.library import FORCED
from flashlib.measure.racing.bench import run, summary, told
from flashlib.measure.racing.cases import Case
from flashlib.measure.racing.decoding import DecodeCase, decode_peers
from flashlib.measure.racing.peers import find_peers
from flashlib.measure.racing.plan import Plan

# Batch, query heads, KV heads, length, head_dim, mask.
FORWARD = [
    (1, 8, 8, 128, 64, "causal"),
    (1, 8, 8, 512, 64, "full"),
    (1, 8, 8, 512, 64, "causal"),
    (1, 2, 2, 2048, 64, "full"),
    (1, 2, 2, 2048, 64, "causal"),
    (1, 2, 2, 2048, 128, "full"),
    (1, 2, 2, 2048, 128, "causal"),
    (1, 9, 3, 1024, 64, "causal"),
    (1, 1, 1, 8192, 64, "causal"),
    (1, 2, 2, 4096, 64, "window-512"),
]
BACKWARD = [case for case in FORWARD if case[3] <= 2048]
DECODE = [  # batch, query heads, KV heads, keys, head_dim
    (1, 9, 3, 512, 64),
    (1, 9, 3, 4096, 64),
    (1, 8, 8, 4096, 64),
    (1, 32, 4, 4096, 64),
    (1, 32, 8, 4096, 128),
    (8, 9, 3, 1024, 64),
]
DTYPES = ("fp32", "bf16", "fp16")
PEERS = ["cpu", "torch_sdpa_flash"]


def plans(seconds: float, seed: int) -> list[Plan]:
    asked = os.environ.get(FORCED)
    suffix = f"_{asked}" if asked else ""
    shared = {"device": "cpu", "seconds": seconds, "seed": seed}
    training = [
        Plan(
            f"cpu_{direction}{suffix}",
            [Case(*sizes, direction, dtype) for dtype in DTYPES for sizes in cases],
            find_peers(PEERS),
            **shared,
        )
        for direction, cases in (("forward", FORWARD), ("backward", BACKWARD))
    ]
    steps = [DecodeCase(*sizes, dtype=dtype) for dtype in DTYPES[:2] for sizes in DECODE]
    return [*training, Plan(f"cpu_decode{suffix}", steps, decode_peers(["flashlib", "torch_sdpa_flash"]), **shared)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each peer in each case")
    parser.add_argument("--only", help="a word of the topics to run, for instance backward")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    options = parser.parse_args()
    torch.set_num_threads(1)  # then processor time is the time it takes, whatever else the machine is doing
    for plan in plans(options.seconds, options.seed):
        if options.only is None or options.only in plan.topic:
            print(summary(run(plan, options.out, lambda case, rows: print(case.label, told(rows), flush=True))))


if __name__ == "__main__":
    main()
