"""Do problems still launch what they launched when records were taken? No GPU is needed to say.

    python benchmarks/launch_digests.py 3d654bf          # compare this checkout with a revision of git, over random problems

A launch is a kernel, its grid, warps and stages, and its arguments: every number, and of each tensor its shape, strides and type, but neither addresses
nor the counters in which programs count one another. Where launches are the same and machine code is (benchmarks/machine_code.py), a GPU does what it
did, however the host comes to them: a record of GPU times, or of results, holds on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROBLEMS = 600


def module(*names: str):
    """The first module of these names that there is: host code has moved between rooms."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"none of {', '.join(names)}")


def digest(launches) -> str:
    said = []
    for launch in launches:
        arguments = {
            name: told(x) for name, x in sorted(launch.arguments.items()) if name not in ("p_counter", "p_arrivals")
        }
        said.append([launch.name, list(launch.grid), sorted(launch.compile_options.items()), arguments])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def told(x) -> object:
    import torch

    if isinstance(x, torch.Tensor):
        return [str(x.dtype), list(x.shape), list(x.stride())]
    if hasattr(x, "base"):  # what the copy engine reads: Triton's descriptor, or ours
        block = x.block if hasattr(x, "block") else x.block_shape
        return ["map", str(x.base.dtype), list(x.shape), list(x.strides), list(block)]
    return repr(x)


def problem_launches(rng: random.Random) -> tuple[str, list]:
    """What one random problem launches, forward and backward, or as a step of decoding."""
    import torch

    options_module = module("flashlib.launch.options", "flashlib.kernels.launch")
    plain = module("flashlib.launch.plain", "flashlib.kernels.launch")
    hopper = module("flashlib.launch.hopper", "flashlib.kernels.hopper_launch")
    run = module("flashlib.launch.run", "flashlib.kernels.run")
    decode = module("flashlib.launch.decode", "flashlib.kernels.decode_launch")

    def takes(options, *tensors):  # without the question whether they lie on a GPU
        first = tensors[0]
        narrow = all(x.shape[3] <= 128 and hopper.copy_engine_reads(x) for x in tensors)
        half = first.dtype in (torch.float16, torch.bfloat16)
        return half and narrow and options.row_offsets is None and not options.dropout_p

    hopper.takes = takes
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
    batch, (heads, kv_heads) = rng.choice((1, 2, 5)), rng.choice(((1, 1), (4, 4), (8, 2), (6, 1)))
    dim = rng.choice((64, 64, 128, 128, 80, 256, 32))
    v_dim = dim if rng.random() < 0.8 else rng.choice((64, 128))

    def drawn(heads, length, dim, rows_first):
        x = torch.empty((batch, length, heads, dim) if rows_first else (batch, heads, length, dim), dtype=dtype)
        return x.transpose(1, 2) if rows_first else x

    rows_first = rng.random() < 0.3
    softcap, scale = rng.choice((0.0, 0.0, 20.0)), rng.choice((0.125, 0.3))
    left, right = rng.choice((None, None, 100)), rng.choice((None, 0, 0, 30))
    if rng.random() < 0.4:
        q_len, capacity, page = (
            rng.choice((1, 2, 4, 9)),
            rng.choice((64, 640, 1000, 4096, 20000)),
            rng.choice((None, None, 16, 64)),
        )
        q = drawn(heads, q_len, dim, False)
        pages = None if page is None else torch.zeros(batch, -(-capacity // page), dtype=torch.int32)
        keys = (batch, kv_heads, capacity) if page is None else (7, kv_heads, page)
        k, v = torch.empty(*keys, dim, dtype=dtype), torch.empty(*keys, v_dim, dtype=dtype)
        lengths = rng.choice((None, torch.zeros(batch, dtype=torch.int32)))
        cut = rng.choice(({}, {}, {"num_splits": 3}, {"split_size": 256}))
        inference = importlib.import_module("flashlib.inference.decode")
        problem = inference.Problem.checked(
            q, k, v, lengths, pages, right == 0, None if left is None else (left, 0), scale, softcap, cut.get("num_splits", 0), cut.get("split_size")
        )  # fmt: skip
        return "decode", decode.decode_launches(q, k, v, decode_options(inference, decode, problem))[0]
    q_len = rng.choice((100, 128, 300, 1024, 2048))
    kv_len = q_len if rng.random() < 0.5 else rng.choice((100, 128, 777, 2048))
    q, k, v = (
        drawn(heads, q_len, dim, rows_first),
        drawn(kv_heads, kv_len, dim, rows_first),
        drawn(kv_heads, kv_len, v_dim, rows_first),
    )
    start = stop = None
    if rng.random() < 0.3:
        start, stop = (torch.zeros(rng.choice((1, batch)), q_len, dtype=torch.int32) for _ in range(2))
        left = right = None
    slopes = torch.zeros(1, heads) if rng.random() < 0.2 else None
    options = options_module.KernelOptions(start, stop, left, right, slopes, None, scale, softcap)
    if hopper.hopper_runs(q, k, v, options):
        launches, out, lse = hopper.hopper_launches(q, k, v, options)
    else:
        launch, out, lse = plain.forward_launch(q, k, v, options)
        launches = [launch]
    given = torch.empty_like(out), torch.empty_like(lse) if rng.random() < 0.3 else None
    best = {"dkdv": run.best_dkdv_launches, "dq": run.best_dq_launches}
    back, _ = plain.backward_launches(q, k, v, out, lse, *given, options, **best)
    return "training", [*launches, *back]


def decode_options(inference, decode, problem):
    """As many splits as the checkout chooses."""
    if hasattr(problem, "options"):
        return problem.options("ieee")
    inference._multiprocessors = lambda device: 132  # an H200's, as today where there is no GPU
    splits, fewest = inference._splits(problem)
    size = problem.split_size or -(-problem.capacity // splits)
    return decode.DecodeOptions(
        problem.lengths, problem.block_table, problem.left, problem.right, problem.scale, problem.softcap, splits, problem.split_size,
        merge_in_kernel=splits == 1 or size >= inference.LEAST_MERGED_IN_KERNEL, precision="ieee", fewest_splits=fewest,
    )  # fmt: skip


def digests(seed: int, count: int) -> list[str]:
    found = []
    for number in range(count):
        kind, launches = problem_launches(random.Random(seed + number))
        found.append(f"{kind} {' '.join(launch.name for launch in launches)} {digest(launches)}")
    return found


def digests_of(tree: Path, seed: int, count: int) -> list[str]:
    """The same of another checkout, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--print", str(seed), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"launches of {tree} cannot be told:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()


def compare(base: str, seed: int, count: int = PROBLEMS) -> list[str]:
    """How launches differ from those of a revision, over random problems: nothing, if records may be carried over."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "base")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, base], cwd=REPOSITORY, check=True)
        try:
            before = digests_of(tree, seed, count)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=REPOSITORY, check=True)
    after = digests_of(REPOSITORY, seed, count)
    if len(before) != count or len(after) != count:
        raise RuntimeError(f"{len(before)} and {len(after)} digests of {count} problems")
    return [
        f"problem {seed + n}: {a}, and now {b}" for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b
    ]


def main() -> None:
    if sys.argv[1:2] == ["--print"]:
        print(*digests(int(sys.argv[2]), int(sys.argv[3])), sep="\n")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    options = parser.parse_args()
    differing = compare(options.base, options.seed, options.problems)
    print(*differing[:20], sep="\n")
    if differing:
        sys.exit(
            f"{len(differing)} of {options.problems} problems launch something else than at {options.base} (seed {options.seed})"
        )
    print(f"{options.problems} random problems launch what they launched at {options.base}")


if __name__ == "__main__":
    main()
