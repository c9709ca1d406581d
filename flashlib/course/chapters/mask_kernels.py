"""What chapter 08 asks of the forward kernel: which tiles it visits, in which order, and what NaN in a tile does to it.

In Triton's interpreter: set ``TRITON_INTERPRET=1`` before triton is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashlib.kernels.common import key_ranges, place, visits
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import forward_launch
from flashlib.launch.tiles import TileConfig
from flashlib.masks import Mask, RowIntervals
from flashlib.spec import AttentionSpec

__all__ = ["Visits", "forward", "poisoned_blocks", "visits_of"]


@dataclass(frozen=True)
class Visits:
    """What one program of the forward does with the tiles of keys.

    Attributes:
        first, full_first, full_last, last: keys, as `flashlib.kernels.common.key_ranges` returns them.
        full, partial: the tiles it visits in the loop without a mask, then in the one with it, in order.
    """

    first: int
    full_first: int
    full_last: int
    last: int
    full: tuple[int, ...]
    partial: tuple[int, ...]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, tiles: TileConfig) -> tuple[Tensor, Tensor]:
    """The library's forward kernel with tile sizes of your choice: ``out`` and ``lse``, as `flashlib.attention` returns them."""
    options = KernelOptions.from_spec(AttentionSpec.from_tensors(q, k, v, mask=mask))
    launch, out, lse = forward_launch(q, k, v, options, tiles=tiles)
    launch.start()
    return out, lse


def poisoned_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, tiles: TileConfig) -> Tensor:
    """Which blocks of rows notice NaN in which tile of keys: bool ``[row blocks, key tiles]``.

    K and V of one tile after the other are NaN, and a block has noticed if a row of its output is not finite.

    Args:
        q, k, v: of one batch entry and one head.
    """
    noticed = []
    for at in range(0, k.shape[2], tiles.block_n):
        poisoned = [x.clone() for x in (k, v)]
        for x in poisoned:
            x[:, :, at : at + tiles.block_n] = float("nan")
        out, _ = forward(q, *poisoned, mask, tiles)
        rows = ~out[0, 0].isfinite().all(-1)
        noticed.append(torch.stack([block.any() for block in rows.split(tiles.block_m)]))
    return torch.stack(noticed, 1)


def visits_of(intervals: RowIntervals, block_m: int, block_n: int) -> list[Visits]:
    """What each program of the first batch entry visits, found by the kernel's own `key_ranges`, `visits` and `place`."""
    q_len, kv_len = intervals.q_len, intervals.kv_len
    programs, most = triton.cdiv(q_len, block_m), triton.cdiv(kv_len, block_n)
    start, stop = (x[0].to(torch.int32).contiguous() for x in (intervals.start, intervals.stop))
    ranges = torch.zeros(programs, 4, dtype=torch.int32)
    order = torch.full((2, programs, most), -1, dtype=torch.int32)
    visits_kernel[(programs,)](start, stop, ranges, order[0], order[1], q_len, kv_len, most, block_m, block_n)
    full, partial = ([tuple(n for n in row if n >= 0) for row in kind.tolist()] for kind in order)
    return [Visits(*bounds, *loops) for bounds, *loops in zip(ranges.tolist(), full, partial, strict=True)]


@triton.jit
def visits_kernel(
    p_start, p_stop, p_ranges, p_full, p_partial, q_len, kv_len, most, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    i_m = tl.program_id(0)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_m < q_len
    start, stop = tl.load(p_start + o_m, mask=m_rows, other=0), tl.load(p_stop + o_m, mask=m_rows, other=0)
    ranges = key_ranges(start, stop, m_rows, kv_len, BLOCK_N)
    tl.store(p_ranges + 4 * i_m, ranges.first)
    tl.store(p_ranges + 4 * i_m + 1, ranges.full_first)
    tl.store(p_ranges + 4 * i_m + 2, ranges.full_last)
    tl.store(p_ranges + 4 * i_m + 3, ranges.last)
    from_key, to_key = visits(ranges, False)
    for at in range(from_key, to_key, BLOCK_N):
        n = place(at, ranges, False)
        tl.store(p_full + i_m * most + (at - from_key) // BLOCK_N, n // BLOCK_N)
    from_key, to_key = visits(ranges, True)
    for at in range(from_key, to_key, BLOCK_N):
        n = place(at, ranges, True)
        tl.store(p_partial + i_m * most + (at - from_key) // BLOCK_N, n // BLOCK_N)
