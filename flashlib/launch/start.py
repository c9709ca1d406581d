"""A kernel with everything it needs, not yet started, and how it is started: on a GPU, or in Triton's interpreter.

:func:`flashlib.launch.inspect.compile_launch` compiles it for a GPU that need not be there.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlib.launch.tiles import HopperTiles, TileConfig

__all__ = ["TRITON_INSTALLED", "Launch", "interpreting"]

# Asked once: torch.compile cannot trace the question.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# While a kernel runs in the interpreter, the functions of triton.language are others, for all threads: one kernel at a time.
INTERPRETER = threading.Lock()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, as ``TRITON_INTERPRET=1`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tiles: TileConfig | HopperTiles | None = None

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def compile_options(self) -> dict[str, int]:
        if self.tiles is None:
            return {}
        return {"num_warps": self.tiles.num_warps, "num_stages": self.tiles.num_stages}

    @property
    def tensor(self) -> Tensor:
        """One of its tensors; all of them lie on one device. What the copy engine reads is wrapped in a descriptor."""
        unwrapped = (getattr(argument, "base", argument) for argument in self.arguments.values())
        return next(argument for argument in unwrapped if isinstance(argument, Tensor))

    def start(self) -> None:
        """Start the kernel on the device that its tensors lie on. Triton by itself takes the current one, which may be another."""
        if 0 not in self.grid:
            with torch.cuda.device_of(self.tensor), INTERPRETER if interpreting() else nullcontext():
                self.kernel[self.grid](**self.arguments, **self.compile_options)
