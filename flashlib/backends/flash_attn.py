"""The flash-attn packages, used where they are installed and never required.

Both take ``[batch, seq, heads, head_dim]`` and know bands (causal, windows) and nothing else.
FlashAttention-2: Dao 2023 (arXiv 2307.08691). FlashAttention-3: Shah et al. 2024 (arXiv 2407.08608).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys

import torch

from flashlib.backends.base import Backend
from flashlib.engines import refuse_second_derivative
from flashlib.spec import AttentionSpec
from flashlib.values import constant_when_traced

__all__ = ["FlashAttention2", "FlashAttention3"]


@constant_when_traced
def no_package(name: str) -> str | None:
    """Why there is no such package other than this one, or None."""
    # Looked for anew where what imports go by is another: a search asks the file system for each folder of the path.
    return _no_package(name, id(sys.modules.get(name)), *map(id, sys.meta_path))


@functools.lru_cache(maxsize=64)
def _no_package(name: str, *_) -> str | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return f"the package {name} is not installed"
    if getattr(spec.loader, "stands_in", False) or spec.name.startswith("flashlib."):
        return f"the package {name} is flashlib itself, standing in for it"
    return None


class _FlashAttentionPackage(Backend):
    package: str  # the name that is imported
    least_capability: tuple[int, int]
    forward_mode = False
    settings: str  # the name of its section in FlashAttentionConfig

    def missing(self):
        obstacle = no_package(self.package)
        if obstacle:
            return obstacle
        if not torch.cuda.is_available():
            return "needs a CUDA GPU"
        return None

    def why_not(self, spec, config):
        if not getattr(config, self.settings).enabled:
            return f"switched off: {self.settings}.enabled is False in the configuration"
        return super().why_not(spec, config)

    def unsupported(self, spec: AttentionSpec, config) -> str | None:
        if spec.device.type != "cuda":
            return f"the kernel runs on CUDA; the tensors are on {spec.device}"
        if torch.cuda.get_device_capability(spec.device) < self.least_capability:
            major, minor = self.least_capability
            return f"needs a GPU of compute capability {major}.{minor} or newer"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"takes fp16 and bf16; got {spec.dtype}"
        if spec.mask.band() is None:
            return "takes causal masks and windows aligned bottom-right, and no other mask"
        if spec.head_dim > 256 or spec.head_dim != spec.v_head_dim:
            return f"takes one head_dim of at most 256 for q, k and v; got {spec.head_dim} and {spec.v_head_dim}"
        if spec.return_lse and spec.needs_grad:
            return "its LSE carries no gradient"
        if spec.dropout_p:
            return "drops other pairs than ours"
        return None

    def run(self, q, k, v, spec, config):
        function = importlib.import_module(self.package).flash_attn_func
        left, right = (-1 if width is None else width for width in spec.mask.band())
        once = refuse_second_derivative(self.name, q, k, v)
        out, lse = self.call(
            function,
            *(x.transpose(1, 2) for x in once),
            getattr(config, self.settings),
            spec,
            softmax_scale=spec.scale,
            causal=False,  # a causal mask is the window (-1, 0)
            window_size=(left, right),
            softcap=spec.softcap,
        )
        empty_rows = spec.intervals.empty_rows()[:, None]
        out = out.transpose(1, 2).masked_fill(empty_rows[..., None], 0.0)
        return out, None if lse is None else lse.masked_fill(empty_rows, float("-inf"))


class FlashAttention3(_FlashAttentionPackage):
    name = "flash_attn_3"
    package = "flash_attn_interface"
    least_capability = (9, 0)
    settings = "fa3"

    def unsupported(self, spec, config):
        if spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device)[0] != 9:
            return "written for Hopper (compute capability 9.x) alone"
        if spec.alibi_slopes is not None:
            return "has no ALiBi"
        return super().unsupported(spec, config)

    def call(self, function, q, k, v, settings, spec, **options):
        result = function(
            q,
            k,
            v,
            num_splits=settings.num_splits,
            deterministic=settings.deterministic,
            return_attn_probs=spec.return_lse,
            **options,
        )
        return result if spec.return_lse else (result, None)


class FlashAttention2(_FlashAttentionPackage):
    name = "flash_attn_2"
    package = "flash_attn"
    least_capability = (8, 0)
    settings = "fa2"

    def unsupported(self, spec, config):
        if spec.alibi_slopes is not None and spec.alibi_slopes.dim() == 3:
            return "takes one ALiBi slope per head; got one for each row"
        if spec.alibi_slopes is not None and spec.return_lse and spec.mask.band() == (None, 0):
            # It adds slope * j where slope * (i + Sk - Sq - j) is to be taken away: the same softmax, another LSE.
            return "its LSE under a causal mask is not that of the scores with ALiBi"
        return super().unsupported(spec, config)

    def call(self, function, q, k, v, settings, spec, **options):
        slopes = None if spec.alibi_slopes is None else spec.alibi_slopes.expand(spec.batch, -1).contiguous()
        options |= {"alibi_slopes": slopes, "return_attn_probs": spec.return_lse}
        result = function(q, k, v, deterministic=settings.deterministic, **options)
        return (result[0], result[1]) if spec.return_lse else (result, None)
