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

from flashlib.launch.tiles import HopperBackwardTiles, HopperTiles, TileConfig

__all__ = ["TRITON_INSTALLED", "Launch", "TileMap", "interpreting"]

# Asked once: torch.compile cannot trace the question.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# While a kernel runs in the interpreter, the functions of triton.language are others, for all threads: one kernel at a time.
INTERPRETER = threading.Lock()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, as ``TRITON_INTERPRET=1`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True, slots=True)
class TileMap:
    """What the copy engine must know of a tensor to bring tiles of it: sizes and strides in elements, the tile, and how it lies in shared memory.

    Attributes:
        base: the tensor, or its form. shape, strides: of all dimensions, innermost last, whose stride is 1.
        block: the tile. swizzle: bytes over which its rows are spread, 0 or 128.
    """

    base: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    swizzle: int

    def descriptor(self) -> Any:
        """The same, as Triton takes it."""
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        bits = 8 * self.base.element_size()
        layout = NVMMASharedLayout(swizzle_byte_width=self.swizzle, element_bitwidth=bits, rank=len(self.shape))
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block), layout)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tiles: TileConfig | HopperTiles | HopperBackwardTiles | None = None

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def compile_options(self) -> dict[str, int]:
        return {} if self.tiles is None else self.tiles.compile_options

    @property
    def triton_arguments(self) -> dict[str, Any]:
        """The arguments as Triton takes them."""
        return {name: x.descriptor() if isinstance(x, TileMap) else x for name, x in self.arguments.items()}

    @property
    def device(self) -> torch.device:
        """On which its tensors lie, or their forms."""
        for x in self.arguments.values():
            x = x.base if type(x) is TileMap else x
            if hasattr(x, "device"):
                return x.device
        raise ValueError(f"{self.name} is given no tensor")

    @property
    def tensor(self) -> Tensor:
        """One of its tensors; all of them lie on one device. What the copy engine reads is wrapped in a descriptor."""
        unwrapped = (getattr(argument, "base", argument) for argument in self.arguments.values())
        return next(argument for argument in unwrapped if isinstance(argument, Tensor))

    def start(self) -> None:
        """Start the kernel on the device that its tensors lie on. Triton by itself takes the current one, which may be another."""
        if 0 not in self.grid:
            with torch.cuda.device_of(self.tensor), INTERPRETER if interpreting() else nullcontext():
                self.kernel[self.grid](**self.triton_arguments, **self.compile_options)
