"""Attention for jagged nested tensors, ``torch.nested`` with ``layout=torch.jagged``: they are packed sequences, and are treated as such.

As PyTorch's SDPA takes them, q, k and v are ``[B, H, j, D]``, made by transposing ``[B, j, H, D]``, where j is another length for each sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashlib.backends import config_for
from flashlib.config import FlashAttentionConfig
from flashlib.masks import Mask, Unmasked, Varlen, Window
from flashlib.values import may_read

__all__ = ["is_nested", "nested_attention"]

_LAYOUT = "[B, H, j, D], made as torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2) from parts [length, H, D]"


def is_nested(*tensors: Tensor) -> bool:
    return any(isinstance(x, Tensor) and x.is_nested for x in tensors)


def nested_attention(
    attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    causal: bool,
    alibi_slopes: Tensor | None,
    return_lse: bool,
    config: FlashAttentionConfig | None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flashlib.attention` inside each sequence; arguments as there.

    Args:
        attention: that function, for one pack.
        q: jagged ``[B, Hq, j, D]``. k, v: jagged ``[B, Hkv, j', D]`` and ``[B, Hkv, j', Dv]``: sequences of k and v may be longer or shorter than
            those of q, and are one another's.
        mask: causal attention and windows, aligned bottom-right in each sequence; None for all of it.
        alibi_slopes: fp32 ``[Hq]``, shared by all sequences.

    Returns:
        out, jagged ``[B, Hq, j, Dv]``, with the offsets of q. With ``return_lse`` also lse, jagged ``[B, Hq, j]``.
    """
    (q, q_ends), (k, k_ends), (v, v_ends) = (_packed(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    differ = k_ends is not v_ends and k_ends.shape != v_ends.shape
    if differ or (k_ends is not v_ends and may_read(k_ends, v_ends) and not torch.equal(k_ends, v_ends)):
        raise ValueError("k and v must have sequences of the same lengths; their offsets differ")
    if len(q_ends) != len(k_ends):
        raise ValueError(f"q has {len(q_ends) - 1} sequences but k has {len(k_ends) - 1}; expected as many")
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() != 1:
        raise ValueError(
            f"alibi_slopes has shape {tuple(alibi_slopes.shape)}; with jagged nested tensors expected [Hq], shared by all sequences"
        )
    packed = Varlen(q_ends, k_ends)
    left, right = _band(mask)
    right = 0 if causal else right
    inside = packed if left is None and right is None else packed & Window(left, right, packed)
    if config is None:
        config = config_for(q.device.type, packed=options.get("backend", "auto") == "auto", repeatable=False)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    result = attention(q, k, v, mask=inside, alibi_slopes=alibi_slopes, return_lse=return_lse, config=config, **options)
    if not return_lse:
        return _jagged(result, q_ends)
    return _jagged(result[0], q_ends), _jagged(result[1], q_ends)


def _packed(name: str, x: Any) -> tuple[Tensor, Tensor]:
    """``[total, H, D]`` and the offsets ``[B + 1]`` of a jagged tensor ``[B, H, j, D]``."""
    if not is_nested(x):
        came = "a dense tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"q, k and v must all be jagged nested tensors or none of them; {name} is {came}")
    if x.layout is not torch.jagged:
        raise TypeError(f"{name} is a nested tensor of layout {x.layout}; expected torch.jagged: {_LAYOUT}")
    if x.dim() != 4 or x._ragged_idx != 2:
        raise ValueError(f"{name} is a jagged nested tensor of {_shape(x)}; expected {_LAYOUT}")
    x = x.transpose(1, 2)
    x = x if x.is_contiguous() else x.contiguous()  # which closes the holes that a jagged tensor may have
    return x.values(), x.offsets()


def _shape(x: Any) -> str:
    return f"[{', '.join('j' if at == x._ragged_idx else str(int(size)) for at, size in enumerate(x.shape))}]"


def _band(mask: Mask | None) -> tuple[int | None, int | None]:
    band = (Unmasked() if mask is None else mask).band() if mask is None or isinstance(mask, Mask) else None
    if band is None:
        raise ValueError(
            "mask: jagged nested tensors take Causal() and Window(left, right) without offsets, inside each sequence; for any other pack "
            "the sequences (q.transpose(1, 2).values()) and give flashlib.masks.Varlen(q.offsets()) & the mask of the pack"
        )
    return band


def _jagged(x: Tensor, offsets: Tensor) -> Tensor:
    """``[B, H, j, ...]`` of ``[1, H, total, ...]``."""
    return torch.nested.nested_tensor_from_jagged(x[0].transpose(0, 1), offsets).transpose(1, 2)
