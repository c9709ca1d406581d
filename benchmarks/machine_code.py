"""Is the machine code of our kernels still the one that records were taken with? No GPU is needed to say.

    python benchmarks/machine_code.py            # compile every case, compare with the digests kept, name what differs
    python benchmarks/machine_code.py --write    # and keep the digests of what was compiled

A digest is the SHA-256 of what a GPU would execute: the instructions as nvdisasm prints them, which hold no line numbers and no names of
variables, with the registers, shared memory and warps of the launch. A kernel whose digest has not changed runs as fast as it did, whatever
was written in its source since, so a record of GPU times may be carried over (benchmarks/carry_over.py). Digests belong to one version of
Triton and its assembler, and so does each file in benchmarks/machine_code. For another version than the one installed:

    pip install --target DIR --no-deps triton==3.6.0 && PYTHONPATH=DIR python benchmarks/machine_code.py

The table of lines that goes with the code is not quite without effect. Where a function that was inlined begins and ends, it puts labels among
the instructions, and the assembler may order two of them otherwise. A digest can change because a line has moved into the function it calls.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TABLES = Path(__file__).with_suffix("")


def digests(name: str) -> dict[str, str]:
    """The digest of each kernel that one case compiles, by case, architecture and kernel."""
    from flashlib.launch.inspect import compile_launch, inspect

    case = cases()[name]
    reports = [compile_launch(case[0](), case[1])] if callable(case[0]) else inspect(case[0], **case[1])
    return {f"{name}: {report.name} {report.arch}": digest(report) for report in reports}


def digest(report) -> str:
    words = (report.sass, str(report.registers), str(report.shared_memory), str(report.num_warps))
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def cases() -> dict[str, tuple]:
    """What tests/kernels compiles: every tile of the tables, the problems that ask most of them, and decoding."""
    from kernels.test_compiled import DROPOUT_CASES, FP32_CASES, HOPPER_CASES, INTERVALS, PORTABLE_CASES, named
    from kernels.test_decode_kernels import MERGES, PROBLEMS, launch

    ranges = ("backward", {"only": "backward_row_ranges", **INTERVALS})
    apart = {"splits of 2100 keys across pages": {"page_size": 16, "split_size": 2100, "merge_in_kernel": False}}
    found = {named(case): case for case in [*HOPPER_CASES, *PORTABLE_CASES, *DROPOUT_CASES, *FP32_CASES, ranges]}
    for capability in (8, 9):
        arch = f"sm_{capability}0"
        for problem, options in (PROBLEMS | apart).items():
            step = (lambda options=options, capability=capability: launch(capability, **options), arch)
            found[f"decode {arch}, {problem}"] = step
        found |= {f"{name} {arch}": (merge, arch) for name, merge in MERGES.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the digests in benchmarks/machine_code")
    parser.add_argument("--only", default="", help="compile only the cases whose name contains this")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write keeps all digests, so it takes no --only")
    found = compiled(options.only, options.processes)
    if table().exists():
        before = kept()
        differing = differences(before, found, complete=not options.only)
        print(
            f"{sum(before.get(kernel) == code for kernel, code in found.items())} kernels have the machine code that was kept"
        )
        print(*differing, sep="\n", end="\n" if differing else "")
    elif not options.write:
        print(f"no digests of {table().stem} are kept: nothing to compare")
    if options.write:
        table().write_text("".join(f"{code}  {kernel}\n" for kernel, code in found.items()))
        print(f"{len(found)} digests written")


def compiled(only: str = "", processes: int = 1) -> dict[str, str]:
    """The digests of all cases whose name contains ``only``, compiled anew: Triton's cache does not notice every change (bundles.py)."""
    wanted = [name for name in cases() if only in name]
    with (
        TemporaryDirectory() as cache,
        ProcessPoolExecutor(processes, get_context("spawn"), initializer=cache_in, initargs=(cache,)) as pool,
    ):
        return {kernel: code for part in pool.map(digests, wanted) for kernel, code in part.items()}


def cache_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def table() -> Path:
    """Where the digests of the installed version of Triton are kept."""
    import triton

    return TABLES / f"triton-{triton.__version__}.txt"


def kept() -> dict[str, str]:
    """The digests of the installed version of Triton, by kernel."""
    return {kernel: code for code, kernel in (line.split("  ", 1) for line in table().read_text().splitlines())}


def differences(before: dict[str, str], found: dict[str, str], *, complete: bool) -> list[str]:
    """What has changed, what is new, and, of a complete set, what is gone."""
    gone = [kernel for kernel in before if kernel not in found] if complete else []
    changed = [kernel for kernel in found if kernel in before and found[kernel] != before[kernel]]
    parts = {"changed": changed, "new": [kernel for kernel in found if kernel not in before], "gone": gone}
    return [f"{what}: {kernel}" for what, kernels in parts.items() for kernel in kernels]


if __name__ == "__main__":
    main()
