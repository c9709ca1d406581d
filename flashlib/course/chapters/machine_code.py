"""Compile kernels beside a notebook whose own process interprets them, and read what came out."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from flashlib.launch.inspect import KernelReport, inspect

__all__ = ["compile_apart", "lines_with", "product_shapes", "resident_programs"]

# Of one multiprocessor: bytes of shared memory and warps. CUDA C++ Programming Guide, technical specifications per compute
# capability. All have 65,536 registers of 32 bits, handed out to a warp in units of 256, and keep 1 KiB for each program.
_MULTIPROCESSOR = {"sm_80": (167_936, 64), "sm_86": (102_400, 48), "sm_89": (102_400, 48), "sm_90": (233_472, 64)}
_REGISTERS, _REGISTER_UNIT, _RESERVED = 65_536, 256, 1024


def compile_apart(jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[KernelReport]]:
    """`flashlib.launch.inspect.inspect` for several sets of arguments, two at a time, in processes that do not interpret.

    Args:
        jobs: by a name of your choice, the arguments of `inspect`.

    Raises:
        RuntimeError: a compilation failed; says what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "flashlib.course.chapters.machine_code"]
    answer = subprocess.run(command, input=pickle.dumps(dict(jobs)), env=environment, capture_output=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"compiling failed: {answer.stderr.decode()[-2000:]}")
    return pickle.loads(answer.stdout)


def resident_programs(report: KernelReport) -> int:
    """How many programs of a kernel a multiprocessor holds at the same time; 0 if not even one fits."""
    shared_memory, warps = _MULTIPROCESSOR[report.arch]
    registers = -(-report.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT * report.num_warps
    if report.shared_memory > report.shared_memory_limit:
        return 0
    by_memory = shared_memory // (report.shared_memory + _RESERVED)
    return min(by_memory, _REGISTERS // registers, warps // report.num_warps)


def product_shapes(report: KernelReport) -> list[tuple[int, int, int]]:
    """Rows, columns and depth of the products that single tensor-core instructions compute: m, n and k in their PTX names."""
    shapes = re.findall(r"mma\S*\.m(\d+)n(\d+)k(\d+)\.", report.ptx)
    return sorted({(int(m), int(n), int(k)) for m, n, k in shapes})


def lines_with(code: str, text: str, count: int = 1) -> str:
    """The first lines of PTX or SASS that contain a text, without addresses, semicolons and tabs."""
    found = [line for line in code.splitlines() if text in line][:count]
    return "\n".join(" ".join(re.sub(r"/\*[0-9a-f]+\*/|;", "", line).split()) for line in found)


def _inspect(arguments: Mapping[str, Any]) -> list[KernelReport]:
    return inspect(**arguments)


def _main() -> None:
    jobs = pickle.loads(sys.stdin.buffer.read())
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        reports = dict(zip(jobs, pool.map(_inspect, jobs.values()), strict=True))
    sys.stdout.buffer.write(pickle.dumps(reports))


if __name__ == "__main__":
    _main()
