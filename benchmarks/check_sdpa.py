"""On a GPU: PyTorch's SDPA kernels on random problems against the oracle, and the memory wall measured.

python benchmarks/check_sdpa.py --out results --problems 2000
"""

import argparse
import random
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import random_problem

from flashlib import attention
from flashlib.backends import BACKENDS
from flashlib.config import FlashAttentionConfig
from flashlib.measure import memory_wall
from flashlib.measure.records.record import new_record, save_record
from flashlib.reference import check, check_gradients

BACKENDS_CHECKED = (
    "reference",
    "tiled",
    "torch_sdpa_math",
    "torch_sdpa_efficient",
    "torch_sdpa_flash",
    "torch_sdpa_cudnn",
)
MEASURED = ["backends/torch_sdpa.py", "reference.py"]
CORE = [
    "spec.py",
    "masks.py",
    "reference.py",
    "attention.py",
    "tiled.py",
    "backends/torch_sdpa.py",
    "backends/pytorch.py",
]


def correctness(problems: int, seed: int, seconds: float) -> list[dict]:
    """Random problems through every backend that says it can run them; one row per backend, with the failures."""
    rows = {name: {"backend": name, "run": 0, "refused": 0, "failed": []} for name in BACKENDS_CHECKED}
    started = time.monotonic()
    for number in range(seed, seed + problems):
        if time.monotonic() - started > seconds:
            break
        rng = random.Random(number)
        problem = random_problem(rng, device="cuda")
        if rng.random() < 0.5:
            problem.options.pop("softcap", None)
        for x in (problem.q, problem.k, problem.v):
            x.requires_grad_()
        for name, row in rows.items():
            if BACKENDS[name].why_not(problem.spec, FlashAttentionConfig()):
                row["refused"] += 1
                continue
            row["run"] += 1
            obstacle = one(problem, name, number)
            if obstacle:
                row["failed"].append({"seed": number, "problem": repr(problem), "message": obstacle})
    return list(rows.values())


def one(problem, backend: str, number: int) -> str | None:
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    try:
        out = attention(q, k, v, **problem.options, backend=backend)
        generator = torch.Generator(device="cuda").manual_seed(number)
        grad_out = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    except torch.AcceleratorError:
        print("device error in", backend, problem, flush=True)
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]
    forward = check(out, None, q, k, v, **problem.options)
    backward = check_gradients(gradients, q, k, v, grad_out, **problem.options)
    return None if forward.passed and backward.passed else f"{forward.message} | {backward.message}"


def wall() -> list[dict]:
    """SmolLM2-135M's attention shape, bf16, on longer and longer sequences, until memory ends."""

    def inputs(tokens):
        return tuple(torch.randn(1, heads, tokens, 64, dtype=torch.bfloat16, device="cuda") for heads in (9, 3, 3))

    lengths = [2**n for n in range(10, 20)]
    return memory_wall(inputs, lengths, ["reference", "torch_sdpa_math", "torch_sdpa_flash", "torch_sdpa_cudnn"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    parser.add_argument("--skip-wall", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("ignore")
    notes = "SmolLM2-135M shape: batch 1, 9 query heads, 3 KV heads, head_dim 64, bf16, causal; torch allocator's peak"
    if not options.skip_wall:
        save_record(new_record("memory_wall", wall(), MEASURED, notes), options.out)
    rows = correctness(options.problems, options.seed, options.seconds)
    save_record(new_record("sdpa_correctness", rows, CORE, f"first seed {options.seed}"), options.out)
    for row in rows:
        print(row["backend"], "run", row["run"], "refused", row["refused"], "failed", len(row["failed"]))
        for failure in row["failed"][:6]:
            print("   ", failure["problem"][:300].replace("\n", " "), failure["message"][:300])


if __name__ == "__main__":
    main()
