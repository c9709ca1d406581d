"""What a machine can do at best: how fast it multiplies, how fast it moves bytes, and what its caches hold."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flashlib.measure.racing.timing import time_call

__all__ = ["MemoryLevel", "cpu_memory", "matmul_flops_per_s", "stream_bytes_per_s"]

ROUNDS_IN_A_GRAPH = 32


@dataclass(frozen=True)
class MemoryLevel:
    """One level of a memory hierarchy.

    Attributes:
        name: as in ``"L2 cache"``.
        bytes: how much it holds.
        bytes_per_s: how fast it is read and written; None if unknown.
        shared_by: whose it is: ``"one core"``, ``"the chip"``.
    """

    name: str
    bytes: int
    bytes_per_s: float | None = None
    shared_by: str = ""


def matmul_flops_per_s(
    size: int = 1024,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    budget_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of one ``size`` x ``size`` matrix product, which takes ``2 * size**3`` floating-point operations.

    Args:
        clock: as in :func:`flashlib.measure.racing.timing.time_in_turns`.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, budget_s, clock)


def stream_bytes_per_s(
    size: int,
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 0.1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes moved per second while ``size`` bytes of floats are read, negated and written elsewhere, again and again.

    Both arrays stay in the smallest cache that holds them. On CUDA many rounds are launched as one graph, so that the time is
    theirs and not the launches'. An elementwise kernel and not a copy: the driver's own copy is slower than memory is.

    Source: McCalpin 1995, "Memory Bandwidth and Machine Balance in Current High Performance Computers" (STREAM).
    """
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    if torch.device(device).type != "cuda":
        return 2 * source.nbytes / _seconds(lambda: torch.neg(source, out=target), device, budget_s, clock)
    torch.neg(source, out=target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(ROUNDS_IN_A_GRAPH):
            torch.neg(source, out=target)
    return 2 * source.nbytes * ROUNDS_IN_A_GRAPH / _seconds(graph.replay, device, budget_s)


def _seconds(
    call: Callable[[], object],
    device: torch.device | str,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The 20th percentile: what the machine can do while nothing else disturbs it."""
    return time_call(call, device=device, budget_s=budget_s, clock=clock).p20_ms / 1e3


def cpu_memory(*, measure: bool = True) -> list[MemoryLevel]:
    """The caches of this CPU, smallest first, and its main memory. Caches are left out where the system does not tell.

    Args:
        measure: also time each level but L1, which is too small to be timed from Python: with arrays of a quarter of
            what it holds, and of 256 MiB for main memory. Takes half a second.
    """
    import psutil

    caches = _caches_from_sysctl() if platform.system() == "Darwin" else _caches_from_sysfs()
    levels = [
        MemoryLevel(f"L{number} cache", size, _streamed(size // 4) if measure and number > 1 else None, shared_by)
        for number, size, shared_by in caches
    ]
    main = MemoryLevel("main memory", psutil.virtual_memory().total, _streamed(2**28) if measure else None, "all cores")
    return [*levels, main]


def _streamed(size: int) -> float:
    return stream_bytes_per_s(size, budget_s=0.1)


def _caches_from_sysfs(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[tuple[int, int, str]]:
    """(level, bytes, whose) of the first core's data caches, as Linux tells them."""
    caches = []
    for index in sorted(folder.glob("index*")):
        told = {name: (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")}
        if told["type"] != "Instruction":
            size = int(told["size"].removesuffix("K")) * 1024  # the kernel prints KiB, whatever the size
            alone = told["shared_cpu_list"].isdigit()
            caches.append((int(told["level"]), size, "one core" if alone else "several cores"))
    return sorted(caches)


def _caches_from_sysctl() -> list[tuple[int, int, str]]:
    """The same from macOS, for the fast cores of a chip that has two kinds."""
    names = {"hw.perflevel0.l1dcachesize": (1, "one core"), "hw.perflevel0.l2cachesize": (2, "several cores")}
    caches = []
    for name, (level, whose) in names.items():
        answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip().isdigit():
            caches.append((level, int(answer.stdout), whose))
    return caches
