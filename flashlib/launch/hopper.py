"""Which problems the warp-specialised kernels for Hopper take, and how they are launched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashlib.launch.counters import counters
from flashlib.launch.options import (
    INTERVALS,
    KernelOptions,
    batch_stride,
    begins_at_16_bytes,
    blocks,
    checked_channels,
    dropout_arguments,
    empty_results,
    padded,
    strides,
)
from flashlib.launch.plain import BackwardTensors, row_ranges_launch
from flashlib.launch.recipes import computed
from flashlib.launch.start import Launch, TileMap
from flashlib.launch.tiles import (
    HOPPER,
    HOPPER_BACKWARD,
    HOPPER_BACKWARD_LEAST_KEYS,
    HOPPER_BACKWARD_PAIRED,
    HOPPER_BACKWARD_ROOMY,
    HOPPER_DQ,
    HOPPER_LEAST_KEYS,
    HOPPER_NARROW,
    HOPPER_ROOMY,
    HOPPER_ROWS,
    HopperBackwardTiles,
    HopperTiles,
    capability_of,
    multiprocessors,
)

__all__ = ["hopper_backward_runs", "hopper_dkdv_launches", "hopper_dq_launches", "hopper_launches", "hopper_runs"]


GPU = "cuda"
HOPPER_CACHE = 8 << 20  # bytes of K and V that heads worked on together may take
# Blocks of rows for each program that a group of heads must have where some have more work than others. On an H200 at head_dim 128,
# where K and V of 16k keys take 8 MiB a head: 4 heads together, as this gives, or 8 ran causal attention of 16k keys at 639 or 626
# TFLOP/s, packed causal sequences of 1k at 377 or 352, and ragged ones at 545 or 568.
HOPPER_SPREAD = 3.5
BACKWARD_SPREAD = 2  # the same for programs of the backward, which work on one block each
# Of dK and dV with two consumers, on an H200: pairs of a row and a key, times channels of both, that a multiprocessor gets through in a nanosecond; bytes
# that all of them together write and read again; and what one more launch costs.
PAIR_CHANNELS_PER_NS, PART_BYTES_PER_NS, SUM_NS = 1200, 3500, 3000
MOST_PARTS = 8  # into which a group's query heads are cut
MOST_PART_WAVES = 8  # of programs that write parts: each of 128 KiB at head_dim 128
SUMMED_KEYS = 16  # that a program of hopper_sum_parts adds up
PREPARE_CHUNK = 1024  # rows that hopper_prepare looks at together


def hopper_runs(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> bool:
    """Whether the warp-specialised kernel takes a problem: on a Hopper GPU, 16-bit, and within the rules of its copy engine."""
    first, last = seen_range(q.shape[2], k.shape[2], options)
    return takes(options, q, k, v) and first < last


def takes(options: KernelOptions, *tensors: Tensor) -> bool:
    """What the warp-specialised kernels ask of a problem, forward and backward."""
    first = tensors[0]
    return (
        first.device.type == GPU
        and capability_of(first.device) == 9
        and first.dtype in (torch.float16, torch.bfloat16)
        and all(x.shape[3] <= 128 and copy_engine_reads(x) for x in tensors)
        and options.row_offsets is None
        and not options.dropout_p
    )


def keys_per_row(q_len: int, kv_len: int, options: KernelOptions) -> int:
    """About how many keys a row sees under a band; all of them under row intervals, which are not looked at."""
    first, last = seen_range(q_len, kv_len, options)
    seen = max(0, last - first)
    if options.right is not None and options.left is None:
        return seen - min(q_len, seen) // 2
    return seen if options.left is None else min(seen, options.left + 1 + (options.right or 0))


def copy_engine_reads(x: Tensor) -> bool:
    """Whether rows lie where the Tensor Memory Accelerator can fetch them: 16-byte steps, channels next to each other."""
    return x.stride(3) == 1 and begins_at_16_bytes(x)


def seen_range(q_len: int, kv_len: int, options: KernelOptions) -> tuple[int, int]:
    """The first key that some row sees under a band, and one past the last; all of them under row intervals."""
    offset = kv_len - q_len
    first = 0 if options.left is None else max(0, offset - options.left)
    last = kv_len if options.right is None else min(kv_len, q_len + offset + options.right)
    return first, last


def only_seen(x: Tensor, first: int, last: int) -> Tensor:
    """Of keys, or values, those from the first to before the last."""
    return x if last - first == x.shape[2] else x[:, :, first:last]


def hopper_launches(
    q: Tensor, k: Tensor, v: Tensor, options: KernelOptions, *, tiles: HopperTiles | None = None
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of the warp-specialised forward, and the ``out`` and ``lse`` that they will write.

    It multiplies whole tiles of V by weights, and a weight of 0 does not hide a NaN. So it is given only keys that some row
    sees: a band's are a range, and under row intervals a first kernel blanks the others in a copy.
    """
    from flashlib.kernels.hopper.forward import hopper_forward

    batch, q_heads, q_len, head_dim = q.shape
    seen = seen_range(q_len, k.shape[2], options)
    tiles = tiles or hopper_tiles(max(head_dim, v.shape[3]), keys_per_row(q_len, k.shape[2], options), options)
    offset = k.shape[2] - q_len - seen[0]
    k, v = (only_seen(x, *seen) for x in (k, v))
    out, lse = empty_results(q, v)
    arguments = options.arguments(q, k, v)
    for name in ("head_dim", "CHECK_D", "PRECISION", "p_offsets", "stride_offset", *dropout_arguments(0.0, None)):
        del arguments[name]
    block_d, block_dv = (max(64, arguments[name]) for name in ("BLOCK_D", "BLOCK_DV"))
    row_blocks, heads = blocks(q_len, tiles.block_m), batch * q_heads
    launches, prepared = [], NOTHING_PREPARED
    if options.mask_kind == INTERVALS:
        launch, prepared = prepare_launch(v, options, q_len, tiles)
        launches.append(launch)
    blanked = v if prepared["blanked"] is None else prepared["blanked"]
    programs = min(multiprocessors(q.device), row_blocks * heads)
    bytes_per_head = k.shape[2] * (head_dim + v.shape[3]) * k.element_size() / arguments["group_size"]
    spread = HOPPER_SPREAD if options.mask_kind == INTERVALS or options.right is not None else 0
    arguments |= {
        **{"desc_q": tile_descriptor(q, HOPPER_ROWS, block_d), "desc_k": tile_descriptor(k, tiles.block_n, block_d)},
        **{"desc_v": tile_descriptor(v, tiles.block_n, block_dv), "desc_blanked": tile_descriptor(blanked, tiles.block_n, block_dv)},
        **{"p_out": out, "p_lse": lse, "p_counter": counters(q, 2), "offset": offset},
        **{"p_tiles": prepared["tiles"], "stride_tiles": row_blocks if batch_stride(prepared["tiles"]) else 0},
        **{"p_blanked": prepared["flags"], "stride_blanked": batch_stride(prepared["flags"])},
        **strides(o=out),
        **{"heads": heads, "q_heads": q_heads, "heads_together": computed(heads_together, heads, row_blocks, programs, bytes_per_head, spread)},
        **{"BLOCK_D": block_d, "BLOCK_DV": block_dv, "CHECK_DV": v.shape[3] != block_dv},
        **{"BLOCK_N": tiles.block_n, "CONSUMERS": tiles.consumers, "STAGES": tiles.num_stages},
        **{"CONSUMER_REGISTERS": tiles.registers},
    }  # fmt: skip
    return [*launches, Launch(hopper_forward, (programs,), arguments, tiles)], out, lse


def hopper_tiles(head_dim: int, keys: int, options: KernelOptions) -> HopperTiles:
    """The shape of the forward for about so many ``keys`` per row."""
    extras = [options.softcap > 0, options.alibi_slopes is not None]
    if head_dim > 64:
        crowded = any(extras) if options.mask_kind == INTERVALS else options.left is not None and all(extras)
        return HOPPER_NARROW if crowded else HOPPER[128]
    few = options.left is not None or keys < HOPPER_LEAST_KEYS
    return HOPPER_ROOMY if few or any(extras) else HOPPER[64]


def heads_together(heads: int, row_blocks: int, programs: int, bytes_per_head: float, spread: float) -> int:
    """How many heads are worked on side by side: as many as have room in the L2 cache for their K and V.

    Where blocks of rows have unequal work, more, so that a group has ``spread`` blocks for each program: the longest of them come
    first, and the short ones fill the gaps. The last group, which nothing follows, needs that most: it must not be a small rest.
    """
    least = max(1, HOPPER_CACHE // max(1, int(bytes_per_head)), blocks(int(spread * programs), row_blocks))
    for groups in range(max(1, heads // least), 0, -1):
        together = blocks(heads, groups)
        rest = heads % together
        if rest == 0 or rest >= least:
            break
    return together


def backward_heads_together(
    heads: int, blocks_each: int, units: int, bytes_per_head: float, options: KernelOptions
) -> int:
    """The same for the backward: one after another where all blocks have the same work, so that a head's programs run at one time.

    Otherwise the last heads' longest blocks would come last of all, with nothing beside them.
    """
    if options.mask_kind != INTERVALS and options.right is None:
        return 1
    return computed(
        heads_together, heads, blocks_each, min(units, heads * blocks_each), bytes_per_head, BACKWARD_SPREAD
    )


def group_parts(
    q_len: int, kv_len: int, heads: int, group_size: int, channels: int, tiles: HopperBackwardTiles, units: int, options: KernelOptions
) -> int:  # fmt: skip
    """How many programs share the query heads of a KV head in dK and dV: 1 but where programs are few, for one of which all would wait.

    Parts are written and read again in fp32, which must be less than what is gained. Under row intervals there are none: a pack's gradients must not
    depend on what else is in it, and parts add up in another order.

    Args:
        heads: KV heads of all batch entries. channels: of keys and values together. units: multiprocessors.
    """
    if options.mask_kind == INTERVALS:
        return 1
    programs = blocks(kv_len, tiles.block_n) * heads
    rows = q_len if options.left is None else min(q_len, options.left + tiles.block_n + (options.right or 0))
    longest = rows * tiles.block_n * group_size * channels // PAIR_CHANNELS_PER_NS
    pairs = q_len * keys_per_row(q_len, kv_len, options)
    mean = pairs * group_size * heads * channels // (PAIR_CHANNELS_PER_NS * units)
    part_bytes = 2 * 4 * programs * tiles.block_n * channels
    unequal = options.right is not None
    return computed(fastest_parts, group_size, programs, longest, mean, part_bytes, units, unequal)


def fastest_parts(
    group_size: int, programs: int, longest: int, mean: int, part_bytes: int, units: int, unequal: bool
) -> int:
    """The number of parts with the shortest time, and of equals the smallest.

    Programs of unequal work fill one another's gaps; equal ones run in so many waves.

    Args:
        programs: of one part. longest, mean: ns that one program has to do, and a multiprocessor, if there is one part.
        part_bytes: that are written and read again for each of several parts.
    """

    def ns(parts: int) -> int:
        work = max(longest // parts, mean) if unequal else blocks(programs * parts, units) * longest // parts
        return work if parts == 1 else work + part_bytes * parts // PART_BYTES_PER_NS + SUM_NS

    most = min(MOST_PARTS, MOST_PART_WAVES * units // max(1, programs))
    return min([1, *(parts for parts in range(2, most + 1) if group_size % parts == 0)], key=ns)


def hopper_dkdv_tiles(head_dim: int, keys: int, options: KernelOptions, *, in_parts: bool) -> HopperBackwardTiles:
    """The shape of dK and dV for about so many ``keys`` per row, which row intervals do not tell. ``in_parts``: several programs share the heads of
    a group."""
    width = 64 if head_dim <= 64 else 128
    if options.softcap or options.alibi_slopes is not None:
        return HOPPER_BACKWARD_ROOMY[width]
    few = options.mask_kind != INTERVALS and keys < HOPPER_BACKWARD_LEAST_KEYS
    if not in_parts and (width == 128 or few):
        return HOPPER_BACKWARD_PAIRED
    return HOPPER_BACKWARD[width]


NOTHING_PREPARED = {"tiles": None, "flags": None, "blanked": None}


def prepare_launch(
    v: Tensor, options: KernelOptions, q_len: int, tiles: HopperTiles
) -> tuple[Launch, dict[str, Tensor]]:
    """The launch that looks up what row intervals mean for the tiles, and what it will write. ``v``: for dQ, k."""
    from flashlib.kernels.hopper.prepare import hopper_prepare

    assert options.start is not None
    batch, kv_heads, kv_len, v_head_dim = v.shape
    entries, row_blocks, key_tiles = options.start.shape[0], blocks(q_len, tiles.block_m), blocks(kv_len, tiles.block_n)
    prepared = {
        "tiles": v.new_empty(entries, row_blocks, 5 + 4 * tiles.consumers, dtype=torch.int32),
        "flags": v.new_empty(entries, key_tiles, dtype=torch.int32),
        "blanked": v.new_empty(v.shape),
    }
    arguments = {
        **{"p_start": options.start, "p_stop": options.stop, "p_v": v, "p_tiles": prepared["tiles"]},
        **{
            "p_blanked": prepared["blanked"],
            "p_flags": prepared["flags"],
            "stride_interval": batch_stride(options.start),
        },
        **{"stride_tiles": row_blocks, "stride_flags": key_tiles, **strides(v=v, b=prepared["blanked"])},
        **{"batch": batch, "entries": entries, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len},
        **{
            "v_head_dim": v_head_dim,
            "BLOCK_M": tiles.block_m,
            "WIDTH": padded(tiles.block_m),
            "GROUP": HOPPER_ROWS,
            "BLOCK_N": tiles.block_n,
        },
        **{"CHECK_DV": checked_channels(v), "BLOCK_DV": padded(v_head_dim), "CHUNK": PREPARE_CHUNK},
    }
    return Launch(hopper_prepare, ((row_blocks + key_tiles) * entries,), arguments), prepared


def hopper_backward_runs(tensors: BackwardTensors, options: KernelOptions) -> bool:
    """Whether the warp-specialised kernels of the gradients take a problem."""
    return takes(options, tensors.q, tensors.k, tensors.v, tensors.grad_out)


def hopper_dkdv_launches(
    tensors: BackwardTensors, options: KernelOptions, tiles: HopperBackwardTiles | None = None,
    *, parts: int | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of the warp-specialised dK and dV: one, under row intervals two more, and one more where parts are added up.

    It multiplies whole tiles of Q and dO by weights, and a weight of 0 does not hide a NaN. So rows that see nothing must not
    be given to it: under a band they are the first ones, and under row intervals a kernel blanks them in copies of their tiles.

    Args:
        tiles, parts: instead of those of :func:`hopper_dkdv_tiles` and :func:`group_parts`.
    """
    from flashlib.kernels.hopper.dkdv import hopper_dkdv

    q, grad_out = tensors.q, tensors.grad_out
    batch, kv_heads, kv_len, _ = tensors.k.shape
    q_len, head_dim, v_head_dim = q.shape[2], q.shape[3], tensors.v.shape[3]
    block_d, block_dv = (max(64, padded(x)) for x in (head_dim, v_head_dim))
    heads, group_size, units = batch * kv_heads, q.shape[1] // kv_heads, multiprocessors(q.device)
    widest = max(head_dim, v_head_dim)
    if parts is None:
        wide = tiles or hopper_dkdv_tiles(widest, 0, options, in_parts=True)
        parts = group_parts(q_len, kv_len, heads, group_size, block_d + block_dv, wide, units, options)
    in_parts = bool(parts > 1)
    tiles = tiles or hopper_dkdv_tiles(widest, keys_per_row(q_len, kv_len, options), options, in_parts=in_parts)
    launches, ranges, unseeing, blank = [], None, 0, NOTHING_BLANK
    if options.mask_kind == INTERVALS:
        launch, ranges = row_ranges_launch(tensors, options, tiles.block_n)
        launches.append(launch)
        launch, blank = blank_rows_launch(q, grad_out, options, tiles.block_m)
        launches.append(launch)
    elif options.right is not None:
        unseeing = min(max(0, q_len - kv_len - options.right), q_len - 1)
        q, grad_out = q[:, :, unseeing:], grad_out[:, :, unseeing:]
    shared = options.arguments(q, tensors.k, tensors.v)
    key_blocks = blocks(kv_len, tiles.block_n)
    bytes_per_head = q_len * (head_dim + v_head_dim) * q.element_size() * group_size // parts
    together = backward_heads_together(heads * parts, key_blocks, units, bytes_per_head, options)
    dk_parts = dv_parts = None
    if in_parts:
        shape = (batch, kv_heads * parts, key_blocks * tiles.block_n)
        dk_parts, dv_parts = (q.new_empty(*shape, width, dtype=torch.float32) for width in (block_d, block_dv))
    taken = ("p_start", "p_stop", "p_slopes", "stride_interval", "stride_slope", "kv_len", "left", "right", "scale", "softcap",
             "MASK", "HAS_LEFT", "HAS_RIGHT", "SOFTCAP", "ALIBI")  # fmt: skip
    arguments = {name: shared[name] for name in taken} | {"q_len": q_len, "offset": kv_len - q_len}
    arguments |= {"parts": parts, "group_size": group_size // parts, "heads_together": together, "IN_PARTS": in_parts}
    arguments |= {"p_dk_parts": dk_parts, "p_dv_parts": dv_parts}
    # What one unit of a score tile is worth as a power of 2. Computed there, it would take a register, and none is left.
    arguments["unit"] = (options.softcap or options.scale) * math.log2(math.e)
    arguments |= {
        **{"desc_q": tile_descriptor(q, tiles.block_m, block_d), "desc_do": tile_descriptor(grad_out, tiles.block_m, block_dv)},
        **{"desc_blank_q": tile_descriptor(q if blank["q"] is None else blank["q"], tiles.block_m, block_d)},
        **{"desc_blank_do": tile_descriptor(grad_out if blank["do"] is None else blank["do"], tiles.block_m, block_dv)},
        **{"p_blank": blank["flags"], "stride_blank": batch_stride(blank["flags"])},
        **{"desc_k": tile_descriptor(tensors.k, HOPPER_ROWS, block_d), "desc_rows": row_descriptor(tensors.rows, tiles.block_m)},
        **{"desc_v": tile_descriptor(tensors.v, HOPPER_ROWS, block_dv)},
        **{"desc_dk": tile_descriptor(tensors.dk, HOPPER_ROWS, block_d), "desc_dv": tile_descriptor(tensors.dv, HOPPER_ROWS, block_dv)},
        **{"p_ranges": ranges, "stride_range": batch_stride(ranges), "kv_heads": kv_heads * parts, "unseeing": unseeing},
        **{"BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_M": tiles.block_m, "CONSUMERS": tiles.consumers},
        **{"STAGES": tiles.num_stages, "CONSUMER_REGISTERS": tiles.registers},
    }  # fmt: skip
    launches.append(Launch(hopper_dkdv, (key_blocks * heads * parts,), arguments, tiles))
    if dk_parts is not None and dv_parts is not None:
        launches.append(sum_parts_launch(tensors, dk_parts, dv_parts, parts, tiles))
    return launches


def sum_parts_launch(
    tensors: BackwardTensors, dk_parts: Tensor, dv_parts: Tensor, parts: int, tiles: HopperBackwardTiles
) -> Launch:
    """The launch that adds up what ``parts`` programs have come to for each block of keys."""
    from flashlib.kernels.hopper.parts import hopper_sum_parts

    batch, kv_heads, kv_len, head_dim = tensors.dk.shape
    arguments = {
        **{"p_dk_parts": dk_parts, "p_dv_parts": dv_parts, "p_dk": tensors.dk, "p_dv": tensors.dv},
        **strides(dk=tensors.dk, dv=tensors.dv),
        **{"kv_heads": kv_heads, "parts": parts, "kv_len": kv_len, "head_dim": head_dim, "v_head_dim": tensors.dv.shape[3]},
        **{"PADDED": tiles.block_n, "BLOCK_D": dk_parts.shape[3], "BLOCK_DV": dv_parts.shape[3], "BLOCK_N": SUMMED_KEYS},
        # Parts are at least 64 channels wide, whatever the tensors are.
        **{"CHECK_D": checked_channels(tensors.dk, width=dk_parts.shape[3])},
        **{"CHECK_DV": checked_channels(tensors.dv, width=dv_parts.shape[3])},
    }  # fmt: skip
    return Launch(hopper_sum_parts, (blocks(kv_len, SUMMED_KEYS) * batch * kv_heads,), arguments)


def hopper_dq_launches(
    tensors: BackwardTensors, options: KernelOptions, tiles: HopperTiles | None = None
) -> list[Launch]:
    """The launches of the warp-specialised dQ: one, or under row intervals two.

    Keys that no row sees are not given to it, or come from a copy in which they are zeros, as in :func:`hopper_launches`.
    """
    from flashlib.kernels.hopper.dq import hopper_dq

    q, rows = tensors.q, tensors.rows
    batch, q_heads, q_len, _ = q.shape
    tiles = tiles or HOPPER_DQ[64 if max(q.shape[3], tensors.v.shape[3]) <= 64 else 128]
    seen = seen_range(q_len, tensors.k.shape[2], options)
    if seen[0] >= seen[1]:  # zero keys cannot be described to the copy engine
        tensors.dq.zero_()
        return []
    offset = tensors.k.shape[2] - q_len - seen[0]
    k, v = (only_seen(x, *seen) for x in (tensors.k, tensors.v))
    shared = options.arguments(q, k, v)
    block_d, block_dv = (max(64, shared[name]) for name in ("BLOCK_D", "BLOCK_DV"))
    launches, prepared = [], NOTHING_PREPARED
    if options.mask_kind == INTERVALS:
        launch, prepared = prepare_launch(k, options, q_len, tiles)
        launches.append(launch)
    blanked = k if prepared["blanked"] is None else prepared["blanked"]
    taken = ("p_start", "p_stop", "p_slopes", "stride_interval", "stride_slope", "group_size", "q_len", "kv_len", "left", "right",
             "scale", "softcap", "MASK", "HAS_LEFT", "HAS_RIGHT", "SOFTCAP", "ALIBI")  # fmt: skip
    row_blocks, heads = blocks(q_len, tiles.block_m), batch * q_heads
    bytes_per_head = k.shape[2] * (q.shape[3] + v.shape[3]) * k.element_size() / shared["group_size"]
    together = backward_heads_together(heads, row_blocks, multiprocessors(q.device), bytes_per_head, options)
    arguments = {name: shared[name] for name in taken}
    arguments |= {"offset": offset, "q_heads": q_heads, "heads_together": together}
    arguments |= {
        **{"desc_q": tile_descriptor(q, HOPPER_ROWS, block_d), "desc_do": tile_descriptor(tensors.grad_out, HOPPER_ROWS, block_dv)},
        **{"desc_k": tile_descriptor(k, tiles.block_n, block_d), "desc_v": tile_descriptor(v, tiles.block_n, block_dv)},
        **{"desc_blanked": tile_descriptor(blanked, tiles.block_n, block_d), "desc_dq": tile_descriptor(tensors.dq, HOPPER_ROWS, block_d)},
        **{"p_lse": rows[0], "p_delta": rows[1], "stride_row": rows.shape[3], "p_tiles": prepared["tiles"]},
        **{"stride_tiles": row_blocks if batch_stride(prepared["tiles"]) else 0},
        **{"p_blanked": prepared["flags"], "stride_blanked": batch_stride(prepared["flags"])},
        **{"BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_N": tiles.block_n, "CONSUMERS": tiles.consumers},
        **{"STAGES": tiles.num_stages, "CONSUMER_REGISTERS": tiles.registers},
    }  # fmt: skip
    return [*launches, Launch(hopper_dq, (row_blocks * heads,), arguments, tiles)]


NOTHING_BLANK = {"flags": None, "q": None, "do": None}


def blank_rows_launch(
    q: Tensor, grad_out: Tensor, options: KernelOptions, block_m: int
) -> tuple[Launch, dict[str, Tensor]]:
    """The launch that blanks, in copies of q and dO, the rows that see nothing, and what it will write."""
    from flashlib.kernels.hopper.prepare import hopper_blank_rows

    batch, q_heads, q_len, head_dim = q.shape
    assert options.start is not None
    entries, tiles, v_head_dim = options.start.shape[0], blocks(q_len, block_m), grad_out.shape[3]
    blank = {
        "flags": q.new_empty(entries, tiles, dtype=torch.int32),
        "q": q.new_empty(q.shape),
        "do": q.new_empty(grad_out.shape),
    }
    arguments = {
        **{"p_start": options.start, "p_stop": options.stop, "p_q": q, "p_do": grad_out, "p_blank_q": blank["q"]},
        **{"p_blank_do": blank["do"], "p_flags": blank["flags"], "stride_interval": batch_stride(options.start)},
        **{"stride_flags": tiles, **strides(q=q, g=grad_out, bq=blank["q"], bg=blank["do"])},
        **{"batch": batch, "entries": entries, "q_heads": q_heads, "q_len": q_len, "head_dim": head_dim},
        **{"v_head_dim": v_head_dim, "BLOCK_M": block_m, "CHECK_D": head_dim != padded(head_dim)},
        **{"CHECK_DV": v_head_dim != padded(v_head_dim), "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(v_head_dim)},
    }
    return Launch(hopper_blank_rows, (tiles * entries,), arguments), blank


def tile_descriptor(x: Tensor, rows: int, channels: int) -> TileMap:
    """What the copy engine must know of a tensor ``[B, H, S, D]`` to bring tiles of ``rows x channels`` of one head."""
    # A dimension of size 1 may have any stride; the engine accepts only multiples of 16 bytes.
    outer = x.shape[3] * (16 // x.element_size())
    steps = (outer if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return TileMap(x, tuple(x.shape), (*steps, 1), (1, 1, rows, channels), swizzle=128)


def row_descriptor(x: Tensor, rows: int) -> TileMap:
    """The same of the numbers that the backward keeps for each row, fp32 ``[2, B, H, S]``."""
    heads = x.flatten(1, 2)
    return TileMap(heads, tuple(heads.shape), tuple(heads.stride()), (1, 1, rows), swizzle=0)
