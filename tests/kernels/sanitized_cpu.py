"""The CPU kernels under the address and undefined-behaviour sanitizers, over random problems. A program of its own: the sanitizer's
library must be loaded before everything else.

With "planted" for a number, one call reads behind the end of k: that the sanitizer sees it is what its silence elsewhere means.

LD_PRELOAD=$(cc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 python tests/kernels/sanitized_cpu.py avx2 300
"""

import dataclasses
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from decode_problems import random_decode_problem
from problems import random_problem

from flashlib.launch.cpu.library import VARIANTS, Library
from flashlib.launch.cpu.operators import run_backward, run_decode, run_forward
from flashlib.launch.options import KernelOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1")


def sanitized(name: str) -> Library:
    variant = VARIANTS[name]
    return Library(dataclasses.replace(variant, flags=(*variant.flags, *FLAGS)))


def read_behind_the_end(library: Library) -> None:
    q, k = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 64, 16)
    start, stop = torch.zeros(1, 40, dtype=torch.int32), torch.full((1, 40), 100, dtype=torch.int32)  # of 64 keys
    run_forward(q, k, k, KernelOptions(start, stop, None, None, None, None, 1.0, 0.0), library)


def main(library: Library, problems: int) -> None:
    rng = random.Random(seed := random.SystemRandom().getrandbits(32))
    print(f"seed = {seed}", flush=True)
    done = 0
    while done < problems:
        problem = random_problem(
            rng, dtypes=DTYPES, lengths=(1, 3, 16, 33, 65, 130), head_dims=(1, 8, 59, 64, 128, 256)
        )
        if problem.spec.is_empty:
            continue
        options = KernelOptions.from_spec(problem.spec)
        out, lse = run_forward(problem.q, problem.k, problem.v, options, library)
        run_backward(
            problem.q, problem.k, problem.v, out, lse, torch.ones_like(out), torch.ones_like(lse), options, library
        )
        step = random_decode_problem(rng, dtypes=DTYPES, capacities=(1, 33, 100, 300))
        given = step.options
        left, right = given["window"] or (None, None)
        right = 0 if given["causal"] else right
        caches = (step.q, step.k, step.v, given["lengths"], given.get("block_table"))
        run_decode(*caches, left, right, given["scale"] or 0.2, given["softcap"], given.get("split_size", 50), library)
        done += 1
    print(f"{done} problems without a complaint")


if sys.argv[2] == "planted":
    read_behind_the_end(sanitized(sys.argv[1]))
else:
    main(sanitized(sys.argv[1]), int(sys.argv[2]))
