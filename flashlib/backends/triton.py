"""Our own Triton kernels (:mod:`flashlib.kernels`): forward and backward, every mask, every dtype but fp64.

Without a GPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before the first import of triton): slow, but it is
how they are written and debugged on a laptop. Only then do they take CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlib.backends.base import Backend
from flashlib.engines import run_engine
from flashlib.launch.engines import TritonEngine
from flashlib.launch.options import KernelOptions, blocks
from flashlib.launch.plain import forward_launch
from flashlib.launch.run import splits_keys
from flashlib.launch.start import TRITON_INSTALLED, interpreting
from flashlib.launch.tiles import TileConfig
from flashlib.spec import AttentionSpec

__all__ = ["TritonBackend", "count_tiles"]

SPLIT = "here by split-KV: few rows see many keys, which are cut into pieces that are computed side by side"


class TritonBackend(Backend):
    """FlashAttention-2's algorithm in Triton, deterministic in both directions."""

    name = "triton"
    repeats_packs = True
    forward_mode = False

    def missing(self):
        if not TRITON_INSTALLED:
            return "triton is not installed (it exists for Linux only)"
        if not torch.cuda.is_available() and not interpreting():
            return "needs a CUDA GPU, or TRITON_INTERPRET=1 in the environment to run in Triton's interpreter"
        return None

    def unsupported(self, spec: AttentionSpec, config) -> str | None:
        expected = "cpu" if interpreting() else "cuda"
        if spec.device.type not in (expected, "meta"):
            return f"the kernels run on {expected} here; the tensors are on {spec.device}"
        if spec.dtype == torch.float64:
            return "takes fp16, bf16 and fp32; got torch.float64"
        if max(spec.head_dim, spec.v_head_dim) > 256:
            return f"takes a head_dim of at most 256; got {spec.head_dim} and {spec.v_head_dim}"
        return None

    def how(self, spec):
        if spec.mask.band() is None or spec.is_empty:
            return None
        q_shape, k_shape = (spec.batch, spec.q_heads, spec.q_len, 0), (spec.batch, spec.kv_heads, spec.kv_len, 0)
        return SPLIT if splits_keys(q_shape, k_shape, KernelOptions.from_spec(spec)) else None

    def run(self, q, k, v, spec, config):
        engine = TritonEngine(config.triton.fp32_precision, config.triton.autotune)
        return run_engine(engine, q, k, v, spec)


def count_tiles(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tiles: TileConfig | None = None) -> Tensor:
    """How many tiles each program of the forward skipped, masked and took whole: int32 ``[B, Hq, row blocks, 3]``.

    Args:
        q, k, v, spec: a problem with at least one score.
        tiles: tile sizes; None for those that the forward would use.
    """
    options = KernelOptions.from_spec(spec)
    used: Any = tiles or forward_launch(q, k, v, options)[0].tiles
    shape = (spec.batch, spec.q_heads, blocks(spec.q_len, used.block_m), 3)
    counts = torch.zeros(shape, dtype=torch.int32, device=spec.device)
    forward_launch(q, k, v, options, tiles=used, counts=counts)[0].start()
    return counts
