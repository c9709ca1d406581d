"""Dropout in the Triton kernels, in Triton's interpreter, under KernelWatch. A program of its own: the interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/everyday/interpreted_dropout.py --seed 0 --problems 12
"""

import random
import sys
from pathlib import Path

import torch
import triton  # noqa: F401  (KernelWatch asks whether it interprets)

sys.path.insert(0, str(Path(__file__).parents[1]))

from everyday.kept_pairs import kept_pairs
from kernels.seeds import seeds_asked_for
from problems import random_problem

from flashlib import AttentionSpec, attention, masks
from flashlib.launch import tiles
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import forward_launch
from flashlib.launch.tiles import TileConfig
from flashlib.measure.counting.kernel_watch import KernelWatch, faults_raised
from flashlib.reference import check, check_gradients

SMALL = TileConfig(32, 16, 4, 1)  # small tiles meet more edges in few tokens
MASKS = {
    "none": lambda: None,
    "causal": masks.Causal,
    "window": lambda: masks.Window(9, 4),
    "lengths": lambda: masks.KeyLengths([33, 0]),
    "prefix": lambda: masks.Prefix([7, 40]),
    "documents": lambda: masks.Documents([[0] * 20 + [1] * 17] * 2, [[0] * 30 + [1] * 11] * 2),
    "varlen": lambda: masks.Varlen([0, 5, 30, 37], [0, 20, 21, 41]),
}


def run_one(problem, seed: int) -> None:
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out, lse = attention(q, k, v, **problem.options, return_lse=True, backend="triton")
    comparison = check(out, lse, q, k, v, **problem.options)
    assert comparison.passed, f"seed {seed}: {problem}: {comparison.message}"
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    comparison = check_gradients(torch.autograd.grad((out, lse), (q, k, v), grads), q, k, v, *grads, **problem.options)
    assert comparison.passed, f"seed {seed}: {problem}: {comparison.message}"


def check_random_problem(seed: int, rule=None, **fixed) -> None:
    """Forward and all gradients, of grouped heads and lengths that fill no tile, against the oracle that is given the same bits."""
    rng = random.Random(seed)
    problem = random_problem(
        rng,
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        head_dims=(8, 24, 64),
        **{"lengths": (1, 17, 33, 70), "batches": (1, 2), "heads": ((1, 1), (4, 2), (3, 1)), **fixed},
        rule=rule,
    )
    problem.options["dropout_p"] = rng.choice((0.1, 0.5, 0.9))
    problem.options["dropout_seed"] = torch.tensor([rng.getrandbits(64) - 2**63])
    run_one(problem, seed)


def check_the_bits(seed: int) -> None:
    """Every backend drops the same pairs, those that the forward's two loops and both orders of tiles come to."""
    rng = random.Random(seed)
    bits, dropout_p = torch.tensor([rng.getrandbits(64) - 2**63]), rng.choice((0.1, 0.5, 0.9))
    found = [kept_pairs(backend, bits, dropout_p) for backend in ("reference", "tiled", "triton")]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), (seed, dropout_p)


def check_where_the_seed_comes_from() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind()

    def drop(seed=None):
        return attention(q, k, v, dropout_p=0.5, dropout_seed=seed, backend="triton")

    torch.manual_seed(5)
    first, second = drop(), drop()
    torch.manual_seed(5)
    assert torch.equal(first, drop()) and torch.equal(second, drop())
    assert not torch.equal(first, second)
    # What is started again, as by a CUDA graph, reads the seed that is there by then.
    seed = torch.tensor([1])
    spec = AttentionSpec.from_tensors(q, k, v, dropout_p=0.5, dropout_seed=seed)
    launch, out, _ = forward_launch(q, k, v, KernelOptions.from_spec(spec))
    for number in (1, 2**40 + 7):
        seed.fill_(number)
        launch.start()
        assert torch.equal(out, drop(torch.tensor([number]))), number


def main() -> None:
    seeds = seeds_asked_for(__doc__)
    tiles.FP32 = {kernel: dict.fromkeys((64, 128, 256), SMALL) for kernel in tiles.FP32}
    tiles.TABLE[9] = {kernel: dict.fromkeys((64, 128, 256), SMALL) for kernel in tiles.TABLE[9]}
    tiles.EXCEPTIONS.clear()
    with KernelWatch(), faults_raised():
        for seed in seeds:
            check_random_problem(seed)
        for name, mask in MASKS.items():
            fixed = {"lengths": (37,), "kv_lengths": (41,), "batches": (1,) if name == "varlen" else (2,)}
            check_random_problem(seeds.start, rule=lambda *_, mask=mask: {"mask": mask()}, **fixed)
        check_the_bits(seeds.start)
        check_where_the_seed_comes_from()
    print(f"{len(seeds)} problems within the budget")


if __name__ == "__main__":
    main()
