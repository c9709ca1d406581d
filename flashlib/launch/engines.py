"""What computes a forward and a backward pass from tensors and plain numbers: the tiled algorithm, and our kernels for GPUs and for processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from flashlib.spec import AttentionSpec
from flashlib.tiled import Tiling, tiled_backward, tiled_forward, tiled_jvp

__all__ = ["CPUEngine", "Engine", "TiledEngine", "TritonEngine", "engine_named", "name_of", "no_second_derivative"]


class Engine(Protocol):
    """How a checked problem is computed. ``str(engine)`` says its name and its settings; :func:`engine_named` reads them back."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, numbers: Sequence) -> tuple[Tensor, Tensor]:
        """``(out, lse)``; numbers as :meth:`flashlib.AttentionSpec.numbers`."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
        numbers: Sequence,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """``(dq, dk, dv)``."""

    def empty_results(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` as :meth:`forward` would return them, not filled in."""


@dataclass(frozen=True)
class TiledEngine:
    """FlashAttention in plain PyTorch (:mod:`flashlib.tiled`)."""

    tiling: Tiling

    def __str__(self) -> str:
        return f"tiled {self.tiling.block_q} {self.tiling.block_k} {self.tiling.loop_order}"

    @classmethod
    def from_words(cls, block_q: str, block_k: str, loop_order: str) -> TiledEngine:
        return cls(Tiling(int(block_q), int(block_k), loop_order))

    def forward(self, q, k, v, numbers):
        return tiled_forward(q, k, v, AttentionSpec.from_numbers(q, k, v, *numbers), self.tiling)

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, numbers):
        spec = AttentionSpec.from_numbers(q, k, v, *numbers)
        return tiled_backward(q, k, v, out, lse, grad_out, grad_lse, spec, self.tiling)

    def jvp(self, q, k, v, out, lse, tangents, numbers):
        return tiled_jvp(q, k, v, out, lse, tangents, AttentionSpec.from_numbers(q, k, v, *numbers), self.tiling)

    def empty_results(self, q, v):
        shape = *q.shape[:3], v.shape[3]
        return q.new_empty(shape), q.new_empty(shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@dataclass(frozen=True)
class TritonEngine:
    """Our Triton and Gluon kernels (:mod:`flashlib.kernels`); settings as :class:`flashlib.config.TritonConfig`."""

    precision: str
    autotune: str

    def __str__(self) -> str:
        return f"triton {self.precision} {self.autotune}"

    @classmethod
    def from_words(cls, precision: str, autotune: str) -> TritonEngine:
        return cls(precision, autotune)

    def forward(self, q, k, v, numbers):
        from flashlib.launch.run import launch_forward

        return launch_forward(q, k, v, self._options(numbers))

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, numbers):
        from flashlib.launch.run import launch_backward

        return launch_backward(q, k, v, out, lse, grad_out, grad_lse, self._options(numbers))

    def empty_results(self, q, v):
        from flashlib.launch.options import empty_results

        return empty_results(q, v)

    def _options(self, numbers):
        if any(isinstance(x, Tensor) for x in numbers):
            return _options_of(*numbers, self.precision, self.autotune)
        return _same_options(*numbers, self.precision, self.autotune)


def _options_of(*numbers_and_settings):
    from flashlib.launch.options import KernelOptions

    return KernelOptions.from_numbers(*numbers_and_settings)


_same_options = lru_cache(maxsize=256)(_options_of)


@dataclass(frozen=True)
class CPUEngine:
    """Our kernels for processors (:mod:`flashlib.kernels.cpu`)."""

    def __str__(self) -> str:
        return "cpu"

    @classmethod
    def from_words(cls) -> CPUEngine:
        return cls()

    def forward(self, q, k, v, numbers):
        from flashlib.launch.cpu import operators
        from flashlib.launch.options import KernelOptions

        return operators.run_forward(q, k, v, KernelOptions.from_numbers(*numbers), operators.library())

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, numbers):
        from flashlib.launch.cpu import operators
        from flashlib.launch.options import KernelOptions

        options = KernelOptions.from_numbers(*numbers)
        return operators.run_backward(q, k, v, out, lse, grad_out, grad_lse, options, operators.library())

    def empty_results(self, q, v):
        from flashlib.launch.options import empty_results

        return empty_results(q, v)


_ENGINES: dict[str, Any] = {"tiled": TiledEngine, "triton": TritonEngine, "cpu": CPUEngine}


@cache
def engine_named(words: str) -> Engine:
    """The engine of which ``words`` is the ``str``: operators take no other arguments than numbers, tensors and text."""
    name, *settings = words.split()
    return _ENGINES[name].from_words(*settings)


def name_of(engine: Engine) -> str:
    return str(engine).split()[0]


def no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} attention has no second derivative; the backends 'reference' and 'torch_sdpa_math' have one"
    )
