"""Keys and values in pages: what decoding with a cache and packed sequences over a ``block_table`` share.

Token t of request b lies in page ``table[b, t // page_size]``, at slot ``t % page_size``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashlib.interop.flash_attn.arguments import Options
from flashlib.values import may_read

__all__ = ["Pages", "check_indices", "check_range", "decode", "forward_only"]

_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages, and which of them each request has.

    Attributes:
        keys: ``[pages, page_size, nheads_k, headdim]``. values: ``[pages, page_size, nheads_k, headdim_v]``.
        table: ``[batch, max_pages]``.
        is_identity: request b has page b and no other, so that nobody need look into the table.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    is_identity: bool = False

    @property
    def capacity(self) -> int:
        """How many tokens a request has room for."""
        return self.table.shape[1] * self.keys.shape[1]

    def write(self, k: Tensor, v: Tensor, before: Tensor) -> None:
        """Put k and v ``[batch, seqlen_new, nheads_k, headdim]`` behind the tokens that are there."""
        if not k.shape[1]:
            return
        page, slot = self.places(before[:, None] + torch.arange(k.shape[1], device=k.device))
        check_range("block_table", page, 0, len(self.keys) - 1, " where new tokens are written")
        page = torch.where(
            page < 0, len(self.keys), page
        )  # which the device refuses; -1 it would take for the last page
        self.keys[page, slot] = k
        self.values[page, slot] = v

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Page and slot of the tokens at positions ``[batch, n]``."""
        page_size = self.keys.shape[1]
        return self.table.gather(1, positions // page_size).to(torch.int64), positions % page_size

    def packed(self, cu_seqlens: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the first tokens of all requests, one after another: ``[total, nheads_k, headdim]``, keys and values.

        Args:
            cu_seqlens: cumulative numbers of tokens, ``[batch + 1]``.
            seen: bool ``[total]``: the table is not looked into for other tokens, whose copies hold anything.
        """
        page_size, ends = self.keys.shape[1], cu_seqlens.to(seen.device, torch.int64)
        token = torch.arange(len(seen), device=seen.device)
        request = (torch.searchsorted(ends, token, right=True) - 1).clamp(0, len(self.table) - 1)
        position = (token - ends[request]).clamp(0, self.capacity - 1)  # of tokens that are there, as it is
        page = torch.where(seen, self.table[request, position // page_size].to(torch.int64), 0)
        check_range("block_table", page, 0, len(self.keys) - 1, " where there are tokens")
        return self.keys[page, position % page_size], self.values[page, position % page_size]


def decode(q: Tensor, pages: Pages, lengths: Tensor, options: Options, *, num_splits: int = 0) -> tuple[Tensor, Tensor]:
    """Attention where the pages lie, and split: nothing of them is copied.

    Args:
        q: ``[batch, seqlen_q, nheads, headdim]``, the last tokens of each request.
        lengths: how many tokens each request has, ``[batch]``.

    Returns:
        out ``[batch, seqlen_q, nheads, headdim_v]``, contiguous, and lse ``[batch, nheads, seqlen_q]``.
    """
    from flashlib.inference.decode import decode_attention  # it brings Triton

    out, lse = decode_attention(
        *(x.transpose(1, 2) for x in (q, pages.keys, pages.values)),
        lengths=lengths,
        block_table=None if pages.is_identity else pages.table.to(torch.int32),
        causal=False,
        window=options.window_size,
        scale=options.softmax_scale,
        softcap=options.softcap,
        num_splits=num_splits,
        return_lse=True,
    )
    return out.transpose(1, 2).contiguous(), lse


def forward_only(function: str, results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of a function without a backward pass: they say so when a gradient is asked for, which would else pass for 0."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _ForwardOnly.apply(function, len(results), *results, *inputs)
    return results


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise NotImplementedError(f"{ctx.function} has no backward pass, here as in flash_attn")


def check_indices(name: str, indices: Tensor, batch: int, device: torch.device, layout: str, ndim: int = 1) -> None:
    """``[batch, ...]`` integers."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}; got {type(indices).__name__}")
    if indices.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64; got {indices.dtype}")
    if indices.dim() != ndim or len(indices) != batch:
        raise ValueError(f"{name} must be {layout} with batch {batch}; got shape {tuple(indices.shape)}")
    if indices.device != device:
        raise TypeError(f"{name} has device {indices.device}, but q has {device}; all must have one")


def check_range(name: str, values: Tensor | int, low: int, high: int, why: str = "", **sizes: int) -> None:
    """Numbers of the host always; a tensor where looking waits for nobody (:mod:`flashlib.values`).

    ``why`` names sizes in braces: text made of a size before it is needed would have torch.compile compile for that size alone.
    """
    why = partial(why.format, **sizes)
    if not isinstance(values, Tensor):
        if not low <= values <= high:
            raise ValueError(f"{name} must lie between {low} and {high}{why()}; got {values}")
        return
    if not may_read(values) or not ((values < low) | (values > high)).any():
        return
    wrong = int(values[(values < low) | (values > high)][0])
    raise ValueError(f"{name} must lie between {low} and {high}{why()}; got {wrong}")
