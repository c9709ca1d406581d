"""attention() with few query rows, which goes by split-KV, forward and backward against the oracle, in Triton's interpreter.

TRITON_INTERPRET=1 python tests/kernels/few_rows.py --seed 0 --problems 4
"""

import random
import sys
from pathlib import Path
from unittest import mock

import torch
from seeds import seeds_asked_for

sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import random_problem

from flashlib import attention
from flashlib.launch import run
from flashlib.launch.run import decode_launches
from flashlib.masks import Causal, Window
from flashlib.reference import check, check_gradients


def band(rng: random.Random, batch: int, q_len: int, kv_len: int) -> dict:
    mask = rng.choice(
        (None, Causal(), Window(rng.randrange(kv_len), 0), Window(rng.randrange(kv_len), rng.randrange(9)))
    )
    return {"mask": mask, "causal": False}


def check_one(seed: int) -> None:
    rng = random.Random(seed)
    heads = [(1, 1), (4, 1), (6, 2)]
    problem = random_problem(
        rng, lengths=(1, 2, 5), kv_lengths=(256, 300), heads=heads, batches=(1, 2), head_dims=(16, 40, 64), rule=band, alibi=(None,),
        layouts=(("heads_first",), ("heads_first", "rows_first"), ("heads_first", "rows_first")), dtypes=(torch.float32, torch.float16, torch.bfloat16),
    )  # fmt: skip
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    with mock.patch.object(run, "decode_launches", side_effect=decode_launches) as split:
        out, lse = attention(q, k, v, **problem.options, return_lse=True, backend="triton")
    assert split.call_count == 1, "the keys were not split"
    given = [torch.randn(x.shape).to(x.dtype) for x in (out, lse)]
    gradients = torch.autograd.grad((out, lse), (q, k, v), given)
    inputs = (problem.q, problem.k, problem.v)
    for verdict in (
        check(out, lse, *inputs, **problem.options),
        check_gradients(gradients, *inputs, *given, **problem.options),
    ):
        assert verdict.passed, f"seed {seed}, {problem!r}: {verdict.message}"


def main() -> None:
    seeds = seeds_asked_for(__doc__)
    for seed in seeds:
        check_one(seed)
    print(f"{len(seeds)} problems within the budget")


if __name__ == "__main__":
    main()
