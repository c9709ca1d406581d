"""From tensors to kernel launches: grids, strides, what a mask becomes, and tile sizes.

A :class:`Launch` is a kernel with everything it needs, not yet started. The backend starts it; :mod:`flashlib.kernels.inspect`
compiles it for a GPU that need not be there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flashlib.kernels.tiles import (
    HOPPER,
    HOPPER_LEAST_KEYS,
    HOPPER_ROOMY,
    HOPPER_ROWS,
    HopperTiles,
    TileConfig,
    capability_of,
    tile_config,
)
from flashlib.masks import RowIntervals
from flashlib.spec import AttentionSpec

__all__ = [
    "INTERVALS",
    "KernelOptions",
    "Launch",
    "backward_launches",
    "forward_launch",
    "hopper_launch",
    "hopper_runs",
    "interpreting",
    "launch_backward",
    "launch_forward",
]

UNMASKED, BAND, INTERVALS = 0, 1, 2  # as in flashlib.kernels.common
RANGES_CHUNK = 1024  # rows that backward_row_ranges looks at together


@dataclass(frozen=True)
class KernelOptions:
    """What the kernels must know besides q, k and v.

    Attributes:
        start, stop: int32 ``[B or 1, Sq]``, the mask as row intervals; None if it is a band.
        left, right: the band, aligned bottom-right; None for no limit on that side.
        alibi_slopes: fp32 ``[B or 1, Hq]``, or None.
        scale, softcap: as in :func:`flashlib.attention`.
        precision: how fp32 products are formed: ``"ieee"``, or ``"tf32"`` or ``"tf32x3"`` on tensor cores.
    """

    start: Tensor | None
    stop: Tensor | None
    left: int | None
    right: int | None
    alibi_slopes: Tensor | None
    scale: float
    softcap: float
    precision: str = "ieee"

    @classmethod
    def from_spec(cls, spec: AttentionSpec, precision: str = "ieee") -> KernelOptions:
        """A plain band is two numbers; any other mask is its row intervals."""
        band = spec.mask.band()
        left, right = band or (None, None)
        start, stop = None, None
        if band is None:
            start, stop = (x.to(torch.int32).contiguous() for x in (spec.intervals.start, spec.intervals.stop))
        return cls(start, stop, left, right, spec.alibi_slopes, spec.scale, spec.softcap, precision)

    @property
    def mask_kind(self) -> int:
        if self.start is not None:
            return INTERVALS
        return UNMASKED if self.left is None and self.right is None else BAND

    def values(self) -> tuple[Any, ...]:
        """All attributes in order, as the operators of :mod:`flashlib.kernels.ops` take them after the tensors."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The arguments that all attention kernels share, by name."""
        head_dim, v_head_dim = q.shape[3], v.shape[3]
        return {
            "p_start": self.start,
            "p_stop": self.stop,
            "stride_interval": batch_stride(self.start),
            "p_slopes": self.alibi_slopes,
            "stride_slope": batch_stride(self.alibi_slopes),
            "group_size": q.shape[1] // k.shape[1],
            "q_len": q.shape[2],
            "kv_len": k.shape[2],
            "offset": k.shape[2] - q.shape[2],
            "left": self.left or 0,
            "right": self.right or 0,
            "scale": self.scale,
            "softcap": self.softcap,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "CHECK_D": head_dim != padded(head_dim),
            "CHECK_DV": v_head_dim != padded(v_head_dim),
            "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(v_head_dim),
            "MASK": self.mask_kind,
            "HAS_LEFT": self.left is not None,
            "HAS_RIGHT": self.right is not None,
            "SOFTCAP": self.softcap > 0,
            "ALIBI": self.alibi_slopes is not None,
            "PRECISION": self.precision,
        }


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tiles: TileConfig | HopperTiles | None = None

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def compile_options(self) -> dict[str, int]:
        if self.tiles is None:
            return {}
        return {"num_warps": self.tiles.num_warps, "num_stages": self.tiles.num_stages}

    def start(self) -> None:
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.compile_options)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> tuple[Tensor, Tensor]:
    """Start the forward kernel: ``(out, lse)``, ``[B, Hq, Sq, Dv]`` in the dtype of q and fp32 ``[B, Hq, Sq]``."""
    make = hopper_launch if hopper_runs(q, k, v, options) else forward_launch
    launch, out, lse = make(q, k, v, options)
    launch.start()
    return out.to(q.dtype), lse


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: KernelOptions,
    *,
    tiles: TileConfig | None = None,
    counts: Tensor | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch of the forward, and the ``out`` and ``lse`` that it will write.

    Args:
        tiles: tile sizes; None for the table's.
        counts: int32 ``[B, Hq, row blocks, 3]`` to receive how many tiles each program skipped, masked and took whole.
    """
    from flashlib.kernels.forward import attention_forward

    q, k, v = (readable(x) for x in (q, k, v))
    batch, q_heads, q_len, _ = q.shape
    tiles = tiles or tile_config("forward", q.dtype, max(q.shape[3], v.shape[3]), capability_of(q.device))
    out, lse = empty_results(q, v)
    arguments = {
        **{"p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse, "p_counts": counts},
        **strides(q=q, k=k, v=v, o=out),
        **options.arguments(q, k, v),
        **{"q_heads": q_heads, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "COUNT_TILES": counts is not None},
    }
    return Launch(attention_forward, (blocks(q_len, tiles.block_m) * batch * q_heads,), arguments, tiles), out, lse


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


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, options: KernelOptions
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Start the backward kernels: ``(dq, dk, dv)``, shaped and typed like q, k, v."""
    launches, gradients = backward_launches(q, k, v, out, lse, grad_out, grad_lse, options)
    for launch in launches:
        launch.start()
    return tuple(gradient.to(x.dtype) for gradient, x in zip(gradients, (q, k, v), strict=True))


def backward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    options: KernelOptions, *, tiles: dict[str, TileConfig] | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The launches of the backward, in order, and the ``(dq, dk, dv)`` that they will write.

    Args:
        tiles: tile sizes of "dkdv" and "dq"; None for the table's.
    """
    from flashlib.kernels.backward import backward_delta, backward_dkdv, backward_dq, backward_row_ranges

    q, k, v, out, grad_out = (readable(x) for x in (q, k, v, out, grad_out))
    batch, q_heads, q_len, _ = q.shape
    _, kv_heads, kv_len, v_head_dim = v.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    shared = options.arguments(q, k, v)
    widest = max(q.shape[3], v_head_dim)
    capability = capability_of(q.device)
    tiles = tiles or {kernel: tile_config(kernel, q.dtype, widest, capability) for kernel in ("dkdv", "dq")}
    key_blocks = blocks(kv_len, tiles["dkdv"].block_n)

    delta_rows = 64
    arguments = {
        **{
            "p_out": out,
            "p_do": grad_out,
            "p_dlse": None if grad_lse is None else grad_lse.contiguous(),
            "p_delta": delta,
        },
        **strides(o=out, g=grad_out),
        **{"q_heads": q_heads, "q_len": q_len, "v_head_dim": v_head_dim},
        **{"BLOCK_DV": shared["BLOCK_DV"], "BLOCK_M": delta_rows, "HAS_DLSE": grad_lse is not None},
    }
    launches = [Launch(backward_delta, (blocks(q_len, delta_rows) * batch * q_heads,), arguments)]

    ranges = None
    if options.mask_kind == INTERVALS:
        entries = options.start.shape[0]
        ranges = torch.empty(entries, key_blocks, 4, dtype=torch.int32, device=q.device)
        arguments = {name: shared[name] for name in ("p_start", "p_stop", "stride_interval", "q_len", "kv_len")}
        arguments |= {"p_ranges": ranges, "BLOCK_N": tiles["dkdv"].block_n, "CHUNK": RANGES_CHUNK}
        launches.append(Launch(backward_row_ranges, (key_blocks, entries), arguments))

    inputs = {
        **{"p_q": q, "p_k": k, "p_v": v, "p_do": grad_out, "p_lse": lse, "p_delta": delta},
        **strides(q=q, k=k, v=v, g=grad_out),
        **shared,
    }
    arguments = {
        **inputs,
        **{"p_dk": dk, "p_dv": dv, "p_ranges": ranges, "stride_range": batch_stride(ranges), "kv_heads": kv_heads},
        **strides(dk=dk, dv=dv),
        **{"BLOCK_M": tiles["dkdv"].block_m, "BLOCK_N": tiles["dkdv"].block_n},
    }
    launches.append(Launch(backward_dkdv, (key_blocks * batch * kv_heads,), arguments, tiles["dkdv"]))

    arguments = {
        **inputs,
        **{"p_dq": dq, "q_heads": q_heads},
        **strides(dq=dq),
        **{"BLOCK_M": tiles["dq"].block_m, "BLOCK_N": tiles["dq"].block_n},
    }
    launches.append(
        Launch(backward_dq, (blocks(q_len, tiles["dq"].block_m) * batch * q_heads,), arguments, tiles["dq"])
    )
    return launches, (dq, dk, dv)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` for a forward to write: ``[B, Hq, Sq, Dv]`` in the dtype of q, and fp32 ``[B, Hq, Sq]``."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def strides(**tensors: Tensor) -> dict[str, int]:
    """``stride_qb``, ``stride_qh`` and ``stride_qs`` of a tensor called ``q``, and so on.

    A dimension of size 1 is never stepped over, so its stride counts as 0, whatever it is: a stride that is no multiple of 16
    would have the kernel compiled again, with narrower loads.
    """
    return {
        f"stride_{name}{axis}": 0 if x.shape[dim] == 1 else x.stride(dim)
        for name, x in tensors.items()
        for dim, axis in enumerate("bhs")
    }


def batch_stride(x: Tensor | None) -> int:
    """From one batch entry to the next; 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def padded(head_dim: int) -> int:
    """The tile width for a head_dim: the next power of two, at least 16, the least a tensor core takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, as ``TRITON_INTERPRET=1`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def readable(x: Tensor) -> Tensor:
    """``x`` as the kernels take it: channels next to each other (a copy if they are not; any other strides are used as
    they are), and no bf16 in the interpreter, whose bf16 arithmetic is silently wrong (triton 3.6 to 3.9)."""
    if interpreting() and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
