"""flash_attn_varlen_func on a GPU: packed sequences forward and backward, with ALiBi and without, and pages, against the oracle.

python tests/gpu/varlen_checks.py --calls 500 --workers 14 --out results

The record is written as it goes. Without a GPU everything runs small in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from in_sets import now, of_budget, run_in_sets, run_program, started_kernels, summary_of
from varlen_problems import Packed

from flashlib import FlashAttentionConfig, use_config
from flashlib.measure.records.record import Record, new_record
from flashlib.measure.records.sources import decode_sources, kernel_sources

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (*[torch.bfloat16] * 4, *[torch.float16] * 3, torch.float32)
HEAD_DIMS = {"cuda": (*[64] * 3, *[128] * 4, 256, 96, 40), "cpu": (8, 24, 64)}
LENGTHS_Q = {"cuda": (0, 1, 5, 63, 64, 130, 300), "cpu": (0, 1, 7, 18)}
LENGTHS_K = {"cuda": (0, 1, 7, 64, 129, 257, 500, 1000), "cpu": (0, 1, 7, 20)}
PAGE_SIZES = {"cuda": (1, 16, 16, 64, 128, 256), "cpu": (1, 4, 16)}
KINDS = ("packed", "packed, ALiBi", "packed, ALiBi", "pages", "pages, ALiBi", "decoding")
CHECKED_ON = [
    "reference.py", "masks.py", "spec.py", "attention.py", "interop/flash_attn/flash_attn_interface.py", "interop/flash_attn/pages.py",
    *sorted({*kernel_sources(), *decode_sources()}),
]  # fmt: skip


@dataclass(frozen=True)
class CallSet:
    """What the kernels of some calls are compiled for."""

    dtype: torch.dtype
    head_dim: int
    page_size: int

    @classmethod
    def draw(cls, seed: int) -> CallSet:
        rng = random.Random(seed)
        return cls(rng.choice(DTYPES), rng.choice(HEAD_DIMS[DEVICE]), rng.choice(PAGE_SIZES[DEVICE]))

    def told(self) -> dict[str, str]:
        """The features by name, in words that a record can count."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": f"{self.head_dim}",
            "page_size": f"{self.page_size}",
        }

    def problem(self, rng: random.Random, kind: str) -> Packed:
        return Packed.draw(
            rng,
            alibi="ALiBi" in kind,
            alike=kind == "decoding",
            dtypes=(self.dtype,),
            head_dims=(self.head_dim,),
            lengths_q=LENGTHS_Q[DEVICE],
            lengths_k=LENGTHS_K[DEVICE],
            page_sizes=(self.page_size,),
            device=DEVICE,
        )


def one_call(features: CallSet, seed: int) -> dict:
    """One call: the largest errors of its sequences as fractions of their budgets, and which kernels ran."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    problem, given = features.problem(rng, kind), None
    started, kernels = time.monotonic(), Counter()
    with started_kernels(kernels):
        if kind.startswith("packed"):
            with use_config(FlashAttentionConfig(backend="triton")):
                results, given, gradients = problem.run_with_gradients()
        else:
            results = problem.run(in_pages=True)
    computed = now()
    comparisons = problem.compare(*results)
    if given is not None:
        comparisons += problem.compare_gradients(given, gradients)
    wrong = [comparison.message for comparison in comparisons if not comparison.passed]
    worst: dict[str, float] = {}
    for fractions in map(of_budget, comparisons):
        worst |= {name: max(worst.get(name, 0.0), fraction) for name, fraction in fractions.items()}
    return {
        "passed": not wrong,
        "of_budget": worst,
        "message": f"{kind}: {problem!r}: {wrong}" if wrong else None,
        "kernels": dict(kernels),
        "seconds": [computed - started, now() - computed],
        "told": {"kind": kind},
    }


def random_calls(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    """``count`` calls in so many processes."""
    options = {"count": count, "seed": seed, "workers": workers, "out": out, "limit_s": limit_s}
    return run_in_sets(CallSet.draw, one_call, _record, **options)


def _record(rows: list[dict], asked: int, **extra) -> Record:
    summary = summary_of(rows, asked, lambda seed: CallSet.draw(seed).told(), ("out", "lse", "dq", "dk", "dv"))
    note = "Random calls of flash_attn_varlen_func (tests/gpu/varlen_checks.py), each sequence against float64 within the error budget."
    return new_record("varlen_calls", [{"check": "random calls", **summary}], CHECKED_ON, note, **extra)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, "calls", 200, random_calls))
