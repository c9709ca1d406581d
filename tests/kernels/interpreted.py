"""The Triton kernels in Triton's interpreter, on random problems, under KernelWatch: no address is out of bounds, and no
two programs race. A program of its own: the interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/kernels/interpreted.py --seed 0 --problems 20
"""

import random
import sys
from pathlib import Path

import torch
import triton  # noqa: F401  (KernelWatch asks whether it interprets)

sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import random_problem
from seeds import seeds_asked_for

from flashlib import attention
from flashlib.backends.triton import count_tiles
from flashlib.launch import tiles
from flashlib.launch.tiles import TileConfig
from flashlib.masks import Tile
from flashlib.measure.counting.kernel_watch import KernelWatch, faults_raised
from flashlib.reference import check, check_gradients

SMALL = TileConfig(32, 16, 4, 1)  # small tiles meet more edges in few tokens


def run_one(seed: int) -> None:
    rng = random.Random(seed)
    problem = random_problem(
        rng,
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        lengths=(0, 1, 17, 33, 64, 70),
        batches=(1, 1, 2),
        heads=((1, 1), (2, 2), (4, 2), (3, 1)),
    )
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = attention(q, k, v, **problem.options, return_lse=True, backend="triton")
    comparison = check(out, lse, q, k, v, **problem.options)
    assert comparison.passed, f"seed {seed}: {problem}: {comparison.message}"
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    comparison = check_gradients(torch.autograd.grad((out, lse), (q, k, v), grads), q, k, v, *grads, **problem.options)
    assert comparison.passed, f"seed {seed}: {problem}: {comparison.message}"
    if not problem.spec.is_empty:
        check_counts(problem, seed)


def check_counts(problem, seed: int) -> None:
    """The kernel skips, masks and takes whole exactly the tiles that the mask says."""
    counts = count_tiles(problem.q, problem.k, problem.v, problem.spec, SMALL)
    kinds = problem.spec.intervals.tile_map(SMALL.block_m, SMALL.block_n).expand(problem.spec.batch, -1, -1)
    expected = torch.stack([(kinds == kind).sum(-1) for kind in (Tile.SKIP, Tile.PARTIAL, Tile.FULL)], dim=-1)
    assert (counts == expected[:, None]).all(), f"seed {seed}: {problem}: {counts[:, 0]} instead of {expected}"


def main() -> None:
    seeds = seeds_asked_for(__doc__)
    tiles.FP32 = {kernel: dict.fromkeys((64, 128, 256), SMALL) for kernel in tiles.FP32}
    tiles.TABLE[9] = {kernel: dict.fromkeys((64, 128, 256), SMALL) for kernel in tiles.TABLE[9]}
    tiles.EXCEPTIONS.clear()
    with KernelWatch(), faults_raised():
        for seed in seeds:
            run_one(seed)
    print(f"{len(seeds)} problems within the budget")


if __name__ == "__main__":
    main()
