"""Which tokens of a sequence lie on which rank.

A layout gives each rank some positions, in increasing order. That order is what everything else here rests on: what an interval of the whole
sequence leaves of any increasing list of positions is an interval of that list, so that every mask of ours stays one on every rank.

* ``"contiguous"``: the sequence cut into runs. Any lengths will do; :func:`shard` makes them as equal as they can be.
* ``"zigzag"``: 2 W runs; rank r has the r-th from the front and the r-th from the back. Under a causal mask all ranks have equally much to do
  (Brandon et al. 2023, Striped Attention, arXiv 2311.09431, has the problem; the two-ended cut is that of Llama 3, arXiv 2407.21783, section 3.3.2).
* ``"striped"``: token t on rank ``t % W`` (Striped Attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed import DeviceMesh

from flashlib.parallel.link import eager, link_of, pack, place_of, unpack

__all__ = ["LAYOUTS", "check_layout", "part_lengths", "part_positions", "positions", "shard", "unshard"]

LAYOUTS = ("contiguous", "zigzag", "striped")


def check_layout(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    return layout


def part_lengths(length: int, parts: int, layout: str) -> list[int]:
    """How many of ``length`` tokens each of ``parts`` ranks has."""
    return [len(part) for part in part_positions(length, parts, layout)]


@lru_cache(maxsize=16)
def part_positions(length: int, parts: int, layout: str, lengths: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    """The positions on each rank, int64, increasing, on the CPU. ``lengths``: of contiguous parts, where they are not as equal as they can be."""
    if layout == "striped":
        return tuple(torch.arange(part, max(length, part), parts, device="cpu") for part in range(parts))
    if layout == "contiguous":
        cuts = [length * n // parts for n in range(parts + 1)]
        if lengths is not None:
            cuts = [sum(lengths[:n]) for n in range(parts + 1)]
        return tuple(torch.arange(cuts[n], cuts[n + 1], device="cpu") for n in range(parts))
    cuts = [length * n // (2 * parts) for n in range(2 * parts + 1)]
    runs = [torch.arange(cuts[n], cuts[n + 1], device="cpu") for n in range(2 * parts)]
    return tuple(torch.cat([runs[n], runs[-1 - n]]) for n in range(parts))


def positions(
    length: int, mesh: DeviceMesh, *, layout: str = "contiguous", device: torch.device | str | None = None
) -> Tensor:
    """The positions of this rank's tokens in a sequence of ``length``: int64 ``[n]``, what RoPE and a model's ``position_ids`` want.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    rank, ranks = place_of(mesh)
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"length must be a whole number of at least 0; got {length!r}")
    return part_positions(length, ranks, check_layout(layout))[rank].to(device or "cpu")


def shard(x: Tensor, mesh: DeviceMesh, *, layout: str = "contiguous", dim: int = 2) -> Tensor:
    """This rank's tokens of ``x``, which every rank has whole. Differentiable; sends nothing.

    Args:
        x: any tensor with a dimension of tokens.
        dim: which one: 2 for ``[B, H, S, D]``, 1 for token ids ``[B, S]``.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
    dim = _dimension(x, dim)
    return x.index_select(dim, positions(x.shape[dim], mesh, layout=layout, device=x.device))


@eager
def unshard(x: Tensor, mesh: DeviceMesh, *, layout: str = "contiguous", dim: int = 2) -> Tensor:
    """The whole of a tensor of which each rank has its tokens: the inverse of :func:`shard`, the same on every rank. Carries no gradient.

    Raises:
        TypeError, ValueError: a bad argument; the ranks' lengths are not those of the layout.
        flashlib.parallel.ParallelError: the ranks disagree, or one of them is gone.
    """
    link = link_of(mesh)
    with link.call("unshard"):

        def described() -> dict[str, int]:
            if not isinstance(x, Tensor):
                raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError("x requires a gradient, which unshard does not carry: call it under torch.no_grad()")
            along = _dimension(x, dim)
            others = [size for n, size in enumerate(x.shape) if n != along]
            return {
                "layout": LAYOUTS.index(check_layout(layout)), "dim": along, "dimensions": x.dim(), "shape": crc32(str(others).encode()),
                "dtype": crc32(str(x.dtype).encode()), "own length": x.shape[along],
            }  # fmt: skip

        lengths = [said["own length"] for said in link.agree(described, own=("own length",))]
        along = _dimension(x, dim)
        parts = checked_positions(sum(lengths), lengths, layout)
        shapes = [(*x.shape[:along], length, *x.shape[along + 1 :]) for length in lengths]
        message = pack([x])
        others = [rank for rank in range(link.size) if rank != link.rank]
        sizes = {rank: prod(shapes[rank]) * x.element_size() for rank in others}
        with link.working():
            received = link.exchange(dict.fromkeys(others, message), sizes, x.device).wait()
        pieces = [
            x.detach() if rank == link.rank else unpack(received[rank], [(shapes[rank], x.dtype)])[0]
            for rank in range(link.size)
        ]
        order = torch.cat(list(parts)).argsort().to(x.device)
        return torch.cat(pieces, dim=along).index_select(along, order)


def checked_positions(length: int, lengths: Sequence[int], layout: str) -> tuple[Tensor, ...]:
    """The positions on each rank, whose lengths must be those of the layout."""
    if layout == "contiguous":
        return part_positions(length, len(lengths), layout, tuple(lengths))
    parts = part_positions(length, len(lengths), layout)
    expected = [len(part) for part in parts]
    if list(lengths) != expected:
        raise ValueError(
            f"layout {layout!r} of {length} tokens has {expected} of them on the ranks; got {list(lengths)} (flashlib.parallel.shard cuts so)"
        )
    return parts


def _dimension(x: Tensor, dim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x, which has {x.dim()}; got {dim!r}")
    return dim % x.dim()
