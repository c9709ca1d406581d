"""The Triton kernels on a GPU: random problems against the oracle, determinism, more elements than 32 bits can count, CUDA graphs
and torch.compile.

python tests/gpu/device_checks.py all --specs 2000 --workers 14 --out results

Each check writes its record as it goes, so a run that is killed keeps what it has done. Without a GPU everything runs small in
Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from feature_sets import FeatureSet
from in_sets import count_failures, now, of_budget, run_in_sets, started_kernels, summary_of
from problems import Problem

from flashlib import attention, masks
from flashlib.measure.records.record import Record, new_record, save_record
from flashlib.measure.records.sources import kernel_sources
from flashlib.reference import check, check_gradients

BACKEND = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED_ON = ["spec.py", "masks.py", "reference.py", "attention.py", *kernel_sources()]


def leaves(problem: Problem) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]


def forward_and_backward(problem: Problem, seed: int) -> tuple[tuple[Tensor, ...], list[Tensor], tuple[Tensor, ...]]:
    """``(out, lse)``, the gradients given for them, and ``(dq, dk, dv)``."""
    q, k, v = leaves(problem)
    results = attention(q, k, v, **problem.options, return_lse=True, backend=BACKEND)
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    given = [torch.randn(x.shape, generator=generator, device=DEVICE).to(x.dtype) for x in results]
    return results, given, torch.autograd.grad(results, (q, k, v), given)


def one_spec(features: FeatureSet, seed: int) -> dict:
    """A problem forward and backward: largest error as a fraction of its budget, by result, and which kernels ran."""
    problem = features.problem(seed, DEVICE)
    started, kernels = time.monotonic(), Counter()
    with started_kernels(kernels):
        (out, lse), given, gradients = forward_and_backward(problem, seed)
    computed = now()
    inputs = (problem.q, problem.k, problem.v)
    forward = check(out, lse, *inputs, **problem.options)
    backward = check_gradients(gradients, *inputs, *given, **problem.options)
    passed = forward.passed and backward.passed
    return {
        "passed": passed,
        "of_budget": of_budget(forward, backward),
        "message": None if passed else f"{problem!r}: {forward.message} | {backward.message}",
        "kernels": dict(kernels),
        "seconds": [computed - started, now() - computed],
    }


def random_specs(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    """``count`` problems of :mod:`feature_sets` in so many processes."""
    options = {"count": count, "seed": seed, "workers": workers, "out": out, "limit_s": limit_s}
    return run_in_sets(FeatureSet.draw, one_spec, _specs_record, cost=FeatureSet.cost, **options)


def _specs_record(rows: list[dict], asked: int, **extra) -> Record:
    summary = summary_of(rows, asked, lambda seed: FeatureSet.draw(seed).told(), ("out", "lse", "dq", "dk", "dv"))
    note = "Random problems (tests/gpu/feature_sets.py), forward, LSE and backward, against float64 within the error budget."
    return new_record("triton_specs", [{"check": "random specs", **summary}], CHECKED_ON, note, **extra)


def determinism(repeats: int, out: Path, seed: int) -> Record:
    """The same problem again and again, forward and backward, bit by bit."""
    rows = []
    # long enough for the kernel for Hopper with either head_dim, but for windows with 64
    length, dtype = (7000, torch.bfloat16) if DEVICE == "cuda" else (40, torch.float32)
    packed = masks.Varlen([0, length // 3, length // 3, length - 1])
    cases = {
        "full": None,
        "causal": masks.Causal(),
        "window": masks.Window(length // 8, 0),
        "packed": packed & masks.Causal(),
    }
    for (name, mask), head_dim in ((case, head_dim) for case in cases.items() for head_dim in (64, 128)):
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        q, k, v = (
            torch.randn(2, heads, length, head_dim, generator=generator, device=DEVICE).to(dtype) for heads in (4, 2, 2)
        )
        problem = Problem(q, k, v, {"mask": mask})
        first = _all_results(problem, seed)
        differ = [n for n in range(1, repeats) if not _same(first, _all_results(problem, seed))]
        rows.append({"mask": name, "head_dim": head_dim, "length": length, "repeats": repeats, "differ": differ})
        note = "Bitwise equality of out, LSE, dq, dk and dv over repeats of one problem; grouped heads."
        record = new_record("triton_determinism", rows, CHECKED_ON, note, seed=seed)
        save_record(record, out)
    return record


def _all_results(problem: Problem, seed: int) -> list[Tensor]:
    results, _, gradients = forward_and_backward(problem, seed)
    return [*results, *gradients]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def beyond_32_bits(out: Path, seed: int, *, tokens: int | None = None) -> Record:
    """q, k, v, out and the gradients with more than 2^31 elements each: is the far end right?

    A window keeps the work small. The gradient of out is 0 but in the last rows, so that those rows, and the keys that they
    see, are a small problem by themselves.
    """
    heads, head_dim, window, tail = 8, 128, 256, 512
    tokens = tokens or 2**31 // (heads * head_dim) + 1024
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    q, k, v = (torch.empty(1, heads, tokens, head_dim, dtype=dtype, device=DEVICE) for _ in range(3))
    for x in (q, k, v):
        x.normal_(generator=generator)
        x.requires_grad_()
    given = torch.zeros(q.shape, dtype=dtype, device=DEVICE)
    given[:, :, -tail:].normal_(generator=generator)
    mask = masks.Window(window, 0)
    results, lse = attention(q, k, v, mask=mask, return_lse=True, backend=BACKEND)
    gradients = torch.autograd.grad(results, (q, k, v), given)

    far = slice(tokens - tail - window, tokens)  # the last rows and all that they see
    small = [x.detach()[:, :, rows] for x, rows in ((q, slice(-tail, None)), (k, far), (v, far))]
    forward = check(results[:, :, -tail:], lse[:, :, -tail:], *small, mask=mask)
    ends = (gradients[0][:, :, -tail:], gradients[1][:, :, far], gradients[2][:, :, far])
    backward = check_gradients(ends, *small, given[:, :, -tail:], mask=mask)
    row = {
        **{"shape": list(q.shape), "elements": q.numel(), "passed": forward.passed and backward.passed},
        **{"error": {**forward.error, **backward.error}, "budget": {**forward.budget, **backward.budget}},
    }
    record = new_record(
        "triton_large", [row], CHECKED_ON, "The last rows of a windowed problem, forward and backward.", seed=seed
    )
    save_record(record, out)
    return record


def graphs(out: Path, seed: int, replays: int = 3) -> Record:
    """Forward and backward captured once in a CUDA graph and replayed on fresh inputs: bitwise what is computed without a graph?

    Without a GPU there is nothing to capture, and the "graph" is the call itself.
    """
    generator, rows = torch.Generator(device=DEVICE).manual_seed(seed), []
    length, dtype = (700, torch.bfloat16) if DEVICE == "cuda" else (40, torch.float32)
    packed = masks.Varlen(torch.tensor([0, length // 3, length - 1], device=DEVICE))
    slopes = torch.rand(4, generator=generator, device=DEVICE)
    cases = {
        "causal": {"causal": True},
        "window, softcap": {"mask": masks.Window(length // 8, 0), "softcap": 5.0},
        "packed causal": {"mask": packed & masks.Causal(packed.offset(length, DEVICE))},
        "ALiBi": {"alibi_slopes": slopes},
        "packed, ALiBi": {"mask": packed, "alibi_slopes": slopes},
    }
    for (name, options), head_dim in ((case, head_dim) for case in cases.items() for head_dim in (64, 128)):
        shapes = [(2, heads, length, head_dim) for heads in (4, 2, 2, 4)]

        def drawn(shapes=shapes) -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes]

        static = drawn()
        results, replay = _captured(lambda static=static, options=options: _both_ways(*static, options))
        differ = []
        for number in range(replays):
            fresh = drawn()
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
            replay()
            if not _same(_both_ways(*fresh, options), results):
                differ.append(number)
        rows.append({"case": name, "head_dim": head_dim, "length": length, "replays": replays, "differ": differ})
        note = "Forward and backward captured in one CUDA graph, replayed on fresh inputs, against the same calls without it, bitwise."
        record = new_record("triton_graphs", rows, CHECKED_ON, note, seed=seed)
        save_record(record, out)
    return record


def _both_ways(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, options: dict) -> list[Tensor]:
    """out, LSE and the gradients; that of the LSE is its own size, from a row of grad_out."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    results = attention(q, k, v, **options, return_lse=True, backend=BACKEND)
    return [*results, *torch.autograd.grad(results, (q, k, v), (grad_out, grad_out[..., 0].float()))]


def _captured(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    """What the call returns, in memory that each replay writes anew; and the replay."""
    if DEVICE == "cpu":
        results = call()

        def replay() -> None:
            for old, new in zip(results, call(), strict=True):
                old.data.copy_(new)

        return results, replay
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return results, graph.replay


def compiled(out: Path, seed: int) -> Record:
    """Under ``torch.compile(fullgraph=True)``: bitwise the same, forward and backward? Around it stand only exact products by 2."""
    generator, rows = torch.Generator(device=DEVICE).manual_seed(seed), []
    length, dtype = (300, torch.bfloat16) if DEVICE == "cuda" else (40, torch.float32)
    for head_dim in (64, 128):
        shapes = [(2, heads, length, head_dim) for heads in (4, 2, 2, 4)]
        q, k, v, grad_out = (torch.randn(s, generator=generator, device=DEVICE).to(dtype) for s in shapes)
        q, k, v = (x.requires_grad_() for x in (q, k, v))

        def function(q, k, v):
            results, lse = attention(q * 0.5, k, v, causal=True, return_lse=True, backend=BACKEND)
            return results * 2, lse

        def both_ways(function, q=q, k=k, v=v, grad_out=grad_out):
            results = function(q, k, v)
            return [*results, *torch.autograd.grad(results, (q, k, v), (grad_out, grad_out[..., 0].float()))]

        whole = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        same = _same(both_ways(function), both_ways(whole))
        rows.append({"head_dim": head_dim, "length": length, "same": same})
    record = new_record("triton_compiled", rows, CHECKED_ON, "torch.compile(fullgraph=True) against eager.", seed=seed)
    save_record(record, out)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["determinism", "large", "graphs", "compiled", "specs", "all"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--specs", type=int, default=int(os.environ.get("FLASHLIB_GPU_SPECS", "200")))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which no random problem is begun"
    )
    options = parser.parse_args()
    tokens = None if DEVICE == "cuda" else 1024
    checks = {
        "determinism": lambda: determinism(options.repeats, options.out, options.seed),
        "large": lambda: beyond_32_bits(options.out, options.seed, tokens=tokens),
        "graphs": lambda: graphs(options.out, options.seed),
        "compiled": lambda: compiled(options.out, options.seed),
        "specs": lambda: random_specs(options.specs, options.seed, options.workers, options.out, options.limit),
    }
    failures = sum(count_failures(name, run) for name, run in checks.items() if options.check in (name, "all"))
    print(f"{failures} failures" if failures else "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
