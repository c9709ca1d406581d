"""The Triton kernels on a GPU against the oracle: random problems, determinism, and more elements than 32 bits can count.

python tests/gpu/device_checks.py all --specs 2000 --workers 14 --out results

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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from feature_sets import FeatureSet, coverage
from problems import Problem

from flashlib import attention, masks
from flashlib.kernels.launch import Launch
from flashlib.measure.bench import kernel_sources
from flashlib.measure.record import Record, new_record, save_record
from flashlib.reference import check, check_gradients

BACKEND = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEMS_IN_A_SET = 10
SAVE_EVERY_S = 5
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


def one_spec(problem: Problem, seed: int) -> dict:
    """A problem forward and backward: largest error as a fraction of its budget, by result, and which kernels ran."""
    started, kernels = time.monotonic(), Counter()
    with _started_kernels(kernels):
        (out, lse), given, gradients = forward_and_backward(problem, seed)
    computed = _now()
    inputs = (problem.q, problem.k, problem.v)
    forward = check(out, lse, *inputs, **problem.options)
    backward = check_gradients(gradients, *inputs, *given, **problem.options)
    used = {}
    for comparison in (forward, backward):
        used |= {name: _fraction(error, comparison.budget[name]) for name, error in comparison.error.items()}
    passed = forward.passed and backward.passed
    return {
        "passed": passed,
        "of_budget": used,
        "message": None if passed else f"{problem!r}: {forward.message} | {backward.message}",
        "kernels": dict(kernels),
        "seconds": [computed - started, _now() - computed],
    }


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


@contextmanager
def _started_kernels(counts: Counter[str]):
    """Counts the kernels that are started inside, by name."""
    start = Launch.start

    def counted(launch: Launch) -> None:
        counts[launch.name] += 1
        start(launch)

    with mock.patch.object(Launch, "start", counted):
        yield


def _fraction(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return round(error / budget, 4) if budget else float("inf")


def random_specs(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    """``count`` problems in so many processes, each of which takes one set of problems after the other.

    The record is written every few seconds. A process that dies (an illegal access takes its process along) leaves the problem
    that it had begun as failed.

    Args:
        limit_s: seconds after which no set is begun.
    """
    started, context = time.monotonic(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files, next_set = [Path(folder) / f"{worker}.jsonl" for worker in range(workers)], context.Value("i", 0)
        processes = [context.Process(target=_work, args=(seed, count, next_set, file, limit_s)) for file in files]
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
    worst = {
        name: max((row["of_budget"].get(name, 0.0) for row in rows if row["passed"]), default=0.0)
        for name in ("out", "lse", "dq", "dk", "dv")
    }
    kernels = sum((Counter(row["kernels"].keys()) for row in rows), Counter())
    summary = {
        **{"check": "random specs", "asked": asked, "run": len(rows), "worst_of_budget": worst},
        "failed": [{"seed": row["seed"], "message": row["message"]} for row in rows if not row["passed"]],
        "problems_with": coverage(FeatureSet.draw(row["set"]).told() for row in rows),
        "problems_that_ran": dict(sorted(kernels.items())),
    }
    spent = [round(sum(row["seconds"][part] for row in rows), 1) for part in (0, 1)]
    note = "Random problems (tests/gpu/feature_sets.py), forward, LSE and backward, against float64 within the error budget."
    return new_record("triton_specs", [summary], CHECKED_ON, note, process_seconds={"kernels": spent[0], "oracle": spent[1]}, **extra)  # fmt: skip


def _work(seed: int, count: int, next_set, file: Path, limit_s: float) -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    with file.open("w", encoding="utf-8") as lines:

        def write(row: dict) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        while time.monotonic() - started < limit_s:
            with next_set.get_lock():
                first = next_set.value
                next_set.value += PROBLEMS_IN_A_SET
            if first >= count:
                return
            features = FeatureSet.draw(seed + first)
            for number in range(seed + first, seed + min(first + PROBLEMS_IN_A_SET, count)):
                known = {"set": seed + first, "seed": number}
                write({"begun": known})
                write({**known, **_outcome(features, number)})


def _outcome(features: FeatureSet, seed: int) -> dict:
    try:
        return one_spec(features.problem(seed, DEVICE), seed)
    except torch.AcceleratorError:
        raise  # this process has lost the device; the problem stands as begun
    except Exception as error:
        return _failed(f"{type(error).__name__}: {error}"[:400])


def _failed(message: str) -> dict:
    return {"passed": False, "message": message, "of_budget": {}, "kernels": {}, "seconds": [0.0, 0.0]}


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
        yield {**begun, **_failed("the process died in it")}


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
