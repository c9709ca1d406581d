"""Which problems the warp-specialised kernels for Hopper take, and how they are launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlib.kernels.launch import INTERVALS, KernelOptions, Launch, blocks, empty_results, strides
from flashlib.kernels.tiles import HOPPER, HOPPER_LEAST_KEYS, HOPPER_ROOMY, HOPPER_ROWS, HopperTiles, capability_of
from flashlib.masks import RowIntervals

__all__ = ["hopper_launch", "hopper_runs"]


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
