"""Hardware counters of a GPU, by Nsight Compute's ``ncu``: what a call moved, which units were busy, and what its warps waited for.

    flashlib bench decode --counters

``ncu`` watches a process of its own in which each peer runs each case: once to compile and warm up, unwatched, and once between
:func:`marked`. Each kernel starts with cold caches and is repeated until every counter had its turn; the clocks are left alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["COUNTERS", "Counted", "CountersUnavailableError", "marked", "parse", "read", "why_not"]

SECTOR, WAVEFRONT, PERCENT = (
    32,
    128,
    0.01,
)  # bytes that the L2 cache hands out, and that shared memory hands out in a cycle
# By name: the metric, what its figure is multiplied by, and whether figures of several kernels are added up or averaged over their time.
COUNTERS = {
    "seconds": ("gpu__time_duration.sum", 1, "sum"),
    "dram_read": ("dram__bytes_read.sum", 1, "sum"),
    "dram_written": ("dram__bytes_write.sum", 1, "sum"),
    "l2_read": ("lts__t_sectors_srcunit_tex_op_read.sum", SECTOR, "sum"),
    "l2_written": ("lts__t_sectors_srcunit_tex_op_write.sum", SECTOR, "sum"),
    "shared_bytes": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", WAVEFRONT, "sum"),
    "tensor_pipe": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", PERCENT, "mean"),
    "exponential_unit": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed", PERCENT, "mean"),
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
STALL_SECTION = "WarpStateStats"
MARK = re.compile(r"case:(\d+)")
UNITS = {"": 1, "%": 1, "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "sector": 1, "inst": 1, "cycle": 1}
UNITS |= {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3, "second": 1, "s": 1}
NOTES = (
    "By Nsight Compute, each kernel from cold caches, summed over the kernels of one call. dram: bytes between the L2 cache and the memory, of "
    "which those written exclude what still lies in the cache when a kernel ends. l2: bytes between the multiprocessors and the L2 cache. "
    "shared_bytes: of shared memory by load and store instructions, without what the copy engine writes and the tensor cores read there. "
    "tensor_pipe, exponential_unit: the share of its peak. stalls: warps waiting, per instruction issued, by reason. Results were checked as in "
    "the races."
)


class CountersUnavailableError(ValueError):
    """The counters cannot be read here. The message says why."""


@dataclass
class Counted:
    """What was counted of the kernels of one call.

    Attributes:
        kernels: their names, in the order of their start.
        figures: by the names of :data:`COUNTERS`: bytes, seconds, or shares from 0 to 1; None for what the GPU does not count.
        stalls: by reason, how many warps waited for it while one instruction was issued; averaged over the time of the kernels.
    """

    kernels: list[str] = field(default_factory=list)
    figures: dict[str, float | None] = field(default_factory=dict)
    stalls: dict[str, float] = field(default_factory=dict)


def why_not() -> str | None:
    """Why no counters can be read here; None if nothing speaks against it."""
    if not torch.cuda.is_available():
        return "hardware counters are a GPU's, and PyTorch sees no CUDA GPU here"
    if shutil.which("ncu") is None:
        return "hardware counters need Nsight Compute, and its command ncu is not on the PATH (it is part of the CUDA toolkit)"
    return None


@contextlib.contextmanager
def marked(number: int) -> Iterator[None]:
    """What ``ncu`` is to watch, and under which number. A backward runs on this thread, so that its kernels are marked as well."""
    torch.cuda.synchronize()
    with torch.autograd.set_multithreading_enabled(False):
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda.nvtx.range_push(f"case:{number}")
        try:
            yield
            torch.cuda.synchronize()
        finally:
            torch.cuda.nvtx.range_pop()
            torch.cuda.cudart().cudaProfilerStop()


def read(
    command: Sequence[str], counters: Iterable[str] = tuple(COUNTERS), *, stalls: bool = True
) -> dict[int, Counted]:
    """Run a program under ``ncu`` and count what it does between :func:`marked`, by number.

    Args:
        command: the program and its arguments.
        counters: names of :data:`COUNTERS`. stalls: also what warps waited for.

    Raises:
        CountersUnavailableError: there is no GPU, no ``ncu``, or it may not read the counters.
        RuntimeError: the program failed, or ``ncu`` did; says what was printed.
    """
    if obstacle := why_not():
        raise CountersUnavailableError(obstacle)
    wanted = _known(list(counters))
    whole = ["ncu", "--csv", "--page", "raw", "--nvtx", "--profile-from-start", "off", "--clock-control", "none"]
    whole += ["--print-units", "base"]
    whole += ["--section", STALL_SECTION] * stalls
    whole += ["--metrics", ",".join(COUNTERS[name][0] for name in wanted), *command]
    answer = subprocess.run(whole, check=False, capture_output=True, text=True)
    told = f"{answer.stdout[-2000:]} {answer.stderr[-2000:]}"
    if "ERR_NVGPUCTRPERM" in told:
        raise CountersUnavailableError(
            "the driver lets only administrators read hardware counters here (ERR_NVGPUCTRPERM)"
        )
    if answer.returncode:
        raise RuntimeError(f"ncu failed ({answer.returncode}): {told}")
    found = parse(answer.stdout, counters)
    if not found:
        raise RuntimeError(f"ncu counted no kernel: {told}")
    return found


def _known(names: list[str]) -> list[str]:
    """Those whose metric this GPU has, as ``ncu`` lists them; all of them if it lists none."""
    for name in names:
        if name not in COUNTERS:
            raise ValueError(f"counters must be among {', '.join(COUNTERS)}; got {name!r}")
    listed = subprocess.run(["ncu", "--query-metrics"], check=False, capture_output=True, text=True)
    there = set(re.findall(r"^(\w+__\w+)", listed.stdout, re.MULTILINE))
    return [name for name in names if not there or COUNTERS[name][0].partition(".")[0] in there]


def parse(text: str, counters: Iterable[str] = tuple(COUNTERS)) -> dict[int, Counted]:
    """What ``ncu --csv --page raw`` printed, by the number of the mark; kernels outside of marks are left out.

    The first line behind the header holds the units. Other output may stand before and behind the table.

    Raises:
        ValueError: a figure has a unit that is not known.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if not rows:
        return {}
    units, counters = rows[0], list(counters)
    found: dict[int, Any] = {}
    spent: dict[int, float] = {}
    for row in rows[1:]:
        mark = MARK.search(" ".join(filter(None, row.values())))
        if mark is None:
            continue
        number = int(mark[1])
        counted, seconds = found.setdefault(number, Counted()), _figure(row, units, COUNTERS["seconds"][0]) or 1.0
        before = spent.get(number, 0.0)
        spent[number] = before + seconds
        counted.kernels.append(row.get("Kernel Name", ""))
        for name in counters:
            metric, factor, how = COUNTERS[name]
            figure = _figure(row, units, metric)
            add = None if figure is None else figure * factor
            counted.figures[name] = _joined(counted.figures.get(name, 0.0), before, add, seconds, how)
        for column in row:
            if (reason := STALL.fullmatch(column or "")) and (figure := _figure(row, units, column)) is not None:
                counted.stalls[reason[1]] = _joined(counted.stalls.get(reason[1], 0.0), before, figure, seconds, "mean")
    return found


def _figure(row: Mapping[str, str], units: Mapping[str, str], metric: str) -> float | None:
    value = (row.get(metric) or "").replace(",", "")
    if not re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE):
        return None
    unit = units.get(metric) or ""
    if metric.startswith(("dram__", "gpu__time")) and unit not in UNITS:
        raise ValueError(f"the unit of {metric} must be one of {', '.join(filter(None, UNITS))}; got {unit!r}")
    return float(value) * UNITS.get(unit, 1)


def _joined(before: float | None, before_s: float, figure: float | None, seconds: float, how: str) -> float | None:
    if before is None or figure is None:
        return None
    return before + figure if how == "sum" else (before * before_s + figure * seconds) / (before_s + seconds)
