"""The two backends that are this package's own PyTorch code and run every problem: the formula, and the algorithm."""

from __future__ import annotations

import torch

from flashlib.backends.base import Backend
from flashlib.engines import TiledEngine, run_engine
from flashlib.reference import naive_forward

__all__ = ["ReferenceBackend", "TiledBackend"]


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
