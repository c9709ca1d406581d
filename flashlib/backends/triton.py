"""Our own Triton kernels: forward and backward, every mask, every dtype. Here: choosing tiles, and launching.

Without a GPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before the first import of triton): slow, but it is
how they are written and debugged on a laptop. Only then do they take CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from flashlib.backends.base import Backend
from flashlib.spec import AttentionSpec

__all__ = ["TileConfig", "TritonBackend", "count_tiles", "tile_config"]

UNMASKED, BAND, INTERVALS = 0, 1, 2  # as in flashlib.kernels.common


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch shape of one kernel: rows, keys, warps per program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By kernel, then by padded head_dim; 16-bit inputs. 64 and 128 are the fastest on an H200 (benchmarks/tune_triton.py).
_SIXTEEN_BIT = {
    "forward": {64: TileConfig(128, 64, 4, 3), 128: TileConfig(128, 128, 8, 3), 256: TileConfig(128, 64, 8, 2)},
    "dkdv": {64: TileConfig(128, 64, 4, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(32, 64, 8, 1)},
    "dq": {64: TileConfig(64, 128, 4, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(64, 32, 8, 1)},
}
# fp32 products are done without tensor cores (IEEE), and its tiles take twice the shared memory.
_WIDE = {
    "forward": TileConfig(32, 32, 4, 1),
    "dkdv": TileConfig(32, 32, 4, 1),
    "dq": TileConfig(32, 32, 4, 1),
}


def tile_config(kernel: str, spec: AttentionSpec) -> TileConfig:
    """Tile sizes of ``kernel`` ("forward", "dkdv" or "dq") for a problem."""
    if spec.dtype == torch.float32:
        return _WIDE[kernel]
    return _SIXTEEN_BIT[kernel][min(256, max(64, padded(max(spec.head_dim, spec.v_head_dim))))]


class TritonBackend(Backend):
    """FlashAttention-2's algorithm in Triton, deterministic in both directions."""

    name = "triton"

    def missing(self):
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (it exists for Linux only)"
        if not torch.cuda.is_available() and not interpreting():
            return "needs a CUDA GPU, or TRITON_INTERPRET=1 in the environment to run in Triton's interpreter"
        return None

    def unsupported(self, spec: AttentionSpec, config) -> str | None:
        expected = "cpu" if interpreting() else "cuda"
        if spec.device.type != expected:
            return f"the kernels run on {expected} here; the tensors are on {spec.device}"
        if spec.dtype == torch.float64:
            return "takes fp16, bf16 and fp32; got torch.float64"
        if max(spec.head_dim, spec.v_head_dim) > 256:
            return f"takes a head_dim of at most 256; got {spec.head_dim} and {spec.v_head_dim}"
        return None

    def run(self, q, k, v, spec, config):
        return _TritonAttention.apply(q, k, v, spec)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spec):
        out, lse, _ = launch_forward(q, k, v, spec)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if torch.is_grad_enabled():  # only under create_graph=True
            raise NotImplementedError("the triton backend has no second derivative; use backend='reference'")
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return *launch_backward(q, k, v, out, lse, grad_out, grad_lse, ctx.spec), None


def count_tiles(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tiles: TileConfig | None = None) -> Tensor:
    """How many tiles each program of the forward skipped, masked and took whole: int32 ``[B, Hq, row blocks, 3]``."""
    return launch_forward(q, k, v, spec, tiles=tiles, count=True)[2]


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, tiles: TileConfig | None = None, count: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(out, lse, counts)``. ``counts`` as in :func:`count_tiles` if asked for, else None."""
    from flashlib.kernels.forward import attention_forward

    q, k, v = (interpretable(x) for x in (q, k, v))
    tiles = tiles or tile_config("forward", spec)
    out = torch.empty(spec.out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(spec.out_shape[:3], dtype=torch.float32, device=q.device)
    grid = (blocks(spec.q_len, tiles.block_m), spec.batch * spec.q_heads)
    counts = torch.zeros(spec.batch, spec.q_heads, grid[0], 3, dtype=torch.int32, device=q.device) if count else None
    start, stop, stride_interval, mask = mask_arguments(spec)
    attention_forward[grid](
        q, k, v, out, lse, start, stop, counts, *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
        stride_interval, spec.q_heads, spec.group_size, spec.q_len, spec.kv_len, *mask["numbers"], spec.scale,
        spec.softcap, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, COUNT_TILES=count, **constants(spec, mask),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out.to(spec.dtype), lse, counts


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``, typed like q, k, v."""
    from flashlib.kernels.backward import backward_delta, backward_dkdv, backward_dq, backward_row_ranges

    q, k, v, out, grad_out = (interpretable(x) for x in (q, k, v, out, grad_out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    start, stop, stride_interval, mask = mask_arguments(spec)
    shared = constants(spec, mask)
    rows, heads = 64, spec.batch * spec.q_heads
    backward_delta[(blocks(spec.q_len, rows), heads)](
        out, grad_out, None if grad_lse is None else grad_lse.contiguous(), delta, *out.stride()[:3], *grad_out.stride(),
        spec.q_heads, spec.q_len, v_head_dim=spec.v_head_dim, BLOCK_DV=shared["BLOCK_DV"], BLOCK_M=rows,
        HAS_DLSE=grad_lse is not None,
    )  # fmt: skip

    tiles = tile_config("dkdv", spec)
    key_blocks = blocks(spec.kv_len, tiles.block_n)
    ranges = None
    if mask["MASK"] == INTERVALS:
        ranges = torch.empty(start.shape[0], key_blocks, 2, dtype=torch.int32, device=q.device)
        backward_row_ranges[(key_blocks, start.shape[0])](
            start, stop, ranges, stride_interval, spec.q_len, BLOCK_N=tiles.block_n, CHUNK=1024
        )
    stride_range = 0 if ranges is None or ranges.shape[0] == 1 else ranges.stride(0)
    inputs = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride())
    numbers = (spec.group_size, spec.q_len, spec.kv_len, *mask["numbers"], spec.scale, spec.softcap)
    backward_dkdv[(key_blocks, spec.batch * spec.kv_heads)](
        q, k, v, grad_out, lse, delta, dk, dv, start, stop, ranges, *inputs, *dk.stride()[:3], *dv.stride()[:3],
        stride_interval, stride_range, spec.kv_heads, *numbers, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **shared,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip

    tiles = tile_config("dq", spec)
    backward_dq[(blocks(spec.q_len, tiles.block_m), heads)](
        q, k, v, grad_out, lse, delta, dq, start, stop, *inputs, *dq.stride()[:3], stride_interval, spec.q_heads, *numbers,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **shared, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return dq.to(spec.dtype), dk.to(spec.dtype), dv.to(spec.dtype)


def mask_arguments(spec: AttentionSpec) -> tuple[Tensor | None, Tensor | None, int, dict]:
    """``(start, stop, stride from one batch entry to the next, the mask's numbers and constants)`` for the kernels.

    A plain band is three numbers; anything else is its row intervals.
    """
    band = spec.mask.band()
    if band is None:
        start, stop = (x.to(torch.int32).contiguous() for x in (spec.intervals.start, spec.intervals.stop))
        constants = {"MASK": INTERVALS, "HAS_LEFT": True, "HAS_RIGHT": True, "numbers": (0, 0, 0)}
        return start, stop, 0 if start.shape[0] == 1 else start.stride(0), constants
    left, right = band
    numbers = (spec.kv_len - spec.q_len, left or 0, right or 0)
    kind = UNMASKED if band == (None, None) else BAND
    return (
        None,
        None,
        0,
        {"MASK": kind, "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None, "numbers": numbers},
    )


def constants(spec: AttentionSpec, mask: dict) -> dict:
    return {
        "head_dim": spec.head_dim,
        "v_head_dim": spec.v_head_dim,
        "CHECK_D": spec.head_dim != padded(spec.head_dim),
        "CHECK_DV": spec.v_head_dim != padded(spec.v_head_dim),
        "BLOCK_D": padded(spec.head_dim),
        "BLOCK_DV": padded(spec.v_head_dim),
        "MASK": mask["MASK"],
        "HAS_LEFT": mask["HAS_LEFT"],
        "HAS_RIGHT": mask["HAS_RIGHT"],
        "SOFTCAP": spec.softcap > 0,
        "PRECISION": "ieee",
    }


def padded(head_dim: int) -> int:
    """The tile width for a head_dim: the next power of two, at least 16, the least a tensor core takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, as ``TRITON_INTERPRET=1`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpretable(x: Tensor) -> Tensor:
    """The interpreter's bf16 arithmetic is silently wrong (triton 3.6 to 3.9), so there bf16 is computed in fp32."""
    return x.float() if interpreting() and x.dtype == torch.bfloat16 else x
