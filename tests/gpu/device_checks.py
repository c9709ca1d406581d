"""The Triton kernels on a GPU against the oracle: random problems, determinism, and more elements than 32 bits can count.

python tests/gpu/device_checks.py all --specs 2000 --workers 12 --out results

Each check writes its record as it goes, so a run that is killed keeps what it has done. Without a GPU everything runs small in
Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from problems import Problem, random_problem

from flashlib import attention, masks
from flashlib.measure.bench import kernel_sources
from flashlib.measure.record import Record, new_record, save_record
from flashlib.reference import check, check_gradients

BACKEND = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
# A kernel is compiled for each width and set of features, so these are few. Lengths and the numbers in masks are free.
HEAD_DIMS = ((64,), (64,), (128,), (128,), (40,), (59, 128), (256,))
LENGTHS = {"cuda": (*range(1, 140), 0, 191, 192, 255, 256, 257, 384, 511, 640), "cpu": (0, 1, 17, 33, 64)}
SAVE_EVERY_S = 5
CHECKED_ON = ["spec.py", "masks.py", "reference.py", "attention.py", *kernel_sources()]


def drawn_problem(seed: int) -> Problem:
    rng = random.Random(seed)
    return random_problem(rng, dtypes=DTYPES, lengths=LENGTHS[DEVICE], head_dims=rng.choice(HEAD_DIMS), device=DEVICE)


def leaves(problem: Problem) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]


def forward_and_backward(problem: Problem, seed: int) -> tuple[tuple[Tensor, ...], list[Tensor], tuple[Tensor, ...]]:
    """``(out, lse)``, the gradients given for them, and ``(dq, dk, dv)``."""
    q, k, v = leaves(problem)
    results = attention(q, k, v, **problem.options, return_lse=True, backend=BACKEND)
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    given = [torch.randn(x.shape, generator=generator, device=DEVICE).to(x.dtype) for x in results]
    return results, given, torch.autograd.grad(results, (q, k, v), given)


def one_spec(seed: int) -> dict:
    """A random problem forward and backward, as a row: largest error as a fraction of its budget, by result."""
    problem = drawn_problem(seed)
    (out, lse), given, gradients = forward_and_backward(problem, seed)
    inputs = (problem.q, problem.k, problem.v)
    forward = check(out, lse, *inputs, **problem.options)
    backward = check_gradients(gradients, *inputs, *given, **problem.options)
    row = {"seed": seed, "passed": forward.passed and backward.passed}
    used = {}
    for comparison in (forward, backward):
        used |= {name: _fraction(error, comparison.budget[name]) for name, error in comparison.error.items()}
    if not row["passed"]:
        row["message"] = f"{problem!r}: {forward.message} | {backward.message}"
    return {**row, "of_budget": used}


def _fraction(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return round(error / budget, 4) if budget else float("inf")


def random_specs(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    """``count`` problems in so many processes, which compile side by side and share Triton's cache on disk.

    The record is written every few seconds. A process that dies (an illegal access takes its process along) leaves the problem
    that it had begun as failed.
    """
    started, context = time.monotonic(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{worker}.jsonl" for worker in range(workers)]
        jobs = [(range(seed + n, seed + count, workers), file, limit_s) for n, file in enumerate(files)]
        processes = [context.Process(target=_work, args=job) for job in jobs]
        for process in processes:
            process.start()
        while True:
            alive = any(process.is_alive() for process in processes)
            rows = [row for file in files if file.exists() for row in _read(file, finished=not alive)]
            record = _specs_record(rows, count, first_seed=seed, seconds=round(time.monotonic() - started, 1))
            save_record(record, out)
            if not alive:
                return record
            multiprocessing.connection.wait(
                [process.sentinel for process in processes if process.is_alive()], SAVE_EVERY_S
            )


def _specs_record(rows: list[dict], asked: int, **extra) -> Record:
    failed = [row for row in rows if not row["passed"]]
    worst = {
        name: max((row["of_budget"].get(name, 0.0) for row in rows if row["passed"]), default=0.0)
        for name in ("out", "lse", "dq", "dk", "dv")
    }
    summary = {"check": "random specs", "asked": asked, "run": len(rows), "failed": failed, "worst_of_budget": worst}
    note = "Random problems (tests/problems.py), forward, LSE and backward, against float64 within the error budget."
    return new_record("triton_specs", [summary], CHECKED_ON, note, **extra)


def _work(seeds: range, file: Path, limit_s: float) -> None:
    started = time.monotonic()
    with file.open("w", encoding="utf-8") as lines:
        for seed in seeds:
            if time.monotonic() - started > limit_s:
                return
            lines.write(json.dumps({"begun": seed}) + "\n")
            lines.flush()
            try:
                row = one_spec(seed)
            except torch.AcceleratorError:
                raise  # this process has lost the device; the problem stands as begun
            except Exception as error:
                row = {
                    "seed": seed,
                    "passed": False,
                    "message": f"{type(error).__name__}: {error}"[:400],
                    "of_budget": {},
                }
            lines.write(json.dumps(row) + "\n")
            lines.flush()


def _read(file: Path, finished: bool) -> Iterator[dict]:
    begun = None
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # it is being written
        row = json.loads(line)
        if "begun" in row:
            begun = row["begun"]
        else:
            begun = None
            yield row
    if finished and begun is not None:
        yield {"seed": begun, "passed": False, "message": "the process died in it", "of_budget": {}}


def determinism(repeats: int, out: Path, seed: int) -> Record:
    """The same problem again and again, forward and backward, bit by bit."""
    rows = []
    length, dtype = (1500, torch.bfloat16) if DEVICE == "cuda" else (40, torch.float32)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["specs", "determinism", "large", "all"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--specs", type=int, default=int(os.environ.get("FLASHLIB_GPU_SPECS", "200")))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which no random problem is begun"
    )
    options = parser.parse_args()
    failures = 0
    if options.check in ("determinism", "all"):
        for row in determinism(options.repeats, options.out, options.seed).rows:
            print(row, flush=True)
            failures += len(row["differ"])
    if options.check in ("large", "all"):
        (row,) = beyond_32_bits(options.out, options.seed, tokens=None if DEVICE == "cuda" else 1024).rows
        print(row, flush=True)
        failures += not row["passed"]
    if options.check in ("specs", "all"):
        record = random_specs(options.specs, options.seed, options.workers, options.out, options.limit)
        (row,) = record.rows
        print({**row, "failed": len(row["failed"])}, record.extra, flush=True)
        for failure in row["failed"][:10]:
            print("  ", failure["seed"], failure["message"][:600].replace("\n", " "), flush=True)
        failures += len(row["failed"]) + (row["run"] < row["asked"])
    print(f"{failures} failures" if failures else "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
