"""Inputs of attention, drawn. Each exercise says which sizes its own have where a check names none: `partial(draw, heads=3)`."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.course.grader.trial import Trial


def draw(
    t: Trial,
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    dim: int = 16,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[batch, heads, queries, dim]``, k ``[batch, kv_heads, keys, dim]`` and v ``[batch, kv_heads, keys, v_dim]``, standard normal.

    Args:
        kv_heads: as many as heads if None. v_dim: dim if None.
    """
    kv_heads, v_dim = heads if kv_heads is None else kv_heads, dim if v_dim is None else v_dim
    return (
        t.randn(batch, heads, queries, dim, dtype=dtype),
        t.randn(batch, kv_heads, keys, dim, dtype=dtype),
        t.randn(batch, kv_heads, keys, v_dim, dtype=dtype),
    )
