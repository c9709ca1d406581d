"""Decoding: a few new queries of each request against all the keys it has in its cache, contiguous or paged.

Split-KV (flash-decoding): the keys of one request are cut into splits that are computed side by side, and the results are merged by
the algebra of :class:`flashlib.Partial`. :func:`split_ranges` says where the cuts are, :func:`split_partials` computes the pieces in
plain PyTorch, and :func:`flashlib.partial.fold` merges them; the Triton kernel does the same.

Source: Dao, Haziza, Massa and Sizov 2023, Flash-Decoding for long-context inference (pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashlib import routes
from flashlib.autocast import autocast_inputs, autocast_off
from flashlib.backends import BackendUnavailableError
from flashlib.config import current_config
from flashlib.inference.decode_problem import (
    TILE,
    Problem,
    check_count,
    needs_grad,
    no_triton,
    partial_attention,
    run_torch,
    run_triton,
    split_ranges,
    too_wide,
)
from flashlib.launch import splits
from flashlib.launch.options import blocks
from flashlib.launch.splits import fewest_waves
from flashlib.partial import Partial, fold
from flashlib.values import has_data

__all__ = ["choose_num_splits", "combine_splits", "decode_attention", "split_partials", "split_ranges"]

BACKENDS = ("auto", "triton", "cpu", "torch")


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    split_size: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each request's newest tokens over its cache, by split-KV. Deterministic; nothing is read back from the device.

    Args:
        q: ``[B, Hq, Sq, D]``: the newest Sq tokens of each request. fp16, bf16, fp32, or fp64 (backend "torch" only).
        k: ``[B, Hkv, capacity, D]``, or with ``block_table`` the pages ``[pages, Hkv, page_size, D]``. Any strides, but channels next to
            each other, so that ``[B, capacity, Hkv, D]`` may be given as its transposed view.
        v: the same with Dv channels.
        lengths: int32 or int64 ``[B]``, on the device: how many tokens each request has in the cache, the Sq new ones included. None if
            the cache is full. What lies behind them is not read. A request of length 0 gives 0, and LSE -inf.
        block_table: int32 ``[B, max_pages]``: key j of request b is slot ``j % page_size`` of page ``block_table[b, j // page_size]``.
            Entries for keys that no row sees are not read.
        causal: row i sees keys ``j <= i + length - Sq``: the last token sits at the last key.
        window: ``(left, right)`` as :class:`flashlib.masks.Window`: row i sees keys ``i + length - Sq - left`` to ``i + length - Sq +
            right``; None, or any number beyond the lengths, on a side for no limit.
        scale: positive factor on the scores; ``1 / sqrt(D)`` by default.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        num_splits: how many splits share the keys of each request; 0 to have :func:`choose_num_splits` decide.
        split_size: cut at multiples of this many keys instead. What a request gives is then bitwise the same whatever batch it is in,
            and however much room its cache has. Multiples of 128 leave no tile of keys cut.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: "triton"; "cpu", our kernels for processors; "torch", the same algorithm in plain PyTorch, for reading (it reads lengths
            and block_table on the host, once a call, and can be differentiated); "auto" takes the first of them that runs.

    Returns:
        out ``[B, Hq, Sq, Dv]``, dtype of q. With ``return_lse``, ``(out, lse)``: lse ``[B, Hq, Sq]``, natural logarithm, fp32 (fp64 for
        fp64 inputs).

        Under ``torch.autocast`` q, k and v are cast to its dtype first, as :func:`flashlib.attention` does: a cache of another dtype is copied.

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected. On a GPU the values of
            ``lengths`` and ``block_table`` are looked at only under :func:`flashlib.check_values`. Otherwise a request whose length is
            below 0 or beyond the capacity gives NaN, out and LSE, and so does a row that sees a page that is not there. Nothing
            outside of the cache is read.
        flashlib.BackendUnavailableError: the named backend cannot run this problem; the message says why.
    """
    key = None
    if not torch.compiler.is_compiling():
        config = current_config()
        numbers = (causal, window, scale, softcap, num_splits, split_size, backend)
        key = routes.decode_key(q, k, v, lengths, block_table, *numbers, config)
        route = routes.find_route(key)
        if route is not None:
            return route(q, k, v, lengths, block_table, return_lse)
    q, k, v = autocast_inputs(q, k, v)
    problem = Problem.checked(q, k, v, lengths, block_table, causal, window, scale, softcap, num_splits, split_size)
    why_not = {"triton": problem.triton_why_not, "cpu": problem.cpu_why_not}
    chosen = _pick(backend, why_not)
    with autocast_off(q.device):
        out, lse = _RUN[chosen](problem)
    if key is not None and chosen == "triton":
        routes.keep_decode_route(key, q, k, v, problem.options(_precision(problem)), config)
    return (out, lse) if return_lse else out


def choose_num_splits(
    batch: int, kv_heads: int, max_length: int, *, sm_count: int, block_n: int = TILE, row_blocks: int = 1
) -> int:
    """How many splits each request's keys should be cut into, from what the host knows.

    Splits run in waves, one program per multiprocessor at a time. With n splits a wave takes as long as the tiles of one split, and
    about :data:`flashlib.launch.splits.SPLIT_COST` tiles more, in which the program starts, fills its pipeline and hands its result over. Of all n, the
    one with the shortest total wins; of equals, the smallest.

    Args:
        batch, kv_heads: requests, and key/value heads of each.
        max_length: most keys that a request may have (its capacity; or what a window leaves of it). A split never has more than
            :data:`flashlib.launch.splits.LONGEST_SPLIT` keys, which may take more splits than are fastest for requests of equal length. Those are for the
            long requests: decoding cuts a shorter one into fewer.
        sm_count: multiprocessors of the GPU.
        block_n: keys of a tile.
        row_blocks: programs that share the query rows of one request and KV head.

    Raises:
        TypeError, ValueError: a number is out of range.
    """
    for name, value, least in (
        *(("batch", batch, 0), ("kv_heads", kv_heads, 1), ("max_length", max_length, 0), ("sm_count", sm_count, 1)),
        *(("block_n", block_n, 1), ("row_blocks", row_blocks, 0)),
    ):
        check_count(name, value, least)
    return max(
        fewest_waves(batch * kv_heads * row_blocks, max(blocks(max_length, block_n), 1), sm_count),
        blocks(max_length, splits.LONGEST_SPLIT),
    )


def split_partials(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Sequence[range],
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> list[Partial]:
    """Attention over each range of keys by itself. ``fold`` of what it returns is attention over all of them.

    Args:
        q: ``[B, Hq, Sq, D]``; k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]``: a batch of one length S, the last query at the last key.
        ranges: of keys, such as :func:`split_ranges` gives.
        causal, window, scale, softcap: as in :func:`decode_attention`.

    Returns:
        One :class:`flashlib.Partial` per range: out ``[B, Hq, Sq, Dv]`` and lse ``[B, Hq, Sq]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: as :func:`decode_attention`, or a range does not lie within the keys.
    """
    problem = Problem.checked(q, k, v, None, None, causal, window, scale, softcap, 1, None)
    for keys in ranges:
        if not isinstance(keys, range) or keys.step != 1 or not 0 <= keys.start <= keys.stop <= problem.capacity:
            raise ValueError(f"ranges must be ranges of keys between 0 and {problem.capacity}; got {keys!r}")
    return [
        partial_attention(
            q, k[:, :, keys.start : keys.stop], v[:, :, keys.start : keys.stop], problem.capacity - keys.start, problem
        )
        for keys in ranges
    ]


def combine_splits(
    out: Tensor, lse: Tensor, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge partial results, first to last: ``(out [B, Hq, Sq, Dv], lse [B, Hq, Sq])``.

    Args:
        out: fp32 ``[splits, B, Hq, Sq, Dv]``, each split normalized over its own keys. Where a split's lse is -inf, it is not looked at.
        lse: fp32 ``[splits, B, Hq, Sq]``, natural logarithm.
        dtype: of the merged out; fp32 unless given. lse is fp32.
        backend: "triton", "torch", or "auto".

    Raises:
        TypeError, ValueError: bad arguments.
        flashlib.BackendUnavailableError: the named backend cannot run here.
    """
    for name, x in (("out", out), ("lse", lse)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
        if x.dtype != torch.float32:
            raise TypeError(f"{name} is {x.dtype}; expected torch.float32")
    if out.dim() != 5 or out.shape[:-1] != lse.shape or out.shape[0] == 0:
        raise ValueError(
            f"out must be [splits, B, Hq, Sq, Dv] and lse [splits, B, Hq, Sq], of at least one split; got {tuple(out.shape)} and "
            f"{tuple(lse.shape)}"
        )
    dtype = dtype or torch.float32
    why_not = {"triton": lambda: no_combine_kernel(out, lse), "cpu": lambda: "merges only what it has split itself"}
    if _pick(backend, why_not) == "torch":
        # Merging with nothing hides what the out of a lone split may hold where its lse is -inf.
        nothing = Partial.identity(*out.shape[1:], device=out.device)
        merged = fold([nothing, *(Partial(o, l) for o, l in zip(out, lse, strict=True))])
        return merged.out.to(dtype), merged.lse
    from flashlib.launch.decode import combine_launch
    from flashlib.launch.start import interpreting

    stored = torch.float32 if interpreting() else dtype  # the interpreter cuts off what a GPU rounds to bf16
    merged_out, merged_lse = out.new_empty(out.shape[1:], dtype=stored), lse.new_empty(lse.shape[1:])
    combine_launch(out.contiguous(), lse.contiguous(), merged_out, merged_lse).start()
    return merged_out.to(dtype), merged_lse


def no_combine_kernel(out: Tensor, lse: Tensor) -> str | None:
    """Why no kernel can merge such partial results, or None."""
    if lse.dtype != torch.float32:
        return f"takes an lse in fp32; got {lse.dtype}"
    return no_triton(out.device) or too_wide(out.shape[-1]) or needs_grad(out, lse)


def _torch(problem: Problem) -> tuple[Tensor, Tensor]:
    if not has_data(*problem.tensors()):
        from flashlib.inference.decode_operator import decode_torch  # registering operators imports PyTorch's compiler

        return decode_torch(*problem.values())
    return run_torch(problem)


def _triton(problem: Problem) -> tuple[Tensor, Tensor]:
    precision = _precision(problem)
    if not has_data(*problem.tensors()):
        from flashlib.inference.decode_operator import decode_triton

        return decode_triton(*problem.values(), precision)
    # Not through the operator: a decoding step is short, and PyTorch's dispatch would cost as much again as the launch.
    return run_triton(problem, precision)


def _precision(problem: Problem) -> str:
    return current_config().triton.fp32_precision if problem.q.dtype == torch.float32 else "ieee"


def _cpu(problem: Problem) -> tuple[Tensor, Tensor]:
    from flashlib.launch.cpu.operators import decode

    size = problem.split_size or (blocks(problem.capacity, problem.num_splits) if problem.num_splits else 0)
    caches = (problem.q, problem.k, problem.v, problem.lengths, problem.block_table)
    return decode(*caches, problem.left, problem.right, problem.scale, problem.softcap, size)


_RUN = {"torch": _torch, "cpu": _cpu, "triton": _triton}


def _pick(backend: str, why_not: dict[str, Callable[[], str | None]]) -> str:
    """The way to run: ``backend``, or the first that has nothing against it. ``why_not``: by name, in order; "torch" always runs."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        for name, asked in why_not.items():
            if asked() is None:
                return name
        return "torch"
    obstacle = why_not[backend]() if backend in why_not else None
    if obstacle:
        raise BackendUnavailableError(f"backend {backend!r} cannot run this: {obstacle}")
    return backend


# What is refused
