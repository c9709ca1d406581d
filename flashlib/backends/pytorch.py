"""The two backends that are this package's own PyTorch code and run every problem: the formula, and the algorithm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlib.autocast import autocast_inputs
from flashlib.backends.base import Backend
from flashlib.engines import run_engine
from flashlib.launch.engines import TiledEngine
from flashlib.masks import Mask
from flashlib.reference import naive_forward
from flashlib.spec import AttentionSpec
from flashlib.tiled import Tiling

__all__ = ["ReferenceBackend", "TiledBackend", "tiled_attention"]


class ReferenceBackend(Backend):
    """``softmax(Q K^T) V`` as it reads, in the inputs' dtype. Makes the N x N matrix."""

    name = "reference"
    has_sinks = True
    second_derivative = True

    def unsupported(self, spec, config):
        return None

    def run(self, q, k, v, spec, config):
        return naive_forward(q, k, v, spec)


class TiledBackend(Backend):
    """FlashAttention in plain PyTorch (:mod:`flashlib.tiled`)."""

    name = "tiled"
    repeats_packs = True

    def unsupported(self, spec, config):
        if (
            spec.device.type == "cuda"
            and not torch.compiler.is_compiling()
            and torch.cuda.is_current_stream_capturing()
        ):
            return "decides on the host which tiles to skip, which a CUDA graph cannot hold"
        return None

    def run(self, q, k, v, spec, config):
        return run_engine(TiledEngine(config.tiled), q, k, v, spec)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    block_q: int = 128,
    block_k: int = 128,
    loop_order: str = "q_outer",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention without the N x N matrix. Differentiable once, backward and forward (JVP), also through the LSE.

    Args:
        q, k, v: ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]``, ``[B, Hkv, Sk, Dv]``; fp16, bf16, fp32 or fp64. Arithmetic is in
            fp32 (fp64 for fp64).
        mask, causal, scale, softcap, alibi_slopes, dropout_p, dropout_seed, return_lse: as in :func:`flashlib.attention`.
        block_q, block_k, loop_order: see :class:`flashlib.tiled.Tiling`. They change the rounding, never the result.

    Returns:
        out ``[B, Hq, Sq, Dv]``; with ``return_lse`` also lse ``[B, Hq, Sq]``, natural log, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: as :meth:`flashlib.AttentionSpec.from_tensors` and :class:`flashlib.tiled.Tiling`.
    """
    tiling = Tiling(block_q, block_k, loop_order)
    q, k, v = autocast_inputs(q, k, v)
    options: dict[str, Any] = {
        "mask": mask,
        "causal": causal,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    options |= {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
    spec = AttentionSpec.from_tensors(q, k, v, **options, return_lse=return_lse)
    out, lse = run_engine(TiledEngine(tiling), q, k, v, spec)
    return (out, lse) if return_lse else out
