"""Which problems the warp-specialised kernels for Hopper take, and how they are launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlib.kernels.launch import (
    INTERVALS,
    BackwardTensors,
    KernelOptions,
    Launch,
    batch_stride,
    blocks,
    empty_results,
    row_ranges_launch,
    strides,
)
from flashlib.kernels.tiles import (
    HOPPER,
    HOPPER_BACKWARD,
    HOPPER_BACKWARD_ROOMY,
    HOPPER_LEAST_KEYS,
    HOPPER_ROOMY,
    HOPPER_ROWS,
    HopperBackwardTiles,
    HopperTiles,
    capability_of,
)
from flashlib.masks import RowIntervals

__all__ = ["hopper_backward_runs", "hopper_dkdv_launches", "hopper_launch", "hopper_runs"]


def hopper_runs(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> bool:
    """Whether the warp-specialised kernel takes a problem: on a Hopper GPU, 16-bit, and within the rules of its copy engine."""
    return (
        q.device.type == "cuda"
        and capability_of(q.device) == 9
        and q.dtype in (torch.float16, torch.bfloat16)
        and max(q.shape[3], v.shape[3]) <= 128
        and all(copy_engine_reads(x) for x in (q, k, v))
        and keys_per_row(q.shape[2], k.shape[2], options)
        > (HOPPER_LEAST_KEYS if max(q.shape[3], v.shape[3]) <= 64 else 0)
    )


def keys_per_row(q_len: int, kv_len: int, options: KernelOptions) -> int:
    """About how many keys a row sees under a band; all of them under row intervals, which are not looked at."""
    seen = len(seen_range(q_len, kv_len, options))
    if options.right is not None and options.left is None:
        return seen - min(q_len, seen) // 2
    return seen if options.left is None else min(seen, options.left + 1 + (options.right or 0))


def copy_engine_reads(x: Tensor) -> bool:
    """Whether rows lie where the Tensor Memory Accelerator can fetch them: 16-byte steps, channels next to each other."""
    steps = 16 // x.element_size()
    aligned = all(stride % steps == 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and aligned


def seen_range(q_len: int, kv_len: int, options: KernelOptions) -> range:
    """The keys that some row sees under a band; all of them under row intervals."""
    offset = kv_len - q_len
    first = 0 if options.left is None else max(0, offset - options.left)
    last = kv_len if options.right is None else min(kv_len, q_len + offset + options.right)
    return range(first, last)


def hopper_launch(
    q: Tensor, k: Tensor, v: Tensor, options: KernelOptions, *, tiles: HopperTiles | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """The launch of the warp-specialised forward, and the ``out`` and ``lse`` that it will write.

    It multiplies whole tiles of V by weights, and a weight of 0 does not hide a NaN. So it is given only keys that some row
    sees: a band's are a range, and under row intervals the others are blanked in a copy of V.
    """
    from flashlib.kernels.hopper import hopper_forward

    batch, q_heads, q_len, head_dim = q.shape
    seen = seen_range(q_len, k.shape[2], options)
    offset = k.shape[2] - q_len - seen.start
    k, v = (x[:, :, seen.start : seen.stop] for x in (k, v))
    if options.mask_kind == INTERVALS:
        unseen = ~RowIntervals(options.start.long(), options.stop.long(), k.shape[2]).seen_keys()
        v = v.masked_fill(unseen[:, None, :, None], 0.0)
    plain = (
        options.mask_kind != INTERVALS and options.left is None and not options.softcap and options.alibi_slopes is None
    )
    table = HOPPER[64 if max(head_dim, v.shape[3]) <= 64 else 128]
    tiles = tiles or (table if plain else HOPPER_ROOMY)
    out, lse = empty_results(q, v)
    arguments = options.arguments(q, k, v)
    for name in ("head_dim", "CHECK_D", "PRECISION"):
        del arguments[name]
    block_d, block_dv = (max(64, arguments[name]) for name in ("BLOCK_D", "BLOCK_DV"))
    arguments |= {
        **{"desc_q": tile_descriptor(q, HOPPER_ROWS, block_d), "desc_k": tile_descriptor(k, tiles.block_n, block_d)},
        **{"desc_v": tile_descriptor(v, tiles.block_n, block_dv), "p_out": out, "p_lse": lse, "offset": offset},
        **strides(o=out),
        **{"q_heads": q_heads, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "CHECK_DV": v.shape[3] != block_dv},
        **{"BLOCK_N": tiles.block_n, "CONSUMERS": tiles.consumers, "STAGES": tiles.num_stages},
        **{"CONSUMER_REGISTERS": tiles.registers},
    }
    return Launch(hopper_forward, (blocks(q_len, tiles.block_m) * batch * q_heads,), arguments, tiles), out, lse


def hopper_backward_runs(tensors: BackwardTensors) -> bool:
    """Whether the warp-specialised kernel of dK and dV takes a problem."""
    q, k, v = tensors.q, tensors.k, tensors.v
    return (
        q.device.type == "cuda"
        and capability_of(q.device) == 9
        and q.dtype in (torch.float16, torch.bfloat16)
        and max(q.shape[3], v.shape[3]) <= 128
        and all(copy_engine_reads(x) for x in (q, k, v, tensors.grad_out))
    )


def hopper_dkdv_launches(
    tensors: BackwardTensors, options: KernelOptions, tiles: HopperBackwardTiles | None = None
) -> list[Launch]:
    """The launches of the warp-specialised dK and dV: one, or under row intervals two.

    It multiplies whole tiles of Q and dO by weights, and a weight of 0 does not hide a NaN. So rows that see nothing must not
    be given to it: under a band they are the first ones, and under row intervals they are blanked in copies.
    """
    from flashlib.kernels.hopper_backward import hopper_dkdv

    q, grad_out = tensors.q, tensors.grad_out
    batch, kv_heads, kv_len, _ = tensors.k.shape
    q_len, v_head_dim = q.shape[2], tensors.v.shape[3]
    extras = options.mask_kind == INTERVALS or options.softcap or options.alibi_slopes is not None
    table = HOPPER_BACKWARD_ROOMY if extras else HOPPER_BACKWARD
    tiles = tiles or table[64 if max(q.shape[3], v_head_dim) <= 64 else 128]
    launches, ranges, unseeing = [], None, 0
    if options.mask_kind == INTERVALS:
        launch, ranges = row_ranges_launch(tensors, options, tiles.block_n)
        launches.append(launch)
        blind = (options.start >= options.stop)[:, None, :, None]
        q, grad_out = q.masked_fill(blind, 0.0), grad_out.masked_fill(blind, 0.0)
    elif options.right is not None:
        unseeing = min(max(0, q_len - kv_len - options.right), q_len - 1)
        q, grad_out = q[:, :, unseeing:], grad_out[:, :, unseeing:]
    arguments = tensors.inputs(options)
    block_d, block_dv = (max(64, arguments[name]) for name in ("BLOCK_D", "BLOCK_DV"))
    for name in (
        "p_q",
        "p_k",
        "p_v",
        "p_do",
        "p_lse",
        "p_delta",
        "stride_row",
        "PRECISION",
        *strides(q=q, k=q, v=q, g=q),
    ):
        del arguments[name]
    arguments |= {
        **{"desc_q": tile_descriptor(q, tiles.block_m, block_d), "desc_do": tile_descriptor(grad_out, tiles.block_m, block_dv)},
        **{"desc_k": tile_descriptor(tensors.k, HOPPER_ROWS, block_d), "desc_rows": row_descriptor(tensors.rows, tiles.block_m)},
        **{"desc_v": tile_descriptor(tensors.v, HOPPER_ROWS, block_dv)},
        **{"p_dk": tensors.dk, "p_dv": tensors.dv},
        **{"p_ranges": ranges, "stride_range": batch_stride(ranges), "kv_heads": kv_heads, "unseeing": unseeing},
        **{"BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_M": tiles.block_m, "CONSUMERS": tiles.consumers},
        **{"CHECK_D": q.shape[3] != block_d, "CHECK_DV": v_head_dim != block_dv},
        **{"STAGES": tiles.num_stages, "CONSUMER_REGISTERS": tiles.registers},
    }  # fmt: skip
    grid = (blocks(kv_len, tiles.block_n) * batch * kv_heads,)
    return [*launches, Launch(hopper_dkdv, grid, arguments, tiles)]


def tile_descriptor(x: Tensor, rows: int, channels: int) -> Any:
    """What the copy engine must know of a tensor ``[B, H, S, D]`` to bring tiles of ``rows x channels`` of one head."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # A dimension of size 1 may have any stride; the engine accepts only multiples of 16 bytes.
    step = 16 // x.element_size()
    x_strides = [x.shape[3] * step if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    x_strides[3] = 1
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), x_strides, [1, 1, rows, channels], layout)


def row_descriptor(x: Tensor, rows: int) -> Any:
    """The same of the numbers that the backward keeps for each row, fp32 ``[2, B, H, S]``."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    heads = x.flatten(1, 2)
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    return TensorDescriptor(heads, list(heads.shape), list(heads.stride()), [1, 1, rows], layout)
