"""Our kernels as they launch: which programs there are, in which order, how many tiles each visits, and what all of them do.

The choices below, tile sizes, orders and numbers of splits, are those of :mod:`flashlib.launch` and
:mod:`flashlib.inference.decode`, repeated here so that asking for a cost brings neither PyTorch nor Triton. A test holds the two
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from flashlib.cost.counts import BYTES, FP32, Problem, Work
from flashlib.cost.devices import Device
from flashlib.cost.visible import BlockTiles, Visible, checked_count

__all__ = [
    "Launch",
    "Tiles",
    "backward_launches",
    "decode_launches",
    "forward_launches",
    "num_splits",
    "shared_prefix_launches",
]

Programs = list[tuple[int, int]]  # in the order of their start: tiles, and how many programs in a row have so many
Parts = list[tuple[Programs, int]]  # and how often that comes again


@dataclass(frozen=True)
class Tiles:
    """A tile: rows, keys."""

    block_m: int
    block_n: int


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        kernel: its name.
        parts: tiles that each program visits, in the order in which they start: lists of (tiles, how many programs in a row), each with
            how often it comes again.
        tile: products, exponentials and bytes asked of the cache for one whole tile, padding included.
        work: all that the kernel does, padding included; bytes are what it asks of the cache.
        memory: bytes that come from memory, or go there, if the cache keeps what programs that are at work share.
        shared: bytes that it would have to keep for that, until the last wave of programs has passed; 0 if no wave reads what another did.
        rows: of a tile, where a program's steps follow one another (decoding); else 0.
        paired: two programs share a multiprocessor, and a tile is half of what one program alone would take.
    """

    kernel: str
    parts: Parts
    tile: Work
    work: Work
    memory: float
    shared: float = 0.0
    rows: int = 0
    paired: bool = False

    def read_once(self, gpu: Device) -> bool:
        """Whether the cache keeps what programs share, so that :attr:`memory` is all that crosses memory. If not, it is the least.

        Half of a GPU's cache counts: it has two parts, and what all multiprocessors read lies in both.
        """
        return self.shared <= gpu.cache_bytes / 2

    @property
    def tiles(self) -> int:
        """That all its programs visit."""
        return sum(tiles * count * times for programs, times in self.parts for tiles, count in programs)

    @property
    def memory_written(self) -> float:
        """Of :attr:`memory`, what the kernel writes. When it ends, up to all that the cache holds of it still lies there. Partial results
        that the same kernel reads again never leave the cache."""
        inside = self.work.written.get("partial", 0) if "partial" in self.work.read else 0
        return sum(self.work.written.values()) - inside

    @property
    def memory_read(self) -> float:
        """Of :attr:`memory`, what the kernel reads."""
        return self.memory - self.memory_written

    @property
    def program_count(self) -> int:
        return sum(count * times for programs, times in self.parts for _, count in programs)


# The warp-specialised kernels for Hopper, as in flashlib.launch.tiles and flashlib.launch.hopper.
HOPPER = {64: Tiles(192, 128), 128: Tiles(128, 128)}
HOPPER_ROOMY, HOPPER_NARROW, HOPPER_LEAST_KEYS = Tiles(128, 128), Tiles(128, 64), 1024
HOPPER_BACKWARD = {64: Tiles(128, 128), 128: Tiles(64, 128)}
HOPPER_BACKWARD_ROOMY = {64: Tiles(64, 128), 128: Tiles(32, 128)}
HOPPER_BACKWARD_PAIRED, HOPPER_BACKWARD_LEAST_KEYS = Tiles(64, 64), 800
HOPPER_DQ = {64: Tiles(64, 64), 128: Tiles(128, 64)}
HOPPER_CACHE, HOPPER_SPREAD, BACKWARD_SPREAD = 8 << 20, 3.5, 2
PAIR_CHANNELS_PER_NS, PART_BYTES_PER_NS, SUM_NS = 1200, 3500, 3000
MOST_PARTS, MOST_PART_WAVES, SUMMED_KEYS = 8, 8, 16
# The plain ones, as in flashlib.launch.tiles: by major compute capability, kernel and widest head_dim.
TABLE = {
    9: {
        "forward": {64: Tiles(128, 64), 128: Tiles(128, 128), 256: Tiles(128, 64)},
        "dkdv": {64: Tiles(64, 64), 128: Tiles(64, 128), 256: Tiles(32, 64)},
        "dq": {64: Tiles(64, 64), 128: Tiles(128, 64), 256: Tiles(128, 32)},
    },
    8: {
        "forward": {64: Tiles(128, 64), 128: Tiles(128, 64), 256: Tiles(64, 64)},
        "dkdv": {64: Tiles(64, 64), 128: Tiles(64, 64), 256: Tiles(16, 64)},
        "dq": {64: Tiles(64, 64), 128: Tiles(64, 32), 256: Tiles(64, 16)},
    },
}
CROWDED = {
    9: {"dkdv": {128: Tiles(64, 64), 256: Tiles(16, 64)}},
    8: {"forward": {64: Tiles(128, 32), 128: Tiles(128, 32)}, "dkdv": {64: Tiles(32, 64), 128: Tiles(32, 64)}},
}
TABLE_FP32 = {
    "forward": {64: Tiles(32, 32), 128: Tiles(16, 32), 256: Tiles(16, 16)},
    "dkdv": {64: Tiles(32, 32), 128: Tiles(16, 32), 256: Tiles(16, 16)},
    "dq": {64: Tiles(32, 32), 128: Tiles(32, 16), 256: Tiles(16, 16)},
}
DECODE_TABLE = {
    9: {64: Tiles(32, 128), 128: Tiles(32, 64), 256: Tiles(16, 64)},
    8: {64: Tiles(32, 64), 128: Tiles(16, 32), 256: Tiles(16, 16)},
}
DECODE_FP32 = Tiles(16, 16)
ROW_PADDING = 128
# Of flashlib.inference.decode.
SPLIT_COST, MOST_SPLITS, LONGEST_SPLIT, LONGEST_SPLIT_OF_SMALL_PAGES, LEAST_MERGED_IN_KERNEL = 2, 256, 8192, 4096, 1024


def forward_launches(problem: Problem, gpu: Device) -> list[Launch]:
    """The forward of ``attention(...)`` on this GPU: one kernel, and before it what it needs prepared.

    Raises:
        ValueError: our kernels do not run the problem there.
    """
    _check(problem, gpu)
    hopper = _hopper_runs(problem, gpu)
    tiles = forward_tiles(problem, gpu)
    entries = [(_given(mask, hopper), count) for mask, count in problem.entries()]
    block_d, block_dv = (_padded(d, 64 if hopper else 16) for d in (problem.head_dim, problem.v_head_dim))
    area = tiles.block_m * tiles.block_n
    tile = Work(2 * (block_d + block_dv) * area, area * (1 + problem.softcap), 4 * area)
    by_entry = [(mask.by_rows(tiles.block_m, tiles.block_n), count) for mask, count in entries]
    work, memory = Work(), 0.0
    for (mask, count), (blocks, _) in zip(entries, by_entry, strict=True):
        of_head = _passing_keys(problem, mask, blocks, tiles.block_n, whole=hopper)
        rows = mask.q_len * problem.itemsize
        of_head += Work(read={"q": rows * problem.head_dim}, written={"out": rows * problem.v_head_dim})
        of_head += Work(written={"lse": mask.q_len * FP32})
        if mask.widths is None:
            of_head += Work(read={"intervals": 2 * 4 * mask.q_len})
        work += (of_head + tile * _visited(blocks, hopper)) * (count * problem.q_heads)
        memory += _from_memory(problem, mask) * count
    heads = problem.batch * problem.q_heads
    row_blocks = -(-problem.q_len // tiles.block_m)
    together = (
        _heads_together(problem, heads, row_blocks, gpu.units, _bytes_per_head(problem), HOPPER_SPREAD) if hopper else 1
    )
    order = _by_rows(by_entry, problem.q_heads, together, hopper)
    shared = _shared_keys(problem, together) if row_blocks * together > gpu.units else 0.0
    if not hopper:
        return [Launch("attention_forward", order, tile, work, memory, shared)]
    # The counter that hands out blocks of rows is zeroed first.
    before = [Launch("fill", [([(0, 1)], 1)], Work(), Work(), 0.0), *([_prepare(problem)] * _by_row(problem))]
    return [*before, Launch("hopper_forward", order, tile, work, memory, shared)]


def backward_launches(problem: Problem, gpu: Device) -> list[Launch]:
    """The backward: delta, then dK and dV, then dQ; if the mask is given row by row, what looks it up beforehand; and if the query heads of
    a KV head are cut into parts, what adds them up.

    Raises:
        ValueError: our kernels do not run the problem there.
    """
    _check(problem, gpu)
    hopper = _hopper_runs(problem, gpu)
    d, dv, size = problem.head_dim, problem.v_head_dim, problem.itemsize
    block_d, block_dv = (_padded(x, 64 if hopper else 16) for x in (d, dv))
    heads = problem.batch * problem.q_heads
    padded_rows = -(-problem.q_len // ROW_PADDING) * ROW_PADDING
    rows = problem.q_len * heads
    delta = Work(
        other=rows * (2 * dv - 1),
        read={"out": rows * dv * size, "grad_out": rows * dv * size, "lse": rows * FP32},
        written={"lse": heads * padded_rows * FP32, "delta": heads * padded_rows * FP32},
    )
    launches = [Launch("backward_delta", [([(0, heads * padded_rows // 64)], 1)], Work(), delta, delta.bytes)]
    by_row = _by_row(problem)
    launches += [Launch("backward_row_ranges", [([(0, 1)], 1)], Work(), Work(), 0.0)] * by_row
    launches += [Launch("hopper_blank_rows", [([(0, 1)], 1)], Work(), Work(), 0.0)] * (by_row and hopper)

    parts = dkdv_parts(problem, gpu)
    tiles = dkdv_tiles(problem, gpu)
    area = tiles.block_m * tiles.block_n
    tile = Work(4 * (block_d + block_dv) * area, area * (1 + problem.softcap), 4 * area)
    by_entry = [(mask.by_keys(tiles.block_m, tiles.block_n), count) for mask, count in problem.entries()]
    work, memory = Work(), 0.0
    for (mask, count), (blocks, _) in zip(problem.entries(), by_entry, strict=True):
        ends = [(block.first * tiles.block_m, block.last * tiles.block_m) for block in blocks]
        # The copy engine brings whole tiles; the plain kernel leaves out rows that see nothing.
        passing = sum(
            min(last, mask.q_len) - first if hopper else mask.rows_seeing(first, last) for first, last in ends
        )
        numbers = sum(last - first for first, last in ends) * FP32
        of_head = Work(read={"q": passing * d * size, "grad_out": passing * dv * size, "lse": numbers, "delta": numbers})  # fmt: skip
        owned = Work(read={"k": mask.kv_len * d * size, "v": mask.kv_len * dv * size})
        gradients = Work(written={"dk": mask.kv_len * d * size, "dv": mask.kv_len * dv * size})
        if parts > 1:
            gradients = Work(written={"partial": _part_bytes(problem, tiles.block_n)})
        work += (of_head + tile * _visited(blocks, False)) * (count * problem.q_heads)
        work += (owned + gradients) * (count * problem.kv_heads * parts)
        least = mask.q_len * ((d + dv) * size + 2 * FP32)
        memory += least * problem.q_heads * count
        memory += (owned.bytes + gradients.bytes * parts) * problem.kv_heads * count
    key_blocks, groups = -(-problem.kv_len // tiles.block_n), problem.kv_heads * parts
    group_bytes = problem.group // parts * problem.q_len * (d + dv) * size
    together = backward_together(problem, problem.batch * groups, key_blocks, gpu, group_bytes)
    group_tiles = [([block.hull * (problem.group // parts) for block in blocks], count) for blocks, count in by_entry]
    order = _side_by_side(group_tiles, groups, together)
    # Blocks of keys begin at rows of their own, so that all rows of a group's heads pass before the last block is done with the first.
    kernel, paired = "hopper_dkdv" if hopper else "backward_dkdv", hopper and tiles == HOPPER_BACKWARD_PAIRED
    launches.append(Launch(kernel, order, tile, work, memory, group_bytes * together, paired=paired))
    if parts > 1:
        keys = problem.batch * problem.kv_heads * problem.kv_len
        summed = Work(
            other=(parts - 1) * keys * (block_d + block_dv),
            read={"partial": parts * keys * (block_d + block_dv) * FP32},
            written={"dk": keys * d * size, "dv": keys * dv * size},
        )
        programs = problem.batch * problem.kv_heads * -(-problem.kv_len // SUMMED_KEYS)
        launches.append(Launch("hopper_sum_parts", [([(0, programs)], 1)], Work(), summed, summed.bytes))

    launches += [_prepare(problem)] * (by_row and hopper)
    tiles = dq_tiles(problem, gpu)
    area = tiles.block_m * tiles.block_n
    tile = Work(2 * (2 * block_d + block_dv) * area, area * (1 + problem.softcap), 4 * area)
    entries = [(_given(mask, hopper), count) for mask, count in problem.entries()]
    by_entry = [(mask.by_rows(tiles.block_m, tiles.block_n), count) for mask, count in entries]
    work, memory = Work(), 0.0
    for (mask, count), (blocks, _) in zip(entries, by_entry, strict=True):
        own = mask.q_len * (d + dv) * size, 2 * mask.q_len * FP32
        of_head = _passing_keys(problem, mask, blocks, tiles.block_n, whole=hopper)
        of_head += Work(read={"q": mask.q_len * d * size, "grad_out": mask.q_len * dv * size, "lse": mask.q_len * FP32, "delta": mask.q_len * FP32}, written={"dq": mask.q_len * d * size})  # fmt: skip
        work += (of_head + tile * _visited(blocks, hopper)) * (count * problem.q_heads)
        keys = mask.seen_keys * (d + dv) * problem.kv_itemsize
        memory += ((sum(own) + mask.q_len * d * size) * problem.q_heads + keys * problem.kv_heads) * count
    row_blocks = -(-problem.q_len // tiles.block_m)
    together = backward_together(problem, heads, row_blocks, gpu, _bytes_per_head(problem))
    order = _by_rows(by_entry, problem.q_heads, together, hopper)
    kernel, paired = "hopper_dq" if hopper else "backward_dq", hopper and tiles == HOPPER_DQ[64]
    launches.append(Launch(kernel, order, tile, work, memory, _shared_keys(problem, together), paired=paired))
    return launches


def decode_launches(
    problem: Problem, gpu: Device, *, lengths: Sequence[int] | None = None, page_size: int | None = None,
    capacity: int | None = None, splits: int = 0,
) -> list[Launch]:  # fmt: skip
    """``decode_attention(...)``: a few new tokens of each request against its cache, the keys cut into splits, the splits merged.

    Args:
        problem: ``q_len`` new tokens; ``kv_len`` and the mask are looked at for a window only.
        lengths: keys of each request, new ones included; None for ``kv_len`` each.
        page_size: of a paged cache, whose tables are read too; None for a contiguous one.
        capacity: keys that a request has room for; None for ``kv_len``.
        splits: of each request; 0 for as many as :func:`num_splits` says.

    Raises:
        ValueError: our kernels do not run the problem there, or a length does not fit.
    """
    _check(problem, gpu)
    capacity = problem.kv_len if capacity is None else capacity
    lengths = [problem.kv_len] * problem.batch if lengths is None else list(lengths)
    if len(lengths) != problem.batch:
        raise ValueError(f"lengths must be one for each of the {problem.batch} requests; got {len(lengths)}")
    for length in lengths:
        checked_count("lengths", length, 0)
        if length > capacity:
            raise ValueError(f"lengths must be at most the capacity, {capacity}; got {length}")
    rows = problem.group * problem.q_len
    tiles = decode_tiles(problem, gpu)
    row_blocks = -(-rows // tiles.block_m)
    widths = problem.visible[0].widths
    left = widths[0] if widths else None
    visible = capacity if left is None else min(capacity, left + problem.q_len)
    small_pages = page_size is not None and page_size % tiles.block_n != 0
    fewest = _fewest_waves(problem.batch * problem.kv_heads * row_blocks, visible, gpu.units, tiles.block_n)
    longest = LONGEST_SPLIT_OF_SMALL_PAGES if small_pages else LONGEST_SPLIT
    chosen = splits or max(fewest, -(-visible // longest), 1)
    split_size = max(-(-visible // chosen), 1)
    merged_inside = chosen == 1 or -(-capacity // chosen) >= LEAST_MERGED_IN_KERNEL

    block_d, block_dv = (_padded(d, 16) for d in (problem.head_dim, problem.v_head_dim))
    area = tiles.block_m * tiles.block_n
    key_bytes = (problem.head_dim + problem.v_head_dim) * problem.kv_itemsize
    tile = Work(
        2 * (block_d + block_dv) * area, area * (1 + problem.softcap), 4 * area, {"kv": tiles.block_n * key_bytes}
    )
    programs, keys_read, live_splits, tile_count = [], 0, 0, 0
    for length in lengths:
        seen = length if left is None else min(length, left + problem.q_len)
        # A short request is cut so that its splits are as long as those of a full cache, but into no fewer than fewest.
        live = chosen if splits else min(chosen, max(fewest, -(-seen // split_size), 1))
        all_tiles = -(-seen // tiles.block_n)
        each = -(-all_tiles // live)
        counts = [min(each, max(0, all_tiles - n * each)) for n in range(live)]
        programs += [(count, problem.kv_heads * row_blocks) for count in counts]
        keys_read += seen * row_blocks
        live_splits += live
        tile_count += all_tiles
    query = problem.batch * problem.q_heads * problem.q_len
    partial = live_splits * problem.q_heads * problem.q_len * (problem.v_head_dim + 1) * FP32
    partial = 0 if merged_inside and chosen == 1 else partial
    table = 0 if page_size is None else sum(-(-length // page_size) for length in lengths) * 4 * problem.kv_heads
    out = query * (problem.v_head_dim * problem.itemsize + FP32)
    of_keys = {"k": keys_read * problem.kv_heads * problem.head_dim * problem.kv_itemsize,
               "v": keys_read * problem.kv_heads * problem.v_head_dim * problem.kv_itemsize}  # fmt: skip
    work = tile * (tile_count * problem.kv_heads * row_blocks)
    work = Work(work.products, work.exponentials, work.other)
    work += Work(read={**of_keys, "q": query * problem.head_dim * problem.itemsize, "block_table": table})
    merging = Work(exponentials=partial // FP32 // (problem.v_head_dim + 1), other=2 * partial // FP32, read={"partial": partial})  # fmt: skip
    written = Work(written={"out": out})
    if merged_inside:
        work += written + Work(written={"partial": partial}) + merging
        return [Launch("decode_split", [(programs, 1)], tile, work, work.bytes - 2 * partial, rows=tiles.block_m)]
    split = work + Work(written={"partial": partial})
    combine = merging + written
    return [
        Launch("decode_split", [(programs, 1)], tile, split, split.bytes, rows=tiles.block_m),
        Launch("combine", [([(0, query)], 1)], Work(), combine, combine.bytes),
    ]


def num_splits(batch: int, kv_heads: int, max_length: int, *, units: int, block_n: int, row_blocks: int = 1) -> int:
    """How many splits a request's keys are cut into (:func:`flashlib.inference.choose_num_splits`)."""
    pairs = batch * kv_heads * row_blocks
    return max(_fewest_waves(pairs, max_length, units, block_n), -(-max_length // LONGEST_SPLIT))


@cache
def _fewest_waves(pairs: int, max_length: int, units: int, block_n: int) -> int:
    tiles = max(-(-max_length // block_n), 1)
    return min(
        range(1, min(tiles, MOST_SPLITS) + 1),
        key=lambda splits: -(-pairs * splits // units) * (-(-tiles // splits) + SPLIT_COST),
    )


def forward_tiles(problem: Problem, gpu: Device) -> Tiles:
    """The tile of the forward (``hopper_tiles`` and ``tile_config`` of :mod:`flashlib.launch`)."""
    if not _hopper_runs(problem, gpu):
        return _table("forward", problem, gpu)
    left, by_row = _left(problem), _by_row(problem)
    if _wide(problem) > 64:
        return HOPPER_NARROW if problem.softcap and by_row else HOPPER[128]
    few = left is not None or _keys_per_row(problem) < HOPPER_LEAST_KEYS
    return HOPPER_ROOMY if few or problem.softcap else HOPPER[64]


def dkdv_tiles(problem: Problem, gpu: Device) -> Tiles:
    """The tile of dK and dV."""
    if not _hopper_runs(problem, gpu):
        return _table("dkdv", problem, gpu)
    width = 64 if _wide(problem) <= 64 else 128
    if problem.softcap:
        return HOPPER_BACKWARD_ROOMY[width]
    few = width == 128 or (not _by_row(problem) and _keys_per_row(problem) < HOPPER_BACKWARD_LEAST_KEYS)
    return HOPPER_BACKWARD_PAIRED if few and dkdv_parts(problem, gpu) == 1 else HOPPER_BACKWARD[width]


def dkdv_parts(problem: Problem, gpu: Device) -> int:
    """How many programs share the query heads of a KV head in dK and dV (``group_parts`` of :mod:`flashlib.launch.hopper`)."""
    if not _hopper_runs(problem, gpu) or _by_row(problem):
        return 1
    block_n = HOPPER_BACKWARD[64 if _wide(problem) <= 64 else 128].block_n
    channels = _padded(problem.head_dim, 64) + _padded(problem.v_head_dim, 64)
    heads, group, units = problem.batch * problem.kv_heads, problem.group, gpu.units
    programs = -(-problem.kv_len // block_n) * heads
    left, right = _widths(problem)
    rows = problem.q_len if left is None else min(problem.q_len, left + block_n + (right or 0))
    longest = rows * block_n * group * channels // PAIR_CHANNELS_PER_NS
    mean = problem.q_len * _keys_per_row(problem) * group * heads * channels // (PAIR_CHANNELS_PER_NS * units)
    part_bytes = 2 * 4 * programs * block_n * channels

    def ns(parts: int) -> int:
        work = max(longest // parts, mean) if _unequal(problem) else -(-programs * parts // units) * longest // parts
        return work if parts == 1 else work + part_bytes * parts // PART_BYTES_PER_NS + SUM_NS

    most = min(MOST_PARTS, MOST_PART_WAVES * units // max(1, programs))
    return min([1, *(parts for parts in range(2, most + 1) if group % parts == 0)], key=ns)


def _part_bytes(problem: Problem, block_n: int) -> int:
    """What one program of several writes of a KV head's gradients: whole blocks of keys in fp32, padding included."""
    keys = -(-problem.kv_len // block_n) * block_n
    return keys * (_padded(problem.head_dim, 64) + _padded(problem.v_head_dim, 64)) * FP32


def dq_tiles(problem: Problem, gpu: Device) -> Tiles:
    """The tile of dQ."""
    if not _hopper_runs(problem, gpu):
        return _table("dq", problem, gpu)
    return HOPPER_DQ[64 if _wide(problem) <= 64 else 128]


def decode_tiles(problem: Problem, gpu: Device) -> Tiles:
    """The tile of a decoding step: the rows of a group, padded to a power of two, and keys."""
    rows = problem.group * problem.q_len
    tiles = DECODE_FP32 if problem.dtype == "fp32" else DECODE_TABLE[8 if gpu.capability < 9 else 9][_width(problem)]
    return Tiles(min(max(16, 1 << (rows - 1).bit_length()), tiles.block_m), tiles.block_n)


def _table(kernel: str, problem: Problem, gpu: Device) -> Tiles:
    if problem.dtype == "fp32":
        return TABLE_FP32[kernel][_width(problem)]
    major, width = 8 if gpu.capability < 9 else 9, _width(problem)
    tiles = TABLE[major][kernel][width]
    if kernel == "dkdv" and width == 256 and major == 9 and _padded(problem.head_dim, 16) != problem.head_dim:
        tiles = Tiles(16, 64)  # which channels lie inside takes registers too
    if problem.softcap or _by_row(problem):
        tiles = CROWDED.get(major, {}).get(kernel, {}).get(width, tiles)
    return tiles


def _check(problem: Problem, gpu: Device) -> None:
    if gpu.kind != "gpu":
        raise ValueError(f"our kernels run on GPUs; {gpu.title} is none")
    if problem.dtype not in ("fp16", "bf16", "fp32"):
        raise ValueError(f"dtype must be fp16, bf16 or fp32 for our kernels; got {problem.dtype!r}")
    if _wide(problem) > 256:
        raise ValueError(f"our kernels take a head_dim of at most 256; got {_wide(problem)}")


def _hopper_runs(problem: Problem, gpu: Device) -> bool:
    return gpu.capability == 9 and problem.dtype in ("fp16", "bf16") and _wide(problem) <= 128


def _wide(problem: Problem) -> int:
    return max(problem.head_dim, problem.v_head_dim)


def _width(problem: Problem) -> int:
    return next(width for width in (64, 128, 256) if _wide(problem) <= width)


def _padded(head_dim: int, least: int) -> int:
    return max(least, 1 << (head_dim - 1).bit_length())


def _by_row(problem: Problem) -> bool:
    """Whether the mask is given to the kernels row by row."""
    return any(mask.widths is None for mask in problem.visible)


def _given(mask: Visible, hopper: bool) -> Visible:
    """The mask over the keys that a kernel is given: the warp-specialised ones get those that a band sees."""
    return mask.trimmed() if hopper and mask.widths is not None else mask


def _left(problem: Problem) -> int | None:
    return None if _by_row(problem) else _widths(problem)[0]


def _widths(problem: Problem) -> tuple[int | None, int | None]:
    """Of a band, left and right; None for no limit on that side."""
    widths = problem.visible[0].widths
    return (None, None) if widths is None else widths


def _unequal(problem: Problem) -> bool:
    """Whether some blocks may have more work than others."""
    return _by_row(problem) or _widths(problem)[1] is not None


def _keys_per_row(problem: Problem) -> int:
    """About how many keys a row sees under a band; all of them if it is told row by row."""
    if _by_row(problem):
        return problem.kv_len
    left, right = _widths(problem)
    seen = problem.visible[0].seen_keys
    if right is not None and left is None:
        return seen - min(problem.q_len, seen) // 2
    return seen if left is None else min(seen, left + 1 + (right or 0))


def _visited(blocks: Iterable[BlockTiles], at_least_one: bool) -> int:
    return sum(max(block.hull, int(at_least_one)) for block in blocks)


def _passing(length: int, blocks: Iterable[BlockTiles], block: int, *, whole: bool) -> int:
    """Keys that pass by all blocks: in whole tiles, of which the last may reach beyond the tensor, where nothing is read; or
    from the first that is seen to the last."""
    if not whole:
        return sum(one.span for one in blocks)
    return sum(min(max(one.last, one.first + 1) * block, length) - one.first * block for one in blocks)


def _passing_keys(problem: Problem, mask: Visible, blocks: list[BlockTiles], block_n: int, *, whole: bool) -> Work:
    """K and V that the blocks of rows of one query head ask for."""
    keys = _passing(mask.kv_len, blocks, block_n, whole=whole)
    return Work(read={"k": keys * problem.head_dim * problem.kv_itemsize, "v": keys * problem.v_head_dim * problem.kv_itemsize})  # fmt: skip


def _from_memory(problem: Problem, mask: Visible) -> float:
    """Bytes of one batch entry that cross memory if the cache answers the rest: each operand once."""
    q_and_out = mask.q_len * ((problem.head_dim + problem.v_head_dim) * problem.itemsize + FP32) * problem.q_heads
    per_head = mask.seen_keys * (problem.head_dim + problem.v_head_dim) * problem.kv_itemsize
    return q_and_out + per_head * problem.kv_heads


def _shared_keys(problem: Problem, heads: int) -> float:
    """K and V of so many query heads that are worked on together."""
    seen = max(mask.seen_keys for mask in problem.visible)
    return -(-heads // problem.group) * seen * (problem.head_dim + problem.v_head_dim) * problem.kv_itemsize


def _bytes_per_head(problem: Problem) -> float:
    """K and V of one query head, of a KV head that others share."""
    seen = problem.kv_len if _by_row(problem) else problem.visible[0].seen_keys
    return seen * (problem.head_dim + problem.v_head_dim) * problem.kv_itemsize / problem.group


def _heads_together(
    problem: Problem, heads: int, blocks_each: int, units: int, head_bytes: float, spread: float
) -> int:
    """As ``heads_together`` of flashlib.launch.hopper.

    Args:
        heads, blocks_each: whose blocks are worked on, and how many each has. head_bytes: what passes by the blocks of one head.
        spread: blocks for each program, where some have more work than others.
    """
    if not blocks_each or not heads:
        return 1
    spread = spread if _unequal(problem) else 0
    programs = min(units, blocks_each * heads)
    least = max(1, HOPPER_CACHE // max(1, int(head_bytes)), -(-int(spread * programs) // blocks_each))
    together = heads
    for groups in range(max(1, heads // least), 0, -1):
        together = -(-heads // groups)
        rest = heads % together
        if rest == 0 or rest >= least:
            break
    return together


def backward_together(problem: Problem, heads: int, blocks_each: int, gpu: Device, head_bytes: float) -> int:
    """As ``backward_heads_together`` of flashlib.launch.hopper; of the plain kernels 1."""
    if not _hopper_runs(problem, gpu) or not _unequal(problem):
        return 1
    return _heads_together(problem, heads, blocks_each, gpu.units, head_bytes, BACKWARD_SPREAD)


def _by_rows(by_entry: list[tuple[list[BlockTiles], int]], q_heads: int, together: int, hopper: bool) -> Parts:
    """The blocks of rows of so many heads at a time: most work first, or, by the plain kernels, the last first."""
    if hopper:  # each program visits one tile at least
        each = [(sorted((max(block.hull, 1) for block in blocks), reverse=True), count) for blocks, count in by_entry]
    else:
        each = [([block.hull for block in reversed(blocks)], count) for blocks, count in by_entry]
    return _side_by_side(each, q_heads, together)


def _side_by_side(by_entry: list[tuple[list[int], int]], heads: int, together: int) -> Parts:
    """The blocks of ``together`` heads, the first of each, then the second of each; then those of the next heads.

    Args:
        by_entry: the tiles of a head's blocks in the order in which they start, and how many entries of the batch are alike.
        heads: of an entry.
    """
    if together == 1:
        return [(_runs((each, 1) for each in tiles), count * heads) for tiles, count in by_entry]
    every = [tuple(tiles) for tiles, count in by_entry for _ in range(count * heads)]
    parts: Parts = []
    for first in range(0, len(every), together):
        group = every[first : first + together]
        if len(set(group)) == 1:
            programs = _runs((tiles, len(group)) for tiles in group[0])
        else:
            programs = _runs((tiles, 1) for rank in zip(*group, strict=True) for tiles in rank)
        if parts and parts[-1][0] == programs:
            parts[-1] = (programs, parts[-1][1] + 1)
        else:
            parts.append((programs, 1))
    return parts


def _runs(programs: Iterable[tuple[int, int]]) -> Programs:
    """Tiles and how many programs in a row have so many, with neighbours that have as many put together."""
    found: Programs = []
    for tiles, count in programs:
        if found and found[-1][0] == tiles:
            found[-1] = (tiles, found[-1][1] + count)
        else:
            found.append((tiles, count))
    return found


def _prepare(problem: Problem) -> Launch:
    """What looks up the intervals of all rows before the kernel proper. Its bytes are few: two numbers a row."""
    rows = sum(mask.q_len for mask in problem.visible)
    looked_up = Work(read={"intervals": rows * 2 * 4})
    return Launch("hopper_prepare", [([(0, 1)], 1)], Work(), looked_up, looked_up.bytes)


PREFIX_ROW_BLOCK, PREFIX_FEW_ROWS, LEAST_PIECE = 128, 32, 1024  # as in flashlib.inference.prefix


def shared_prefix_launches(
    batch: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    prefix: int,
    own: int,
    gpu: Device,
    *,
    queries: int = 1,
    dtype: str = "bf16",
) -> list[Launch]:
    """``shared_prefix_attention(...)``: all requests' rows over one prefix, each request over its own keys, and a merge.

    Args:
        prefix, own: keys of the prefix, and of each request behind it, the new ones included.
        queries: new tokens of each request.

    Raises:
        ValueError: our kernels do not run the problem there.
    """
    for name, value in (("prefix", prefix), ("own", own), ("queries", queries)):
        checked_count(name, value, 1)
    group = q_heads // kv_heads
    rows = batch * group * queries
    of_rows = batch * q_heads * queries * head_dim * BYTES[dtype]
    row_blocks = kv_heads * -(-rows // PREFIX_ROW_BLOCK)
    pieces = 1
    if rows > PREFIX_ROW_BLOCK:
        wanted = min(gpu.units // row_blocks, prefix // LEAST_PIECE)
        pieces = next((n for n in range(wanted, 1, -1) if prefix % n == 0), 1)
    packed = Work(read={"q": of_rows}, written={"rows": of_rows * pieces})
    launches = [Launch("pack", [([(0, 1)], 1)], Work(), packed, packed.bytes)]
    over_prefix = Problem(pieces, kv_heads, kv_heads, rows, prefix // pieces, head_dim, dtype=dtype)
    if pieces == 1 and (rows <= PREFIX_FEW_ROWS or row_blocks < gpu.units):
        launches += decode_launches(over_prefix, gpu)
    else:
        launches += forward_launches(over_prefix, gpu)
    theirs = Problem.causal(batch, q_heads, kv_heads, queries, own, head_dim, dtype=dtype)
    launches += decode_launches(theirs, gpu)
    query = batch * q_heads * queries
    merged = Work(
        read={"partial": of_rows * (pieces + 1) + query * (pieces + 1) * FP32}, written={"out": of_rows + query * FP32}
    )
    return [*launches, Launch("combine_packed", [([(0, query)], 1)], Work(), merged, merged.bytes)]
