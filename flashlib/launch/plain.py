"""Launches of the plain kernels, which run everywhere: the forward, what the backward prepares, dK and dV, and dQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlib.launch.autotune import Device, Problem, search, searches, time_launches
from flashlib.launch.options import (
    INTERVALS,
    KernelOptions,
    aligned,
    batch_stride,
    blocks,
    checked_channels,
    empty_results,
    padded,
    strides,
)
from flashlib.launch.start import Launch
from flashlib.launch.tiles import TileConfig, capability_of, tile_config

__all__ = [
    "BackwardTensors",
    "backward_launches",
    "choose_tiles",
    "dkdv_launches",
    "dq_launches",
    "forward_launch",
    "row_ranges_launch",
]

ROW_PADDING = 128  # a multiple of every kernel's tile of rows
RANGES_CHUNK = 1024  # rows that backward_row_ranges looks at together


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
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    padded_rows = blocks(q.shape[2], ROW_PADDING) * ROW_PADDING
    rows = lse.new_empty(2, *lse.shape[:2], padded_rows)
    tensors = BackwardTensors(q, k, v, grad_out, rows, *gradients)
    tiles = tiles or {}
    launches = [
        delta_launch(out, lse, grad_lse, tensors),
        *(dkdv or dkdv_launches)(tensors, options, tiles.get("dkdv")),
        *(dq or dq_launches)(tensors, options, tiles.get("dq")),
    ]
    return launches, (tensors.dq, tensors.dk, tensors.dv)


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
    assert options.start is not None
    entries, key_blocks = options.start.shape[0], blocks(tensors.k.shape[2], block_n)
    ranges = tensors.q.new_empty(entries, key_blocks, 4, dtype=torch.int32)
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
