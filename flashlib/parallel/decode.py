"""Decoding from a cache that is spread over ranks: every rank has the queries, each has some of the keys.

A rank attends to its own keys, which gives a :class:`flashlib.Partial`; what the ranks have is merged by a tree. As each merges the same pieces in the same
order, all of them end with the same bits. What is sent has the size of the output, whatever the length of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import DeviceMesh

from flashlib.attention import attention
from flashlib.inference.decode import decode_attention
from flashlib.masks import Intervals, RowIntervals
from flashlib.parallel.link import NAMED, Link, eager, link_of, nbytes, pack, unpack
from flashlib.partial import Partial, merge
from flashlib.spec import DTYPES

__all__ = ["merge_over_ranks", "parallel_decode_attention"]


@eager
def parallel_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention of a few new tokens over a cache of which each rank has some keys. The same result, bit by bit, on every rank. No gradient.

    Args:
        q: ``[B, Hq, Sq, D]``, the same on every rank.
        k: this rank's keys, ``[B, Hkv, capacity, D]``, or with ``block_table`` its pages ``[pages, Hkv, page_size, D]``.
        v: the same with Dv channels.
        lengths: how many of this rank's keys are seen, integers ``[B]``, or ``[B, Sq]`` where rows see different numbers, as the newest tokens do of one
            another. None if all. They may differ from rank to rank, and be 0.
        starts: how many of them are not seen again, as those that a window has left behind; integers ``[B, Sq]``, where lengths are so, too, and there is no
            block_table. None for none.
        block_table: int32 ``[B, max_pages]``: which of this rank's pages hold the keys of each request.
        scale, softcap: as in :func:`flashlib.attention`.
        return_lse: also return the log-sum-exp of each row's scores, over the keys of all ranks.
        backend: of :func:`flashlib.inference.decode_attention`, which computes on each rank; where rows see different numbers of keys of a contiguous cache,
            of :func:`flashlib.attention`.

    Returns:
        out ``[B, Hq, Sq, Dv]``; with ``return_lse`` also lse ``[B, Hq, Sq]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: bad arguments. On the other ranks :class:`flashlib.parallel.ParallelError`.
        flashlib.parallel.ParallelError: the ranks disagree, or one of them is gone.

    Source: Shyam et al. 2024, Tree Attention (arXiv 2408.04093), section 4.
    """
    link = link_of(mesh)
    found: list[tuple[Tensor, Tensor]] = []

    def describe() -> dict[str, int]:
        with torch.no_grad():
            found.append(_own_part(q, k, v, lengths, starts, block_table, scale, softcap, backend))
        batch, heads, rows, _ = q.shape
        return {
            "batch": batch, "query heads": heads, "query length": rows, "v_head_dim": v.shape[3], "dtype": DTYPES.index(q.dtype),
            "return_lse": int(return_lse),
        }  # fmt: skip

    with link.call("parallel_decode_attention"):
        link.agree(describe)
        out, lse = found[0]
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        with link.working():
            merged = _merged(Partial(out.to(accumulate), lse.to(accumulate)), link)
    out = merged.out.to(q.dtype)
    return (out, merged.lse) if return_lse else out


@eager
def merge_over_ranks(partial: Partial, mesh: DeviceMesh) -> Partial:
    """What the partial results of all ranks amount to: an all-reduce whose operation is :func:`flashlib.partial.merge`.

    In steps that double the distance, two ranks exchange what they have and both merge it, lower rank first: log2 W steps, of the size of the result each. Of
    a number of ranks that is no power of two, those that are too many hand over first, and are told in the end.

    Raises:
        flashlib.parallel.ParallelError: the ranks disagree about the shape, or one of them is gone.
    """
    link = link_of(mesh)
    with link.call("merge_over_ranks"):
        link.agree(
            lambda: {
                "dimensions": partial.out.dim(),
                "numbers": partial.out.numel(),
                "bytes": partial.out.element_size(),
            }
        )
        with link.working():
            return _merged(partial, link)


def _merged(partial: Partial, link: Link) -> Partial:
    """The order of merging depends on the number of ranks alone."""
    shapes = [(tuple(x.shape), x.dtype) for x in (partial.out, partial.lse)]
    # What has seen nothing may hold anything: merged with nothing, it is hidden.
    nothing = Partial.identity(*partial.out.shape, dtype=partial.out.dtype, device=partial.out.device)
    partial, size = merge(nothing, partial), nbytes(shapes)

    def exchanged(sends: list[int], receives: list[int]) -> Partial | None:
        message = pack([partial.out, partial.lse])
        device = partial.out.device
        received = link.exchange(dict.fromkeys(sends, message), dict.fromkeys(receives, size), device).wait()
        return Partial(*unpack(received[receives[0]], shapes)) if receives else None

    power = 1 << (link.size.bit_length() - 1)
    me, extra = link.rank, link.size - power
    if me >= power:
        exchanged([me - power], [])
        told = exchanged([], [me - power])
        assert told is not None
        return told
    if me < extra:
        other = exchanged([], [me + power])
        assert other is not None
        partial = merge(partial, other)
    distance = 1
    while distance < power:
        partner = me ^ distance
        other = exchanged([partner], [partner])
        assert other is not None
        partial = merge(partial, other) if me < partner else merge(other, partial)
        distance *= 2
    if me < extra:
        exchanged([me + power], [])
    return partial


def _own_part(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, starts: Tensor | None, block_table: Tensor | None, scale: float | None,
    softcap: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` of all rows over this rank's keys."""
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "return_lse": True, "backend": backend}
    if lengths is not None and not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor or None; got {type(lengths).__name__}")
    if lengths is None or lengths.dim() != 2:
        if starts is not None:
            raise ValueError("starts goes with lengths [B, Sq]; got other lengths")
        found: Any = decode_attention(q, k, v, lengths=lengths, block_table=block_table, causal=False, **options)
        return found
    batch, heads, rows, _ = q.shape
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is not None and (not isinstance(x, Tensor) or x.is_floating_point() or x.shape != (batch, rows)):
            told = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be integers [{batch}, {rows}], one for each row; got {told}")
    if starts is not None and block_table is not None:
        raise ValueError("starts goes without a block_table; got both")
    if block_table is None and (rows > 1 or starts is not None):
        start = torch.zeros_like(lengths) if starts is None else starts
        seen = RowIntervals(start.to(torch.int64), lengths.to(torch.int64), k.shape[2])
        found = attention(q, k, v, mask=Intervals(seen), **options)
        return found
    # Each row as a request of its own, which holds the keys of the request that it belongs to.
    alone = q.transpose(1, 2).reshape(batch * rows, heads, 1, q.shape[3])
    pages = None if block_table is None else block_table.repeat_interleave(rows, dim=0)
    found = decode_attention(alone, k, v, lengths=lengths.reshape(-1), block_table=pages, causal=False, **options)
    out, lse = (x.unflatten(0, (batch, rows)).squeeze(3).transpose(1, 2) for x in found)
    return out, lse


NAMED.setdefault("dtype", lambda value: str(DTYPES[value]).removeprefix("torch."))
