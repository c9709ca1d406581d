"""Our two implementations, the tiled algorithm and the kernels, as autograd, torch.func, torch.compile and torch.export see them.

An engine computes a forward and a backward pass from tensors and plain numbers. Around it stand, once for both:

* in eager mode one ``torch.autograd.Function``, which knows backward, forward mode (where the engine does), and ``vmap``: the mapped dimension
  becomes part of the batch;
* under a tracer, or for tensors without data, one operator (:mod:`flashlib.launch.operators`), which a graph can hold and which says the shapes of its results.

A second derivative is refused in plain words where somebody asks for it, and not before: ``create_graph=True`` alone is no reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from flashlib.autocast import autocast_off
from flashlib.spec import AttentionSpec
from flashlib.tiled import Tiling, tiled_backward, tiled_forward, tiled_jvp
from flashlib.values import has_data

__all__ = ["Engine", "TiledEngine", "TritonEngine", "engine_named", "refuse_second_derivative", "run_engine"]


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
        from flashlib.launch.options import KernelOptions

        return KernelOptions.from_numbers(*numbers, self.precision, self.autotune)


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


def run_engine(engine: Engine, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a checked problem, on the autograd graph."""
    numbers = spec.numbers()
    with autocast_off(spec.device):
        if not has_data(q, k, v):
            if spec.has_tangents:
                raise NotImplementedError(
                    f"a forward-mode derivative cannot be traced through {_name(engine)} attention; {_FORWARD_MODE}"
                )
            from flashlib.launch.operators import attention_forward  # registering operators imports PyTorch's compiler

            return attention_forward(q, k, v, *numbers, str(engine))
        return _Attention.apply(q, k, v, engine, *numbers)


class _Attention(torch.autograd.Function):
    """``(q, k, v, engine, *numbers) -> (out, lse)``; numbers as :meth:`flashlib.AttentionSpec.numbers`."""

    @staticmethod
    def forward(q, k, v, engine, *numbers):
        return engine.forward(q, k, v, numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, ctx.engine, *numbers = inputs
        ctx.tensors_at = [at for at, x in enumerate(numbers) if isinstance(x, Tensor)]
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in numbers]
        tensors = (q, k, v, *output, *(numbers[at] for at in ctx.tensors_at))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, numbers = _restored(ctx)
        nothing = (None,) * (1 + len(numbers))
        if grad_out is None and grad_lse is None:
            return None, None, None, *nothing
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return *differentiable_gradients(q, k, v, out, lse, grad_out, grad_lse, ctx.engine, tuple(numbers)), *nothing

    @staticmethod
    def jvp(ctx, dq, dk, dv, *_):
        q, k, v, out, lse, numbers = _restored(ctx)
        jvp = getattr(ctx.engine, "jvp", None)
        if jvp is None:
            raise NotImplementedError(f"{_name(ctx.engine)} attention has no forward-mode derivative; {_FORWARD_MODE}")
        return jvp(q, k, v, out, lse, (dq, dk, dv), numbers)

    @staticmethod
    def vmap(info, in_dims, q, k, v, engine, *numbers):
        folded = _folded(info.batch_size, in_dims[:3], (q, k, v))
        batch = folded[0].shape[0] // info.batch_size
        results = _Attention.apply(*folded, engine, *_folded_numbers(info.batch_size, batch, in_dims[4:], numbers))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)


class _Gradients(torch.autograd.Function):
    """``(q, k, v, out, lse, grad_out, grad_lse, engine, *numbers) -> (dq, dk, dv)``."""

    @staticmethod
    def forward(q, k, v, out, lse, grad_out, grad_lse, engine, *numbers):
        return engine.backward(q, k, v, out, lse, grad_out, grad_lse, numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.engine = inputs[7]

    @staticmethod
    def backward(ctx, *_):
        raise no_second_derivative(_name(ctx.engine))

    @staticmethod
    def jvp(ctx, *_):
        raise no_second_derivative(_name(ctx.engine))

    @staticmethod
    def vmap(info, in_dims, q, k, v, out, lse, grad_out, grad_lse, engine, *numbers):
        folded = _folded(info.batch_size, in_dims[:7], (q, k, v, out, lse, grad_out, grad_lse))
        batch = folded[0].shape[0] // info.batch_size
        results = _Gradients.apply(*folded, engine, *_folded_numbers(info.batch_size, batch, in_dims[8:], numbers))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)


def differentiable_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, engine: Engine, numbers: tuple,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dq, dk, dv)`` as a node of its own, which knows ``vmap`` and refuses to be differentiated; ``numbers`` as of the forward."""
    with autocast_off(q.device):
        return _Gradients.apply(q, k, v, out, lse, grad_out, grad_lse, engine, *numbers)


_FORWARD_MODE = "the backends 'tiled', 'reference' and 'torch_sdpa_math' have one"


def no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} attention has no second derivative; the backends 'reference' and 'torch_sdpa_math' have one"
    )


def _name(engine: Engine) -> str:
    return str(engine).split()[0]


def _restored(ctx) -> tuple:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    numbers = list(ctx.numbers)
    for at, tensor in zip(ctx.tensors_at, tensors, strict=True):
        numbers[at] = tensor
    return q, k, v, out, lse, numbers


def _folded(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """``[B, ...]`` of each of ``size`` problems as one batch of ``size * B``."""
    return [
        None if x is None else _mapped_first(size, dim, x).flatten(0, 1)
        for dim, x in zip(in_dims, tensors, strict=True)
    ]


def _mapped_first(size: int, dim: int | None, x: Tensor) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _folded_numbers(size: int, batch: int, in_dims: tuple[int | None, ...], numbers: tuple) -> list:
    """The numbers of one batch of ``size * batch``. What all entries share stays shared."""
    *rest, seed = numbers
    if in_dims[-1] is not None:
        raise ValueError("dropout under vmap needs randomness='same': one seed serves all of a batch")
    folded = []
    for dim, x in zip(in_dims, rest, strict=False):
        if isinstance(x, Tensor) and (dim is not None or x.shape[0] != 1):
            x = _mapped_first(size, dim, x)
            x = x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)
        folded.append(x)
    return [*folded, seed]


def refuse_second_derivative(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, whose gradients say in our words that they cannot be differentiated again: for kernels that are not ours.

    What torch.compile has compiled cannot be differentiated twice whatever it is, and says so itself.
    """
    if torch.compiler.is_compiling():
        return tensors
    return tuple(_Once.apply(x, name) if x.requires_grad else x for x in tensors)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, name):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _OnceGradient.apply(grad, ctx.name), None


class _OnceGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, name):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, _):
        raise no_second_derivative(ctx.name)
