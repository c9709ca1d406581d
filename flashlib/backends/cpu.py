"""Our own kernels for processors (:mod:`flashlib.kernels.cpu`): C++ with vector instructions, compiled at first use."""

from __future__ import annotations

import torch

from flashlib.backends.base import Backend
from flashlib.engines import run_engine
from flashlib.launch.cpu.library import why_missing
from flashlib.launch.engines import CPUEngine
from flashlib.spec import AttentionSpec

__all__ = ["CPUBackend"]


class CPUBackend(Backend):
    """FlashAttention-2's algorithm with query rows as vector lanes, deterministic in both directions."""

    name = "cpu"
    forward_mode = False

    def missing(self):
        return why_missing()

    def why_not(self, spec, config):
        if spec.device.type != "cpu":  # first: nothing is compiled for tensors on a GPU
            return self.unsupported(spec, config)
        return super().why_not(spec, config)

    def unsupported(self, spec: AttentionSpec, config) -> str | None:
        if spec.device.type != "cpu":
            return f"the kernels run on the CPU; the tensors are on {spec.device}"
        if spec.dtype == torch.float64:
            return "takes fp16, bf16 and fp32; got torch.float64"
        if max(spec.head_dim, spec.v_head_dim) > 256:
            return f"takes a head_dim of at most 256; got {spec.head_dim} and {spec.v_head_dim}"
        if spec.dropout_p:
            return "has no dropout"
        if not torch.compiler.is_compiling() and spec.kv_len >= 2**31:  # a compiler would hold every length against it
            return f"takes fewer than 2^31 keys; got {spec.kv_len}"
        return None

    def run(self, q, k, v, spec, config):
        return run_engine(CPUEngine(), q, k, v, spec)
