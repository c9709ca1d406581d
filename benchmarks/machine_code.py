"""Is the machine code of our kernels still the one that records were taken with? No GPU is needed to say.

    python benchmarks/machine_code.py            # compile every case, compare with machine_code.txt, name what differs
    python benchmarks/machine_code.py --write    # and keep the digests of what was compiled

A digest is the SHA-256 of what a GPU would execute: the instructions as nvdisasm prints them, which hold no line numbers and no names of
variables, with the registers, shared memory and warps of the launch. A kernel whose digest has not changed runs as fast as it did, whatever
was written in its source since, so a record of GPU times may be carried over. Digests belong to one version of Triton and its assembler:
under another one nothing can be compared, and the script says so.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TABLE = Path(__file__).with_suffix(".txt")


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
    from kernels.test_compiled import FP32_CASES, HOPPER_CASES, PORTABLE_CASES, named
    from kernels.test_decode_kernels import PROBLEMS, launch

    found = {named(case): case for case in HOPPER_CASES + PORTABLE_CASES + FP32_CASES}
    for capability in (8, 9):
        for problem, options in PROBLEMS.items():
            step = (lambda options=options, capability=capability: launch(capability, **options), f"sm_{capability}0")
            found[f"decode sm_{capability}0, {problem}"] = step
    return found


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the digests in machine_code.txt")
    parser.add_argument("--only", default="", help="compile only the cases whose name contains this")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write keeps all digests, so it takes no --only")
    wanted = [name for name in cases() if options.only in name]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        found = {kernel: code for part in pool.map(digests, wanted) for kernel, code in part.items()}
    if TABLE.exists():
        report(*kept(), found, triton.__version__, complete=not options.only)
    if options.write:
        lines = [f"triton {triton.__version__}", *(f"{code}  {kernel}" for kernel, code in found.items())]
        TABLE.write_text("\n".join(lines) + "\n")
        print(f"{len(found)} digests written")


def kept() -> tuple[str, dict[str, str]]:
    """The version of Triton, and the digests, that machine_code.txt holds."""
    version, *lines = TABLE.read_text().splitlines()
    return version.removeprefix("triton "), {kernel: code for code, kernel in (line.split("  ", 1) for line in lines)}


def report(of: str, before: dict[str, str], found: dict[str, str], version: str, *, complete: bool) -> None:
    if of != version:
        print(f"the digests kept are those of triton {of}, and this is {version}: nothing to compare")
        return
    changed = [kernel for kernel in found if kernel in before and found[kernel] != before[kernel]]
    print(f"{sum(kernel in before for kernel in found) - len(changed)} kernels have the machine code that was kept")
    gone = [kernel for kernel in before if kernel not in found] if complete else []
    for what, kernels in (("changed", changed), ("new", [k for k in found if k not in before]), ("gone", gone)):
        for kernel in kernels:
            print(f"{what}: {kernel}")


if __name__ == "__main__":
    main()
