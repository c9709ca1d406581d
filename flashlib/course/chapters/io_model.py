"""The IO of attention on the two-level machine: counted on running code, to be held against the theory.

Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), theorem 2: with sequence length N, head dimension d and a fast memory of
M numbers, ``d <= M <= N d``, standard attention makes ``Theta(N d + N^2)`` accesses to slow memory, and FlashAttention
``Theta(N^2 d^2 / M)``. The statement is about one head, and N d, N^2 and M count numbers, not bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from flashlib.measure.counting.meter import MadeTensor, TrafficMeter

__all__ = ["Traffic", "count_traffic", "fit_exponent", "standard_attention", "tile_machine"]


def standard_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Algorithm 0 of the FlashAttention paper: S is written and read, P is written and read.

    The scale is taken into q, so that no further pass over the N x N matrices is made; a mask or an LSE would each cost one.

    Args:
        q, k, v: ``[B, H, N, D]``, one dtype.

    Returns:
        ``[B, H, N, D]``.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.softmax(scores, dim=-1) @ v


@dataclass(frozen=True)
class Traffic:
    """What one call of attention on one head moved between slow and fast memory, in bytes, and the memory it took.

    Attributes:
        tokens: N. head_dim: d. itemsize: bytes of a number. fast_memory: M, in bytes.
        read, written: bytes by operand: ``"q"``, ``"k"``, ``"v"``, and ``"made inside"`` for results and intermediates.
        peak_bytes: the most bytes alive at once in tensors made by the call; its output is one of them.
        largest: the largest tensor it made.
    """

    tokens: int
    head_dim: int
    itemsize: int
    fast_memory: int
    read: dict[str, int]
    written: dict[str, int]
    peak_bytes: int
    largest: MadeTensor

    @property
    def bytes(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def operand_bytes(self) -> int:
        """Size of one of Q, K, V, O: ``N d`` numbers."""
        return self.tokens * self.head_dim * self.itemsize

    @property
    def constant(self) -> float:
        """c in: traffic = ``c N^2 d^2 / M``. That the traffic is Theta(N^2 d^2 / M) means that c stays within bounds."""
        numbers, memory = self.bytes / self.itemsize, self.fast_memory / self.itemsize
        return numbers * memory / (self.tokens * self.head_dim) ** 2

    def passes(self, name: str) -> tuple[float, float]:
        """How often an operand's size (``N d`` numbers) was (read, written) under this name."""
        return tuple(moved.get(name, 0) / self.operand_bytes for moved in (self.read, self.written))


def count_traffic(
    method: Callable[[Tensor, Tensor, Tensor], object], q: Tensor, k: Tensor, v: Tensor, *, fast_memory: int
) -> Traffic:
    """Run ``method(q, k, v)`` on the two-level machine of :class:`flashlib.measure.counting.meter.TrafficMeter` and count.

    Args:
        method: attention, called once without gradients.
        q, k, v: ``[1, 1, N, D]``, each with memory of its own.
        fast_memory: M in bytes.

    Raises:
        ValueError: q, k and v are not one head of one shape, or as :class:`flashlib.measure.counting.meter.TrafficMeter`.
    """
    if not q.shape == k.shape == v.shape or q.shape[:2] != (1, 1):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in {"q": q, "k": k, "v": v}.items())
        raise ValueError(f"q, k and v must be one head of one shape, [1, 1, N, D]; got {shapes}")
    with torch.no_grad(), TrafficMeter(fast_memory=fast_memory, q=q, k=k, v=v) as meter:
        out = method(q, k, v)  # kept to the end: what is dropped before it leaves fast memory is never written
    del out
    tokens, head_dim = q.shape[2:]
    return Traffic(
        tokens=tokens,
        head_dim=head_dim,
        itemsize=q.element_size(),
        fast_memory=fast_memory,
        read=dict(meter.bytes_read),
        written=dict(meter.bytes_written),
        peak_bytes=meter.peak_bytes,
        largest=meter.largest,
    )


def tile_machine(block_q: int, block_k: int, head_dim: int, *, itemsize: int = 4) -> int:
    """Bytes of fast memory on which flashlib's row-outer loop works without spilling, with tiles not much wider than high.

    An ideal machine holds five tiles: of Q and O (``block_q * head_dim`` numbers each), of K and V, and of S. Here it has to
    hold ten, because no operation of PyTorch's works in place: beside Q, the accumulator as it was, rescaled, the product to
    be added, and their sum; K, V and a K that the machine cannot know to be done with; the scores, and their exponentials.
    """
    numbers = 5 * block_q * head_dim + 3 * block_k * head_dim + 2 * block_q * block_k
    return numbers * itemsize


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent a of the power law ``y = b x^a`` nearest to the points: the slope of a straight line on log-log axes."""
    return statistics.linear_regression([log(value) for value in x], [log(value) for value in y]).slope
