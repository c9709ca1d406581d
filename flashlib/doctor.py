"""What this machine has, and what of flashlib runs on it: the text behind ``flashlib doctor``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from flashlib import backends
from flashlib.launch import packets
from flashlib.launch.cpu.library import library, why_missing
from flashlib.launch.rules import why_not_planned
from flashlib.launch.start import TRITON_INSTALLED

PACKAGES = ("flashlib", "torch", "triton", "numpy", "transformers", "jupyterlab", "flash-attn", "flash-attn-3")
# Vector and matrix instructions that attention kernels use, as PyTorch names them (x86 first, then ARM).
CPU_FEATURES = (
    *("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("neon", "fp16_arith", "bf16", "dot", "i8mm", "sve", "sve2", "sme", "sme2"),
)


@dataclass(frozen=True)
class GPU:
    """One CUDA device. Memory in bytes; ``capability`` is "9.0" for Hopper."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Report:
    """What ``flashlib doctor`` found.

    Attributes:
        system: Python and operating system.
        cpu_features: those of :data:`CPU_FEATURES` that this processor has.
        cpu_kernels: the instructions for which our own kernels for processors were compiled, or None; ``backends`` says why.
        launches: how our kernels for GPUs are launched, or why that takes longer than it might; None without a GPU.
        memory: bytes of main memory.
        driver: version of the NVIDIA driver; None where there is none.
        packages: installed version by name; None if not installed.
        backends: None for each attention backend that runs here, else what it lacks.
        weights: path of the model weights; None if they have not been fetched.
    """

    system: dict[str, str]
    cpu: str
    physical_cores: int | None
    logical_cores: int | None
    torch_threads: int
    cpu_features: tuple[str, ...]
    cpu_kernels: str | None
    launches: str | None
    memory: int
    gpus: tuple[GPU, ...]
    driver: str | None
    packages: dict[str, str | None]
    backends: dict[str, str | None]
    weights: str | None

    def to_json(self) -> str:
        """All fields as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def examine(weights: Path | None) -> Report:
    """Look at this machine. Takes seconds where a GPU has to be woken or the CPU kernels have not been compiled yet; fetches nothing.

    Args:
        weights: where those of the course's model were found; None if they are not here.
    """
    capabilities = torch.cpu.get_capabilities()
    return Report(
        system={"python": platform.python_version(), "os": platform.platform()},
        cpu=capabilities.get("cpu_name", platform.machine()),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        torch_threads=torch.get_num_threads(),
        cpu_features=tuple(name for name in CPU_FEATURES if capabilities.get(name)),
        cpu_kernels=None if why_missing() else library().variant.name,
        launches=_launches(),
        memory=psutil.virtual_memory().total,
        gpus=_gpus(),
        driver=_driver(),
        packages={name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},  # names its CUDA version
        backends=backends.available(),
        weights=str(weights) if weights else None,
    )


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report as tables for people."""
    console = console or Console()
    console.print(_machine_table(report))
    console.print(_backend_table(report))


def _machine_table(report: Report) -> Table:
    table = Table(title="This machine", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("Python", report.system["python"])
    table.add_row("System", report.system["os"])
    table.add_row(
        "CPU",
        f"{report.cpu}: {report.physical_cores} cores, {report.logical_cores} threads, "
        f"{report.torch_threads} used by PyTorch",
    )
    table.add_row("CPU features", ", ".join(report.cpu_features) or "none that attention kernels use")
    table.add_row(
        "CPU kernels", f"compiled for {report.cpu_kernels}" if report.cpu_kernels else "none; see backend cpu below"
    )
    table.add_row("Memory", f"{report.memory / 2**30:.1f} GiB")
    for gpu in report.gpus:
        table.add_row("GPU", f"{gpu.name}, capability {gpu.capability}, {gpu.memory / 2**30:.1f} GiB")
    if report.launches:
        table.add_row("Kernel launches", report.launches)
    if not report.gpus:
        table.add_row("GPU", "none that PyTorch can use; Part I of the course needs none")
    table.add_row("NVIDIA driver", report.driver or "none found")
    for name, version in report.packages.items():
        table.add_row(name, version or "not installed")
    table.add_row("Weights", report.weights or "not here; `flashlib weights` brings them (98 MB)")
    return table


def _backend_table(report: Report) -> Table:
    table = Table(title="Attention backends", title_justify="left")
    table.add_column("backend", style="bold")
    table.add_column("here")
    table.add_column("why not", overflow="fold")
    for name, missing in report.backends.items():
        table.add_row(name, "no" if missing else "available", missing or "")
    return table


def _gpus() -> tuple[GPU, ...]:
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(GPU(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory) for gpu in properties)


def _launches() -> str | None:
    if not torch.cuda.is_available() or not TRITON_INSTALLED:
        return None
    return (
        packets.why_missing()
        or why_not_planned(torch.device("cuda", torch.cuda.current_device()))
        or "by our own launcher"
    )


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.partition("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
