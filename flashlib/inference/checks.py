"""What both caches check before they change anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CACHE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _CACHE_DTYPES:
        raise TypeError(f"dtype must be torch.float64, float32, float16 or bfloat16; got {dtype}")


def check_new_tokens(k: Tensor, v: Tensor, batch: int, keys: Tensor, values: Tensor) -> None:
    """Whether k ``[batch, Hkv, S, D]`` and v ``[batch, Hkv, S, Dv]`` can be written into the memory of a cache.

    ``keys`` and ``values`` are that memory, ``[..., Hkv, tokens, D]`` and ``[..., Hkv, tokens, Dv]``.
    """
    _check_new("k", k, batch, keys)
    _check_new("v", v, batch, values)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must hold equally many tokens; got k {list(k.shape)} and v {list(v.shape)}")


def _check_new(name: str, tensor: Tensor, batch: int, memory: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype != memory.dtype:
        raise TypeError(f"{name} must be {memory.dtype}, as the cache is; got {tensor.dtype}")
    kv_heads, head_dim = memory.shape[-3], memory.shape[-1]
    if tensor.dim() != 4 or tensor.shape[:2] != (batch, kv_heads) or tensor.shape[3] != head_dim:
        raise ValueError(f"{name} must be [{batch}, {kv_heads}, S, {head_dim}]; got {list(tensor.shape)}")
    if tensor.device != memory.device:
        raise ValueError(f"{name} must be on {memory.device}, where the cache is; got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which a cache cannot carry: append under torch.no_grad()")


def check_size(name: str, size: int, least: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int; got {type(size).__name__}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}; got {size}")


def integers(name: str, values: Tensor | Sequence[int], length: int | None = None) -> Tensor:
    """``values`` as int64 ``[B]`` on the CPU."""
    try:
        values = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, one per request; got {type(values).__name__}") from error
    if values.numel() and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
        raise TypeError(f"{name} must be integers; got {values.dtype}")
    if values.dim() != 1 or (length is not None and len(values) != length):
        raise ValueError(f"{name} must be [{'B' if length is None else length}]; got {list(values.shape)}")
    return values.to(torch.int64)


def checked_counts(counts: Tensor | Sequence[int] | None, batch: int, most: int, limit: str) -> Tensor:
    """How many tokens are new in each request: int64 ``[B]``."""
    if counts is None:
        return torch.full((batch,), most, dtype=torch.int64, device="cpu")
    counts = integers("counts", counts, batch)
    if (counts < 0).any() or (counts > most).any():
        raise ValueError(f"counts must lie between 0 and {limit} = {most}; got {counts.tolist()}")
    return counts
