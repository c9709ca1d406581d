"""From tensors to kernel launches: grids, strides, what a mask becomes, and tile sizes.

A :class:`Launch` is a kernel with everything it needs, not yet started. The backend starts it; :mod:`flashlib.kernels.inspect`
compiles it for a GPU that need not be there.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlib.dropout import threshold
from flashlib.kernels.autotune import Device, Problem, search, searches, time_launches
from flashlib.kernels.tiles import HopperTiles, TileConfig, capability_of, tile_config
from flashlib.spec import AttentionSpec

__all__ = [
    "INTERVALS",
    "BackwardTensors",
    "KernelOptions",
    "Launch",
    "backward_launches",
    "choose_tiles",
    "forward_launch",
    "interpreting",
]

# Asked once: torch.compile cannot trace the question.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
UNMASKED, BAND, INTERVALS = 0, 1, 2  # as in flashlib.kernels.common
BY_HEAD, BY_ROW = 1, 2  # the same
ROW_PADDING = 128  # a multiple of every kernel's tile of rows
RANGES_CHUNK = 1024  # rows that backward_row_ranges looks at together
# While a kernel runs in the interpreter, the functions of triton.language are others, for all threads: one kernel at a time.
INTERPRETER = threading.Lock()


@dataclass(frozen=True)
class KernelOptions:
    """What the kernels must know besides q, k and v.

    Attributes:
        start, stop: int32 ``[B or 1, Sq]``, the mask as row intervals; None if it is a band.
        left, right: the band, aligned bottom-right; None for no limit on that side.
        alibi_slopes: fp32 ``[B or 1, Hq]``, or None; with ``row_offsets`` ``[B or 1, Hq, Sq]``.
        row_offsets: int32 ``[B or 1, Sq]``: ALiBi's distance of row i and key j is ``|i + offset - j|``. None for Sk - Sq.
        scale, softcap, dropout_p: as in :func:`flashlib.attention`.
        dropout_seed: int64 ``[1]`` (:mod:`flashlib.dropout`); None without dropout.
        precision: how fp32 products are formed: ``"ieee"``, or ``"tf32"`` or ``"tf32x3"`` on tensor cores.
        autotune: when tile sizes are searched for (:mod:`flashlib.kernels.autotune`).
    """

    start: Tensor | None
    stop: Tensor | None
    left: int | None
    right: int | None
    alibi_slopes: Tensor | None
    row_offsets: Tensor | None
    scale: float
    softcap: float
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    precision: str = "ieee"
    autotune: str = "never"

    @classmethod
    def from_spec(cls, spec: AttentionSpec, precision: str = "ieee", autotune: str = "never") -> KernelOptions:
        """:meth:`flashlib.AttentionSpec.numbers`, with integers as wide as the kernels read them."""
        start, stop, left, right, slopes, offsets, *rest = spec.numbers()
        start, stop, offsets = (None if x is None else x.to(torch.int32).contiguous() for x in (start, stop, offsets))
        return cls(start, stop, left, right, slopes, offsets, *rest, precision, autotune)

    @property
    def mask_kind(self) -> int:
        if self.start is not None:
            return INTERVALS
        return UNMASKED if self.left is None and self.right is None else BAND

    @property
    def alibi_kind(self) -> int:
        if self.alibi_slopes is None:
            return 0
        return BY_HEAD if self.row_offsets is None else BY_ROW

    def demands(self, q: Tensor, k: Tensor, v: Tensor) -> set[str]:
        """What the kernels hold in registers besides q, k, v and a band: keys of :data:`flashlib.kernels.tiles.EXCEPTIONS`."""
        found = {
            "edges": checked_channels(q, k) > 0 or checked_channels(v) > 0,
            "crowded": self.mask_kind == INTERVALS or self.softcap > 0 or self.alibi_slopes is not None,
            "alibi_by_row": self.alibi_kind == BY_ROW,
            "dropout": self.dropout_p > 0,
        }
        return {name for name, holds in found.items() if holds}

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The arguments that all attention kernels share, by name."""
        head_dim, v_head_dim = q.shape[3], v.shape[3]
        return {
            "p_start": self.start,
            "p_stop": self.stop,
            "stride_interval": batch_stride(self.start),
            "p_slopes": self.alibi_slopes,
            "stride_slope": batch_stride(self.alibi_slopes),
            "p_offsets": self.row_offsets,
            "stride_offset": batch_stride(self.row_offsets),
            "group_size": q.shape[1] // k.shape[1],
            "q_len": q.shape[2],
            "kv_len": k.shape[2],
            "offset": k.shape[2] - q.shape[2],
            "left": self.left or 0,
            "right": self.right or 0,
            "scale": self.scale,
            "softcap": self.softcap,
            **dropout_arguments(self.dropout_p, self.dropout_seed),
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "CHECK_D": checked_channels(q, k),
            "CHECK_DV": checked_channels(v),
            "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(v_head_dim),
            "MASK": self.mask_kind,
            "HAS_LEFT": self.left is not None,
            "HAS_RIGHT": self.right is not None,
            "SOFTCAP": self.softcap > 0,
            "ALIBI": self.alibi_kind,
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

    @property
    def tensor(self) -> Tensor:
        """One of its tensors; all of them lie on one device. What the copy engine reads is wrapped in a descriptor."""
        unwrapped = (getattr(argument, "base", argument) for argument in self.arguments.values())
        return next(argument for argument in unwrapped if isinstance(argument, Tensor))

    def start(self) -> None:
        """Start the kernel on the device that its tensors lie on. Triton by itself takes the current one, which may be another."""
        if 0 not in self.grid:
            with torch.cuda.device_of(self.tensor), INTERPRETER if interpreting() else nullcontext():
                self.kernel[self.grid](**self.arguments, **self.compile_options)


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
        tiles: tile sizes; None for those of :func:`choose_tiles`.
        counts: int32 ``[B, Hq, row blocks, 3]`` to receive how many tiles each program skipped, masked and took whole.
    """
    from flashlib.kernels.forward import attention_forward

    q, k, v = (aligned(x) for x in (q, k, v))
    batch, q_heads, q_len, _ = q.shape
    if tiles is None:
        tiles = choose_tiles("forward", q, k, v, options, lambda t: [forward_launch(q, k, v, options, tiles=t)[0]])
    out, lse = empty_results(q, v)
    arguments = {
        **{"p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse, "p_counts": counts},
        **strides(q=q, k=k, v=v, o=out),
        **options.arguments(q, k, v),
        **{"q_heads": q_heads, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "COUNT_TILES": counts is not None},
    }
    return Launch(attention_forward, (blocks(q_len, tiles.block_m) * batch * q_heads,), arguments, tiles), out, lse


@dataclass(frozen=True)
class BackwardTensors:
    """What the backward kernels read and what they write, ``dq, dk, dv``.

    Attributes:
        rows: fp32 ``[2, B, Hq, Sq padded to ROW_PADDING]``, the LSE in base 2 and delta, as ``backward_delta`` writes them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    rows: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def inputs(self, options: KernelOptions) -> dict[str, Any]:
        """The arguments that the kernels of dK/dV and of dQ share, by name."""
        return {
            **{"p_q": self.q, "p_k": self.k, "p_v": self.v, "p_do": self.grad_out, "p_lse": self.rows[0], "p_delta": self.rows[1]},
            **strides(q=self.q, k=self.k, v=self.v, g=self.grad_out),
            "stride_row": self.rows.shape[3],
            **options.arguments(self.q, self.k, self.v),
            "CHECK_DV": checked_channels(self.v, self.grad_out),
        }  # fmt: skip


def backward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    options: KernelOptions, *, tiles: dict[str, TileConfig] | None = None, dkdv: Callable[..., list[Launch]] | None = None,
    dq: Callable[..., list[Launch]] | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The launches of the backward, in order, and the ``(dq, dk, dv)`` that they will write.

    Args:
        tiles: tile sizes of "dkdv" and "dq"; those of :func:`choose_tiles` for what is left out.
        dkdv, dq: make the launches of dK and dV, and of dQ, as :func:`dkdv_launches` and :func:`dq_launches`, which is what None
            stands for.
    """
    q, k, v, out, grad_out = (aligned(x) for x in (q, k, v, out, grad_out))
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    padded_rows = blocks(q.shape[2], ROW_PADDING) * ROW_PADDING
    rows = lse.new_empty(2, *lse.shape[:2], padded_rows)
    tensors = BackwardTensors(q, k, v, grad_out, rows, *gradients)
    tiles = tiles or {}
    launches = [
        delta_launch(out, lse, grad_lse, tensors),
        *(dkdv or dkdv_launches)(tensors, options, tiles.get("dkdv")),
        *(dq or dq_launches)(tensors, options, tiles.get("dq")),
    ]
    return launches, gradients


def delta_launch(out: Tensor, lse: Tensor, grad_lse: Tensor | None, tensors: BackwardTensors) -> Launch:
    """The launch that prepares two numbers per row: the LSE in base 2, and delta."""
    from flashlib.kernels.backward import backward_delta

    batch, q_heads, q_len, v_head_dim = out.shape
    block_m = 64
    arguments = {
        **{"p_out": out, "p_do": tensors.grad_out, **strides(o=out, g=tensors.grad_out)},
        **{"p_lse": lse.contiguous(), "p_dlse": None if grad_lse is None else grad_lse.contiguous()},
        **{"p_lse2": tensors.rows[0], "p_delta": tensors.rows[1], "stride_row": tensors.rows.shape[3]},
        **{"q_heads": q_heads, "q_len": q_len, "v_head_dim": v_head_dim},
        **{
            "CHECK_DV": checked_channels(out, tensors.grad_out),
            "BLOCK_DV": padded(v_head_dim),
            "BLOCK_M": block_m,
            "HAS_DLSE": grad_lse is not None,
        },
    }
    return Launch(backward_delta, (tensors.rows.shape[3] // block_m * batch * q_heads,), arguments)


def row_ranges_launch(tensors: BackwardTensors, options: KernelOptions, block_n: int) -> tuple[Launch, Tensor]:
    """The launch that looks up which rows see each block of keys, and the int32 ``[B or 1, blocks, 4]`` that it writes."""
    from flashlib.kernels.backward import backward_row_ranges

    shared = options.arguments(tensors.q, tensors.k, tensors.v)
    entries, key_blocks = options.start.shape[0], blocks(tensors.k.shape[2], block_n)
    ranges = torch.empty(entries, key_blocks, 4, dtype=torch.int32, device=tensors.q.device)
    arguments = {name: shared[name] for name in ("p_start", "p_stop", "stride_interval", "q_len", "kv_len")}
    arguments |= {"p_ranges": ranges, "BLOCK_N": block_n, "CHUNK": RANGES_CHUNK}
    return Launch(backward_row_ranges, (key_blocks * entries,), arguments), ranges


def dkdv_launches(tensors: BackwardTensors, options: KernelOptions, tiles: TileConfig | None = None) -> list[Launch]:
    """The launches of dK and dV: one, or under row intervals two."""
    from flashlib.kernels.backward import backward_dkdv

    if tiles is None:
        inputs = tensors.q, tensors.k, tensors.v
        tiles = choose_tiles("dkdv", *inputs, options, lambda t: dkdv_launches(tensors, options, t))
    launches, ranges = [], None
    if options.mask_kind == INTERVALS:
        launch, ranges = row_ranges_launch(tensors, options, tiles.block_n)
        launches.append(launch)
    batch, kv_heads, kv_len, _ = tensors.k.shape
    arguments = {
        **tensors.inputs(options),
        **{"p_dk": tensors.dk, "p_dv": tensors.dv, **strides(dk=tensors.dk, dv=tensors.dv)},
        **{"p_ranges": ranges, "stride_range": batch_stride(ranges), "kv_heads": kv_heads},
        **{"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n},
    }
    grid = (blocks(kv_len, tiles.block_n) * batch * kv_heads,)
    return [*launches, Launch(backward_dkdv, grid, arguments, tiles)]


def dq_launches(tensors: BackwardTensors, options: KernelOptions, tiles: TileConfig | None = None) -> list[Launch]:
    """The launches of dQ: one."""
    from flashlib.kernels.backward import backward_dq

    if tiles is None:
        inputs = tensors.q, tensors.k, tensors.v
        tiles = choose_tiles("dq", *inputs, options, lambda t: dq_launches(tensors, options, t))
    batch, q_heads, q_len, _ = tensors.q.shape
    arguments = {
        **tensors.inputs(options),
        **{"p_dq": tensors.dq, **strides(dq=tensors.dq), "q_heads": q_heads},
        **{"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n},
    }
    return [Launch(backward_dq, (blocks(q_len, tiles.block_m) * batch * q_heads,), arguments, tiles)]


def choose_tiles(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, options: KernelOptions, launches: Callable[[TileConfig], list[Launch]]
) -> TileConfig:
    """The tile sizes of ``kernel``, "forward", "dkdv" or "dq": the table's, or where ``options.autotune`` asks for it the fastest.

    Args:
        launches: what is timed to find out, for given tiles.
    """
    widest = max(q.shape[3], v.shape[3])
    tiles = tile_config(kernel, q.dtype, widest, capability_of(q.device), demands=options.demands(q, k, v))
    if not searches(options.autotune, q.device):
        return tiles
    problem = Problem.of(kernel, q, options.arguments(q, k, v))
    return search(problem, Device.of(q.device), tiles, lambda t: time_launches(launches(t)))


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` for a forward to write: ``[B, Hq, Sq, Dv]`` in the dtype of q, and fp32 ``[B, Hq, Sq]``.

    Where the heads of a token lie next to each other in q, as in flash_attn's ``[B, S, H, D]``, they do so in ``out``.
    """
    batch, q_heads, q_len, _ = q.shape
    if q.stride(1) < q.stride(2):
        out = q.new_empty(batch, q_len, q_heads, v.shape[3]).transpose(1, 2)
    else:
        out = q.new_empty(batch, q_heads, q_len, v.shape[3])
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


def dropout_arguments(dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
    """What the kernels must know of dropout, by name; without it None for all, so that they are compiled as if there were none."""
    if not dropout_p:
        return {"p_seed": None, "drop_below": None, "keep_factor": None, "DROPOUT": False}
    below = threshold(dropout_p)
    # Its 32 bits as a signed integer: an argument of more than 31 bits would be 64 bits wide, and the kernel compiled again.
    return {
        **{"p_seed": seed, "drop_below": below - (below >> 31 << 32), "keep_factor": 1.0 / (1.0 - dropout_p)},
        "DROPOUT": True,
    }


def batch_stride(x: Tensor | None) -> int:
    """From one batch entry to the next; 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def padded(head_dim: int) -> int:
    """The tile width for a head_dim: the next power of two, at least 16, the least a tensor core takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def checked_channels(*tensors: Tensor) -> int:
    """0 if no channel need be checked: tiles are as wide as the tensors' head_dim, and strides are multiples of 16, so that Triton sees
    by itself where rows begin. Otherwise the rows of all of them begin, and end, at multiples of so many channels, at most 16 bytes:
    what a thread can move at once.
    """
    first = tensors[0]
    pointers = [x.data_ptr() for x in tensors]
    steps = [stride for x in tensors for stride in strides(x=x).values()]
    if first.shape[3] == padded(first.shape[3]) and math.gcd(*pointers, *steps) % 16 == 0:
        return 0
    begins = (pointer // first.element_size() for pointer in pointers)
    return math.gcd(16 // first.element_size(), first.shape[3], *begins, *steps)


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, as ``TRITON_INTERPRET=1`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def readable(x: Tensor) -> Tensor:
    """``x`` as every kernel takes it: channels next to each other (a copy if they are not), and no bf16 in the interpreter, whose bf16
    arithmetic is silently wrong (triton 3.6 to 3.9)."""
    if interpreting() and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """``x`` as the kernels of training take it: readable, and every row begins and ends at a multiple of 16 bytes. If not, a copy whose
    channels are padded with zeros, which changes no score and adds channels of zeros to the output.

    One copy costs less than it saves: keys are read again for each block of rows, number by number where 16 bytes cannot be moved at
    once, and through registers. Of such a loop the assembler (ptxas 12.8) has also made one that read the wrong shared memory.
    """
    x = readable(x)
    step = 16 // x.element_size()
    missing = -x.shape[3] % step
    if missing:
        return torch.nn.functional.pad(x, (0, missing)).contiguous()
    return x if begins_at_16_bytes(x) else x.clone(memory_format=torch.contiguous_format)


def begins_at_16_bytes(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, the step of a thread's widest load and of Hopper's copy engine."""
    step = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides(x=x).values())
