"""Partial attention results and how two of them become one.

Attention over a set of keys can be computed piece by piece if each piece remembers one number per row beside its output:
the log-sum-exp of its scores. That pair is a :class:`Partial`. Merging is associative and commutative and has an identity,
so pieces may be tiles of one loop, splits of a cache, an injected memory or the blocks of a ring of GPUs: it is one algebra.

With row scores ``s_a`` over the keys of piece a::

    lse_a = log sum_j exp(s_a[j])          out_a = sum_j exp(s_a[j] - lse_a) v_a[j]
    lse   = log(exp(lse_a) + exp(lse_b))   out   = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), section 3.1, for the softmax statistics; Rabe and Staats 2021
(arXiv 2112.05682), section 2, for carrying the output along.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

__all__ = ["Partial", "fold", "merge", "merge_sinks"]


@dataclass(frozen=True, eq=False)
class Partial:
    """Attention over some of the keys.

    Attributes:
        out: ``[..., Dv]``, normalized over the piece's own keys.
        lse: ``[...]``, natural logarithm of the sum of exponentials of the piece's scores. ``-inf`` says that the piece had
            no visible key: ``out`` is then not looked at, even if it holds NaN. ``+inf`` says that a score overflowed.
    """

    out: Tensor
    lse: Tensor

    def __post_init__(self):
        if not (self.out.is_floating_point() and self.lse.is_floating_point()):
            raise TypeError(f"out and lse must be floating point; got {self.out.dtype} and {self.lse.dtype}")
        if self.out.shape[:-1] != self.lse.shape or self.out.dim() == 0:
            raise ValueError(
                f"out has shape {tuple(self.out.shape)} and lse {tuple(self.lse.shape)}; expected out [..., Dv] and lse [...]"
            )

    @classmethod
    def identity(
        cls, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Partial:
        """What attention over no keys gives, for an output of ``shape`` ``[..., Dv]``: 0, with LSE -inf."""
        return cls(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.full(shape[:-1], float("-inf"), dtype=dtype, device=device),
        )

    def merge(self, other: Partial) -> Partial:
        """Attention over the keys of both pieces. See :func:`merge`."""
        return merge(self, other)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of ``a`` and ``b`` together, from the two results alone.

    Associative and commutative (up to rounding), with :meth:`Partial.identity` as identity, exactly. A piece whose LSE is
    -inf contributes nothing. If one LSE is +inf, that piece outweighs every finite one; if both are, their ratio cannot be
    known and the row is NaN. Differentiable in all four tensors.

    Raises:
        ValueError: the shapes differ.
    """
    if a.out.shape != b.out.shape:
        raise ValueError(
            f"cannot merge outputs of shapes {tuple(a.out.shape)} and {tuple(b.out.shape)}; they must be equal"
        )
    pivot = torch.maximum(a.lse, b.lse).detach()
    weight_a, weight_b = _weight(a.lse, pivot), _weight(b.lse, pivot)
    total = weight_a + weight_b
    nothing_seen = total == 0
    safe_total = torch.where(nothing_seen, 1.0, total)
    out = _weighted(weight_a / safe_total, a.out) + _weighted(weight_b / safe_total, b.out)
    lse = torch.where(nothing_seen, float("-inf"), safe_total.log() + pivot)
    both_overflowed = (a.lse == float("inf")) & (b.lse == float("inf"))
    return Partial(out.masked_fill(both_overflowed[..., None], float("nan")), lse)


def fold(partials: Iterable[Partial]) -> Partial:
    """Merge pieces from first to last. The order is fixed, so the result is the same bits every time.

    Raises:
        ValueError: there is no piece (use :meth:`Partial.identity`, which knows the shape).
    """
    partials = list(partials)
    if not partials:
        raise ValueError("fold needs at least one Partial; start from Partial.identity(...) for a fold over nothing")
    return reduce(merge, partials)


def merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a sink for each head, from attention without: a sink is a piece whose only key has the score ``sinks[h]`` and the value 0.

    Args:
        out: ``[B, Hq, Sq, Dv]``. lse: ``[B, Hq, Sq]``. sinks: ``[Hq]``.

    Returns:
        out, in its own dtype, and the LSE. Differentiable in all three.

    Raises:
        ValueError: sinks is not one score for each head.
    """
    if sinks.shape != lse.shape[1:2]:
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}; expected {tuple(lse.shape[1:2])}, one score per query head"
        )
    alone = sinks.to(lse.dtype)[None, :, None].expand_as(lse)
    whole = merge(Partial(out, lse), Partial(torch.zeros_like(out), alone))
    return whole.out.to(out.dtype), whole.lse


def _weight(lse: Tensor, pivot: Tensor) -> Tensor:
    """``exp(lse - pivot)``, with the differences of equal infinities replaced by their limits, also in the gradient."""
    at_pivot_infinity = torch.isinf(pivot)
    finite_difference = torch.where(at_pivot_infinity, 0.0, lse) - torch.where(at_pivot_infinity, 0.0, pivot)
    limit = ((lse == pivot) & (pivot > 0)).to(lse.dtype)
    return torch.where(at_pivot_infinity, limit, finite_difference.exp())


def _weighted(weight: Tensor, out: Tensor) -> Tensor:
    """``weight * out`` where a weight of 0 hides whatever the output holds."""
    return weight[..., None] * torch.where(weight[..., None] == 0, 0.0, out)
