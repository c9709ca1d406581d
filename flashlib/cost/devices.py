"""What processors can do at best: data sheets as data, ceilings that were measured, or those of this machine."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

__all__ = ["Device", "device", "device_names", "named", "this_machine"]

DATA = Path(__file__).with_name("devices.json")
# Where nothing was measured: the share of a data sheet's figure that a large matrix product, and a large read, are taken to reach. They
# are what the one GPU that was measured reached, an H200.
ASSUMED_MATMUL, ASSUMED_READ = 0.70, 0.91


@dataclass(frozen=True)
class Device:
    """A GPU or CPU.

    Attributes:
        name: as on the command line. title: in words. kind: ``"gpu"`` or ``"cpu"``.
        capability: major compute capability of a GPU; 0 for a CPU.
        units: multiprocessors, or cores. clock_hz: at which the peaks hold.
        flops_per_s: peak of dense matrix products by dtype.
        exponentials_per_clock: per unit. (CUDA C++ programming guide, throughput of native arithmetic instructions: 16.)
        memory_bytes, bytes_per_s: of the memory behind the chip, as the data sheet has it. cache_bytes: the last cache before it.
        local_bytes: what one program can keep by itself: shared memory of a GPU's block, the L2 cache of a CPU's core.
        watts: the power cap. link_bytes_per_s: to other devices, one direction.
        measured: ``matmul_flops_per_s`` by dtype, ``read_bytes_per_s`` and their ``source``; empty if nothing was measured.
        source: where the figures come from.
    """

    name: str
    title: str
    kind: str
    capability: int
    units: int
    clock_hz: float
    flops_per_s: Mapping[str, float]
    exponentials_per_clock: float
    memory_bytes: float
    bytes_per_s: float
    cache_bytes: int
    local_bytes: int
    watts: float
    link_bytes_per_s: float
    source: str
    measured: Mapping = field(default_factory=dict)

    @property
    def exponentials_per_s(self) -> float:
        return self.units * self.exponentials_per_clock * self.clock_hz

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in this dtype, as the data sheet has it.

        Raises:
            ValueError: it has no figure for the dtype.
        """
        if dtype not in self.flops_per_s:
            raise ValueError(f"dtype must be one of {', '.join(self.flops_per_s)} on {self.title}; got {dtype!r}")
        return self.flops_per_s[dtype]

    def sustained(self, dtype: str) -> float:
        """FLOP/s of a large matrix product: measured, or an assumed share of the peak. A GPU at its power cap lowers its clock for it."""
        share = ASSUMED_MATMUL
        for known, rate in self.measured.get("matmul_flops_per_s", {}).items():
            share = rate / self.flops_per_s[known]
            if known == dtype:
                return rate
        return share * self.peak(dtype)

    @property
    def read_bytes_per_s(self) -> float:
        """Bytes per second that a large read reaches: measured, or an assumed share of the data sheet's figure."""
        return self.measured.get("read_bytes_per_s", ASSUMED_READ * self.bytes_per_s)


@cache
def _known() -> dict[str, Device]:
    return {name: Device(name, **told) for name, told in json.loads(DATA.read_text(encoding="utf-8")).items()}


def device_names() -> list[str]:
    return list(_known())


def device(name: str) -> Device:
    """A device by name, such as ``"h200"``.

    Raises:
        ValueError: it is not known; lists those that are.
    """
    known = _known()
    if not isinstance(name, str) or name.lower() not in known:
        near = difflib.get_close_matches(str(name).lower(), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no device {name!r}; devices are {', '.join(known)}{hint}")
    return known[name.lower()]


def named(title: str) -> Device:
    """The known GPU that a driver calls by this title, such as ``"NVIDIA A100-SXM4-80GB"``.

    Raises:
        ValueError: none of them is.
    """
    words = set(re.findall(r"[a-z0-9]+", title.lower()))
    fitting = [found for found in _known().values() if set(found.name.split("-")) <= words]
    if not fitting:
        raise ValueError(f"this GPU is not known: {title}; known are {', '.join(device_names())}")
    return max(fitting, key=lambda found: len(found.name))


def this_machine() -> Device:
    """This machine's GPU, or its processor: a large product and a large read are timed. Takes a few seconds, and PyTorch.

    What cannot be measured from here is taken from the data of the same GPU; a GPU that is not known is refused, as nothing says how
    many exponentials it forms.

    Raises:
        ValueError: the GPU is not among the known ones.
    """
    import os

    import psutil
    import torch

    from flashlib.measure.racing.machine import matmul_flops_per_s, stream_bytes_per_s

    if torch.cuda.is_available():
        found = named(torch.cuda.get_device_name())
        rate = matmul_flops_per_s(8192, dtype=torch.bfloat16, device="cuda")
        measured = {"matmul_flops_per_s": {"bf16": rate}, "read_bytes_per_s": stream_bytes_per_s(2**32, device="cuda")}
        return Device(**{**vars(found), "name": "here", "measured": {**measured, "source": "measured here"}})
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    clock = 1e6 * getattr(psutil.cpu_freq(), "current", 0) or 2.5e9
    rates = {"fp32": matmul_flops_per_s(1024), "bf16": matmul_flops_per_s(1024, dtype=torch.bfloat16)}
    read = stream_bytes_per_s(2**28)
    measured = {"matmul_flops_per_s": rates, "read_bytes_per_s": read, "source": "measured here"}
    memory = psutil.virtual_memory().total
    return Device(
        "here", f"this processor ({cores} cores)", "cpu", 0, cores, clock, rates, 4, memory, read, 2**20, 2**20, 0, 0,
        "measured here", measured,
    )  # fmt: skip
