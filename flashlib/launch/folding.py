"""What ``vmap`` does to a call of ours: the mapped dimension becomes part of the batch. And what autograd keeps of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["folded", "folded_numbers", "restored_numbers", "saved_numbers"]


def folded(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """``[B, ...]`` of each of ``size`` problems as one batch of ``size * B``."""
    return [
        None if x is None else _mapped_first(size, dim, x).flatten(0, 1)
        for dim, x in zip(in_dims, tensors, strict=True)
    ]


def _mapped_first(size: int, dim: int | None, x: Tensor) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def folded_numbers(size: int, batch: int, in_dims: tuple[int | None, ...], numbers: tuple) -> list:
    """The numbers of one batch of ``size * batch``. What all entries share stays shared."""
    *rest, seed = numbers
    if in_dims[-1] is not None:
        raise ValueError("dropout under vmap needs randomness='same': one seed serves all of a batch")
    together = []
    for dim, x in zip(in_dims, rest, strict=False):
        if isinstance(x, Tensor) and (dim is not None or x.shape[0] != 1):
            x = _mapped_first(size, dim, x)
            x = x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)
        together.append(x)
    return [*together, seed]


def saved_numbers(ctx: Any, numbers: Sequence) -> list[Tensor]:
    """Those of ``numbers`` that are tensors, for ``ctx.save_for_backward``; ``ctx`` is told the others."""
    ctx.tensors_at = [at for at, x in enumerate(numbers) if isinstance(x, Tensor)]
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in numbers]
    return [numbers[at] for at in ctx.tensors_at]


def restored_numbers(ctx: Any, tensors: Sequence[Tensor]) -> list:
    """The numbers again, from what :func:`saved_numbers` gave and left."""
    numbers = list(ctx.numbers)
    for at, tensor in zip(ctx.tensors_at, tensors, strict=True):
        numbers[at] = tensor
    return numbers
