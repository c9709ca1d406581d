"""Keys and values in pages: what decoding with a cache and packed sequences over a ``block_table`` share.

Token t of request b lies in page ``table[b, t // page_size]``, at slot ``t % page_size``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashlib.interop.flash_attn.arguments import Options
from flashlib.launch.checks import no_such_page
from flashlib.values import has_tangent, may_read

__all__ = ["Pages", "check_indices", "check_range", "decode", "forward_only"]

_INDEX_DTYPES = (torch.int32, torch.int64)
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages, and which of them each request has.

    On a GPU nobody looks whether the table names pages that are there, unless :func:`flashlib.check_values` asks for it. What has no place in
    them is neither written nor read: its keys are NaN.

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

    def write(self, k: Tensor, v: Tensor, before: Tensor) -> Tensor:
        """Put k and v ``[batch, seqlen_new, nheads_k, headdim]`` behind the tokens that are there, of each request all or none.

        Returns:
            bool ``[batch]``: whether the request had a place for all of them.
        """
        positions = before[:, None] + torch.arange(k.shape[1], device=k.device)
        request = torch.arange(len(k), device=k.device)[:, None]
        page, slot, there = self.places(request, positions)
        if may_read(there):
            self.check(request, positions, ~there)
        fits = there.all(1)
        if k.numel() and self.keys.numel():
            places = page.flatten(), slot.flatten(), fits[:, None].expand_as(page).flatten()
            for memory, new in ((self.keys, k), (self.values, v)):
                _write_where(memory, new.flatten(0, 1), *places)
        return fits

    def places(self, request: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Page and slot of tokens, and whether they are there: where they are not, page and slot are some place in the memory."""
        page_size, columns = self.keys.shape[1], self.table.shape[1]
        column = position // page_size
        page = self.table[request, column.clamp(0, max(columns - 1, 0))].to(torch.int64)
        there = (position >= 0) & (column < columns) & (page >= 0) & (page < len(self.keys))
        return page.where(there, 0), position % page_size, there

    def read(self, page: Tensor, slot: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values ``[..., nheads_k, headdim]``: NaN and anything for tokens that are not there."""
        if not len(self.keys):
            keys, values = (x.new_full((*page.shape, *x.shape[2:]), float("nan")) for x in (self.keys, self.values))
            return keys, values
        return self.keys[page, slot].masked_fill(~there[..., None, None], float("nan")), self.values[page, slot]

    def check(self, request: Tensor, position: Tensor, wrong: Tensor) -> None:
        """Name the first of the tokens that have no place. This waits for the device."""
        if wrong.any():
            first = tuple(wrong.nonzero()[0])
            request, position = (int(x.expand_as(wrong)[first]) for x in (request, position))
            entry = position // self.keys.shape[1]
            raise no_such_page(request, entry, int(self.table[request, entry]), len(self.keys))

    def packed(self, cu_seqlens: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the first tokens of all requests, one after another: ``[total, nheads_k, headdim]``, keys and values.

        Args:
            cu_seqlens: cumulative numbers of tokens, ``[batch + 1]``.
            seen: bool ``[total]``: the table is not looked into for other tokens, whose copies hold anything.
        """
        ends = cu_seqlens.to(seen.device, torch.int64)
        token = torch.arange(len(seen), device=seen.device)
        request = (torch.searchsorted(ends, token, right=True) - 1).clamp(0, len(self.table) - 1)
        position = token - ends[request]
        page, slot, there = self.places(request, position)
        if may_read(there):
            self.check(request, position, seen & ~there)
        return self.read(page, slot, there)


def _write_where(memory: Tensor, new: Tensor, page: Tensor, slot: Tensor, fits: Tensor) -> None:
    """``memory[page, slot] = new`` for the tokens that fit, without asking the device which do.

    The others write what the first that fits writes, where it writes it; if none fits, what is there already.
    """
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    at = page[first], slot[first]
    stand_in = torch.where(fits.any(), new[first], memory[at])
    page, slot = (torch.where(fits, x, x_first) for x, x_first in zip((page, slot), at, strict=True))
    memory[page, slot] = torch.where(fits[:, None, None], new, stand_in)


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
        # Cut to 32 bits, a number that is too large could become one that is there.
        block_table=None if pages.is_identity else pages.table.clamp(_INT32.min, _INT32.max).to(torch.int32),
        causal=False,
        window=options.window_size,
        scale=options.softmax_scale,
        softcap=options.softcap,
        num_splits=num_splits,
        return_lse=True,
    )
    return out.transpose(1, 2).contiguous(), lse


def forward_only(function: str, results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of a function without derivatives: they say so when one is asked for, which would else pass for 0."""
    if any(has_tangent(x) for x in inputs):
        raise NotImplementedError(f"{function} has no forward-mode derivative, and an input carries a tangent")
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _ForwardOnly.apply(function, len(results), *results, *inputs)
    return results


class _ForwardOnly(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]

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
