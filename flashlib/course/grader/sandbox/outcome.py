"""What a student's process is allowed, and what comes of a call or of the whole process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.sandbox.handout import Seen


@dataclass(frozen=True)
class Limits:
    """What one submission may use.

    Attributes:
        seconds: wall-clock time for one call; importing the file counts as one.
        total_seconds: wall-clock time for the whole submission.
        memory: bytes on top of what PyTorch itself takes.
        answer: bytes of arrays in one answer.
        output: bytes printed in one property's check; more ends the process.
        disk: bytes in its temporary directory.
        processes: whether it may start processes.
        threads: that may run in it at a time.
    """

    seconds: float = 20.0
    total_seconds: float = 180.0
    memory: int = 2048 * MIB
    answer: int = 256 * MIB
    output: int = MIB
    disk: int = 64 * MIB
    processes: bool = False
    threads: int = 64


class StudentError(Exception):
    """The submission gave no usable answer.

    Attributes:
        kind: `"timeout"`, `"memory-limit"`, `"process-ended"`, `"output-flood"`, `"disk-flood"`,
            `"too-many-threads"`, `"tampered"`, or what
            the child itself reported: `"exception"`, `"syntax"`, `"missing"`, `"not-implemented"`, `"forbidden"`,
            `"exit"`, `"unsendable"`, and of Triton kernels `"out-of-bounds-load"`, `"out-of-bounds-store"`, `"race"`.
        message: what happened, one sentence.
        traceback: the frames in the student's own file, or "".
        group: for `"forbidden"`, which group of operations.
    """

    def __init__(self, kind: str, message: str, traceback: str = "", group: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.traceback, self.group = kind, message, traceback, group


class SandboxError(RuntimeError):
    """The sandbox itself could not work; no fault of the submission."""


@dataclass(frozen=True)
class Reply:
    """What one call gave: the value, its traffic if metered, the arguments it changed, seconds, and kernels that were compiled.

    `compiled` is None but in a sandbox for compiling. There it holds, by the name of each kernel that was launched, how it
    multiplies tiles: pairs such as `("ieee", "f32")`. `seen` is what was handed out of guarded tensors, or None.
    """

    value: Any
    meter: dict[str, Any] | None
    changed: tuple[str, ...]
    seconds: float
    compiled: dict[str, list[tuple[str, str]]] | None = None
    seen: Seen | None = None

    def times_read(self, name: str, x: torch.Tensor) -> float:
        """How often the meter saw all of the metered tensor `x` read. `seen.times` says it of a guarded one."""
        return self.meter["bytes_read"].get(name, 0) / x.nbytes


@dataclass(frozen=True)
class Ending:
    """How a child went.

    Attributes:
        memory_growth: the most resident memory it took on top of what it began with, in bytes.
        strays: processes it left behind.
        status: its exit status, as from `os.wait`.
        stopped: whether the grader had to stop it, so that the status is not its own doing.
        cpu_seconds: the processor time that it took.
    """

    memory_growth: int = 0
    strays: int = 0
    status: int = 0
    stopped: bool = True
    cpu_seconds: float = 0.0
