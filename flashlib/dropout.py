"""Dropout of attention weights by a counter: whether a pair is kept depends on its place and on a seed, and on nothing that came before.

So the backward pass finds out again what the forward pass dropped without a stored mask, every backend drops the same pairs, and the order in which
tiles are visited does not matter. The numbers are those of Philox 4x32 with 10 rounds, which CUDA and Triton use too. The counter of row i and key j
of query head h of batch entry b is ``(j // 4, i, b * Hq + h, 0)``, and the pair gets number ``j % 4`` of the four that come out.

Sources: Srivastava et al. 2014, Dropout; Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (section 4.3, Philox).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_factors", "threshold"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, int64 ``[1]``: ``torch.manual_seed`` decides it, and a CUDA graph draws a new one each time."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """A pair is dropped if its number, 0 to 2^32 - 1, is below this."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def keep_factors(
    seed: Tensor, dropout_p: float, batch: int, q_heads: int, rows: slice, keys: slice, dtype: torch.dtype
) -> Tensor:
    """What each attention weight of a tile is multiplied by: 0 where it is dropped, else ``1 / (1 - dropout_p)``.

    Args:
        seed: int64 ``[1]``, from :func:`draw_seed`.
        dropout_p: the share that is dropped, at least 0 and below 1.

    Returns:
        ``[batch, q_heads, rows, keys]`` of ``dtype``.
    """
    device = seed.device
    head = torch.arange(batch * q_heads, device=device)[:, None, None]
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    first, last = keys.start // 4, -(-keys.stop // 4)
    quad = torch.arange(first, last, device=device)
    numbers = torch.stack(_philox(seed, quad, row, head), dim=-1).flatten(-2)
    kept = numbers[..., keys.start - 4 * first : keys.stop - 4 * first] >= threshold(dropout_p)
    return (kept.to(dtype) / (1.0 - dropout_p)).view(batch, q_heads, rows.stop - rows.start, keys.stop - keys.start)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 of the counters (c0, c1, c2, 0), broadcast: four tensors of 32-bit numbers in int64."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the product of two 32-bit numbers; in halves, since int64 holds only 63 of its bits."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
