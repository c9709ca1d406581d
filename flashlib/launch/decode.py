"""From a decoding step to kernel launches: how many splits, which tiles, and the memory in which splits meet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashlib.launch.counters import counters
from flashlib.launch.options import blocks, checked_channels, padded, power_of_two, readable, strides
from flashlib.launch.plans import plan_for
from flashlib.launch.recipes import computed, settled
from flashlib.launch.splits import LEAST_MERGED_IN_KERNEL, MOST_PROGRAMS, fewest_waves, longest_split
from flashlib.launch.start import Launch
from flashlib.launch.tiles import TileConfig, capability_of, multiprocessors

__all__ = [
    "DECODE_TABLE",
    "DecodeOptions",
    "PackedSplits",
    "combine_launch",
    "combine_packed_launch",
    "decode_launches",
    "decode_tiles",
    "launch_decode",
    "tiles_for",
]

LEAST_ROWS = 16  # of a tile of query rows; what the problem does not fill is padding
PACKED_AT_ONCE = (
    8  # splits that one program folds together where rows are packed: pieces of a prefix, of which there are few
)
MERGED_AT_ONCE = 8192  # numbers of the partial outputs that one program holds while it merges

DEEPER_FROM = 4096  # keys of a split
# Requests of one launch: the third dimension of its grid, which takes 65,535. A multiple of 16 keeps what the next one reads aligned.
MOST_REQUESTS = 1 << 15

# By compute capability (major) and padded head_dim, 16-bit inputs: the most rows of a tile, its keys, warps, stages. By what fits: no
# value is spilled, and where head_dim allows two programs share a multiprocessor. benchmarks/tune_decode.py times others.
DECODE_TABLE = {
    9: {64: TileConfig(32, 128, 4, 3), 128: TileConfig(32, 64, 4, 3), 256: TileConfig(16, 64, 4, 3)},
    8: {64: TileConfig(32, 64, 4, 3), 128: TileConfig(16, 32, 4, 3), 256: TileConfig(16, 16, 4, 3)},
}
DECODE_FP32 = TileConfig(16, 16, 4, 1)

IN_A_PAGE, OF_PAGES, ACROSS_PAGES = 0, 1, 2  # as in flashlib.kernels.decode


@dataclass(frozen=True)
class DecodeOptions:
    """What the kernel must know besides q, k and v; as in :func:`flashlib.inference.decode_attention`.

    Attributes:
        lengths: int32 or int64 ``[B]``, or None for a full cache.
        block_table: int32 ``[B, max_pages]``, or None for a contiguous cache.
        left, right: how many keys before and after its own position a row sees; None for no limit.
        num_splits: splits per request and KV head, at most. split_size: keys per split; None to share the tiles evenly.
        fewest_splits: without ``split_size``: a request with fewer keys than the cache has room for is cut into as many splits as keep
            them as short as those of a full cache would be, but not into fewer than this; None for ``num_splits`` always.
        merge_in_kernel: whether the last program to finish merges, or a second kernel.
    """

    lengths: Tensor | None
    block_table: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float
    num_splits: int
    split_size: int | None = None
    merge_in_kernel: bool = True
    precision: str = "ieee"
    fewest_splits: int | None = None

    @classmethod
    def chosen(
        cls, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float, lengths: Tensor | None = None,
        block_table: Tensor | None = None, left: int | None = None, right: int | None = None, num_splits: int = 0,
        split_size: int | None = None, precision: str = "ieee",
    ) -> DecodeOptions:  # fmt: skip
        """The options of a problem, with as many splits as suit it, unless ``num_splits`` or ``split_size`` says how many.

        Raises:
            ValueError: that would be more splits than a launch takes.
        """
        capacity = k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
        visible = most_keys(q.shape[2], capacity, left)
        fewest = num_splits
        if split_size:
            # What a window leaves of the keys may begin and end within a split.
            most = blocks(visible, split_size) + (left is not None)
            num_splits, fewest = max(min(most, blocks(capacity, split_size)), 1), 1
        elif not num_splits:
            tiles = tiles_for(q, v)
            pairs = q.shape[0] * k.shape[1] * blocks(q.shape[1] // k.shape[1] * q.shape[2], tiles.block_m)
            tiles_of_keys = max(blocks(visible, tiles.block_n), 1)
            fewest = computed(fewest_waves, pairs, tiles_of_keys, multiprocessors(q.device))
            small_pages = block_table is not None and k.shape[2] % tiles.block_n != 0
            num_splits = max(fewest, blocks(visible, longest_split(small_pages=small_pages)))
        if num_splits > MOST_PROGRAMS:
            raise ValueError(
                f"a launch takes at most {MOST_PROGRAMS} splits; got {num_splits} (split_size={split_size})"
            )
        keys = split_size or blocks(capacity, num_splits)
        return cls(
            lengths, block_table, left, right, scale, softcap, num_splits, split_size,
            merge_in_kernel=num_splits == 1 or keys >= LEAST_MERGED_IN_KERNEL, precision=precision, fewest_splits=fewest,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """Those of its attributes that are tensors, in order."""
        return [x for x in (self.lengths, self.block_table) if x is not None]

    def with_tensors(self, tensors: Iterable[Tensor]) -> DecodeOptions:
        """The same with other :meth:`tensors`."""
        others = iter(tensors)
        names = ("lengths", "block_table")
        changed: dict[str, Any] = {name: next(others) for name in names if getattr(self, name) is not None}
        return replace(self, **changed) if changed else self

    def key(self) -> tuple:
        """Everything but the :meth:`tensors`, of which it says which there are."""
        return (
            self.lengths is None, self.block_table is None, self.left, self.right, self.scale, self.softcap, self.num_splits,
            self.split_size, self.merge_in_kernel, self.precision, self.fewest_splits,
        )  # fmt: skip

    NUMBERS: ClassVar = ("left", "right", "scale", "softcap", "num_splits", "split_size", "fewest_splits")

    def kind(self) -> tuple:
        """The :meth:`key` without the numbers, of which it says which there are."""
        return (
            self.lengths is None, self.block_table is None, self.left is None, self.right is None, self.split_size is None,
            self.fewest_splits is None, self.merge_in_kernel, self.precision,
        )  # fmt: skip

    def numbers_by_name(self) -> dict[str, float]:
        """Those of :attr:`NUMBERS` that there are."""
        return {name: number for name in self.NUMBERS if (number := getattr(self, name)) is not None}

    def with_numbers(self, numbers: Mapping[str, Any]) -> DecodeOptions:
        """The same with others."""
        return replace(self, **numbers)


def launch_decode(q: Tensor, k: Tensor, v: Tensor, options: DecodeOptions) -> tuple[Tensor, Tensor]:
    """Start the kernels: ``(out, lse)``, ``[B, Hq, Sq, Dv]`` in the dtype of q and fp32 ``[B, Hq, Sq]``."""
    read = [readable(x) for x in (q, k, v)]
    plan = plan_for(best_decode_launches, read, options)
    if plan is not None:
        out, lse = plan.run((*read, *options.tensors()))
        return out, lse
    launches, (out, lse) = best_decode_launches(read[0], read[1], read[2], options)
    for launch in launches:
        launch.start()
    return out.to(q.dtype), lse


def best_decode_launches(
    q: Tensor, k: Tensor, v: Tensor, options: DecodeOptions
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """:func:`decode_launches` with the table's tiles, as :func:`flashlib.launch.plans.plan_for` takes it."""
    launches, out, lse = decode_launches(q, k, v, options)
    return launches, (out, lse)


def decode_launches(
    q: Tensor, k: Tensor, v: Tensor, options: DecodeOptions, *, tiles: TileConfig | None = None
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches, in order, and the ``out`` and ``lse`` that they will write.

    Args:
        tiles: tile sizes; None for the table's.
    """
    q, k, v = (readable(x) for x in (q, k, v))
    batch, q_heads, q_len, _ = q.shape
    out = q.new_empty(batch, q_heads, q_len, v.shape[3])
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    if batch <= MOST_REQUESTS:
        return _decode_launches(q, k, v, out, lse, options, tiles), out, lse
    launches = []
    for first in range(0, batch, MOST_REQUESTS):
        some = slice(first, first + MOST_REQUESTS)
        own = {name: x[some] for name in ("lengths", "block_table") if (x := getattr(options, name)) is not None}
        keys, values = (k[some], v[some]) if options.block_table is None else (k, v)
        launches += _decode_launches(q[some], keys, values, out[some], lse[some], replace(options, **own), tiles)
    return launches, out, lse


def _decode_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: DecodeOptions, tiles: TileConfig | None
) -> list[Launch]:
    """Those of at most :data:`MOST_REQUESTS` requests."""
    from flashlib.kernels.decode import decode_split

    batch, q_heads, q_len, head_dim = q.shape
    _, kv_heads, page_size, v_head_dim = v.shape
    rows = q_heads // kv_heads * q_len
    chosen = tiles or tiles_for(q, v)
    row_blocks = blocks(rows, chosen.block_m)
    table = options.block_table
    capacity = page_size if table is None else table.shape[1] * page_size
    split_size = options.split_size or max(blocks(most_keys(q_len, capacity, options.left), options.num_splits), 1)
    programs = batch * kv_heads * row_blocks * options.num_splits
    tiles = tiles or (deeper(chosen, programs, split_size, q.device) if max(head_dim, v_head_dim) <= 128 else chosen)
    splits_kept = options.num_splits if options.num_splits > 1 or not options.merge_in_kernel else 0
    partial_out = q.new_empty((splits_kept, *out.shape), dtype=torch.float32)
    partial_lse = q.new_empty((splits_kept, *lse.shape), dtype=torch.float32)
    merge_rows = settled(_rows_merged, rows)
    block_d, block_dv = padded(head_dim), padded(v_head_dim)
    arguments = {
        "p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse, "p_partial_out": partial_out, "p_partial_lse": partial_lse,
        "p_arrivals": counters(q, batch * kv_heads * row_blocks) if options.merge_in_kernel else None,
        "p_lengths": options.lengths, "p_table": table, "stride_table": 0 if table is None else table.stride(0),
        "n_pages": None if table is None else k.shape[0],
        **strides(q=q, k=k, v=v),
        "q_heads": q_heads, "q_len": q_len, "row_blocks": row_blocks, "n_rows": batch * q_heads * q_len, "capacity": capacity,
        "fewest_splits": options.fewest_splits or options.num_splits,
        "split_size": split_size,
        "left": options.left or 0, "right": options.right or 0, "scale": options.scale, "softcap": options.softcap,
        "head_dim": head_dim, "v_head_dim": v_head_dim, "CHECK_D": checked_channels(q, k), "CHECK_DV": checked_channels(v),
        "BLOCK_D": block_d, "BLOCK_DV": block_dv, "GROUP_SIZE": q_heads // kv_heads,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "HAS_LEFT": options.left is not None, "HAS_RIGHT": options.right is not None, "SOFTCAP": options.softcap > 0,
        "PAGE_SIZE": 0 if table is None else page_size,
        "TILE": IN_A_PAGE if table is None else tile_in_pages(page_size, tiles.block_n, options.split_size),
        "FIXED_SIZE": options.split_size is not None, "MERGE": options.merge_in_kernel,
        "MERGE_ROWS": merge_rows, "MERGE_SPLITS": merged_at_once(merge_rows, v_head_dim), "PRECISION": options.precision,
    }  # fmt: skip
    grid = (kv_heads * row_blocks, options.num_splits, batch)
    launches = [Launch(decode_split, grid, arguments, tiles)]
    if not options.merge_in_kernel:
        launches.append(combine_launch(partial_out, partial_lse, out, lse))
    return launches


def deeper(tiles: TileConfig, programs: int, split_size: int, device: torch.device) -> TileConfig:
    """The tiles with one more stage of loads where a program with much to read has a multiprocessor for itself.

    126.3 against 129.8 us for 16 requests of 8k keys on an H200. The stages do not change the result's bits, so the batch may decide.
    """
    alone = device.type == "cuda" and programs <= multiprocessors(device) and split_size >= DEEPER_FROM
    return replace(tiles, num_stages=tiles.num_stages + 1) if alone else tiles


def tile_in_pages(page_size: int, block_n: int, split_size: int | None) -> int:
    """How tiles of ``block_n`` keys lie in pages. Those of a split follow one another from where it begins."""
    step = (
        block_n if split_size is None else settled(math.gcd, block_n, split_size)
    )  # every tile begins at a multiple of this
    if page_size % block_n == 0 and step == block_n:
        return IN_A_PAGE
    return OF_PAGES if block_n % page_size == 0 and step % page_size == 0 else ACROSS_PAGES


def most_keys(q_len: int, capacity: int, left: int | None) -> int:
    """How many keys the rows of one request may see, together."""
    return capacity if left is None else min(capacity, left + q_len)


def combine_launch(partial_out: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """The launch that merges fp32 ``[splits, B, Hq, Sq, Dv]`` and ``[splits, B, Hq, Sq]`` into ``out`` and ``lse``; all contiguous."""
    from flashlib.kernels.combine import combine

    rows, v_head_dim = lse.numel(), out.shape[3]
    at_once = 1  # rows of a program: one, so that many programs share the reading
    arguments = {
        **{"p_partial_out": partial_out, "p_partial_lse": partial_lse, "p_out": out, "p_lse": lse},
        **{"n_rows": rows, "n_splits": partial_lse.shape[0], "v_head_dim": v_head_dim},
        **{"ROWS": at_once, "BLOCK_DV": padded(v_head_dim), "SPLITS": merged_at_once(at_once, v_head_dim)},
    }
    return Launch(combine, (blocks(rows, at_once),), arguments)


@dataclass(frozen=True, eq=False)
class PackedSplits:
    """Partial results whose rows are in an order of their own.

    Attributes:
        out: ``[splits, rows, Dv]``, any floating dtype. lse: fp32 ``[splits, rows]``. Both contiguous.
        request, head: steps in rows. Row r of the G * Sq of KV head h of request b is row ``b * request + h * head + r``.
    """

    out: Tensor
    lse: Tensor
    request: int
    head: int


def combine_packed_launch(
    earlier: PackedSplits, later: PackedSplits, out: Tensor, lse: Tensor, kv_heads: int
) -> Launch:
    """The launch that merges two sets of splits, the earlier first, into contiguous ``out`` and ``lse``, ``[B, Hq, Sq, Dv]`` and ``[B, Hq, Sq]``."""
    from flashlib.kernels.combine import combine_packed

    batch, _, _, v_head_dim = out.shape
    arguments = {
        **{"p_earlier_out": earlier.out, "p_earlier_lse": earlier.lse, "p_later_out": later.out, "p_later_lse": later.lse},
        **{"p_out": out, "p_lse": lse, "earlier_rows": earlier.lse.shape[1], "later_rows": later.lse.shape[1]},
        **{"earlier_splits": len(earlier.lse), "later_splits": len(later.lse)},
        **{"earlier_request": earlier.request, "earlier_head": earlier.head},
        **{"later_request": later.request, "later_head": later.head},
        **{"kv_heads": kv_heads, "head_rows": lse.numel() // max(1, batch * kv_heads), "v_head_dim": v_head_dim},
        **{"BLOCK_DV": padded(v_head_dim), "SPLITS": PACKED_AT_ONCE},
    }  # fmt: skip
    return Launch(combine_packed, (lse.numel(),), arguments)


def merged_at_once(rows: int, v_head_dim: int) -> int:
    """How many splits of ``rows`` rows one program folds together. It depends on nothing else, so that no result does."""
    return max(1, min(32, MERGED_AT_ONCE // (rows * padded(v_head_dim))))


def decode_tiles(rows: int, dtype: torch.dtype, head_dim: int, capability: int) -> TileConfig:
    """Tile sizes for ``rows`` query rows per KV head (group times query tokens), from the table.

    Args:
        head_dim: the wider of D and Dv, at most 256.
        capability: the major number of the GPU's compute capability.
    """
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    tiles = DECODE_FP32 if dtype == torch.float32 else DECODE_TABLE[8 if capability < 9 else 9][width]
    return replace(tiles, block_m=max(LEAST_ROWS, min(power_of_two(rows), tiles.block_m)))


def tiles_for(q: Tensor, v: Tensor) -> TileConfig:
    """:func:`decode_tiles` of these queries, and values (or pages of values)."""
    rows = q.shape[1] // v.shape[1] * q.shape[2]
    return settled(_tiles, rows, q.dtype, max(q.shape[3], v.shape[3]), q.device)


def _rows_merged(rows: int) -> int:
    """How many of ``rows`` rows a program merges at a time."""
    return min(LEAST_ROWS, power_of_two(rows))


@cache
def _tiles(rows: int, dtype: torch.dtype, head_dim: int, device: torch.device) -> TileConfig:
    return decode_tiles(rows, dtype, head_dim, capability_of(device))
