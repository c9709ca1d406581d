"""Decoding: a few new queries of each request against all the keys it has in its cache, contiguous or paged.

Split-KV (flash-decoding): the keys of one request are cut into splits that are computed side by side, and the results are merged by
the algebra of :class:`flashlib.Partial`. :func:`split_ranges` says where the cuts are, :func:`split_partials` computes the pieces in
plain PyTorch, and :func:`flashlib.partial.fold` merges them; the Triton kernel does the same.

Source: Dao, Haziza, Massa and Sizov 2023, Flash-Decoding for long-context inference (pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real

import torch
from torch import Tensor

from flashlib import routes
from flashlib.autocast import autocast_inputs, autocast_off
from flashlib.backends import BackendUnavailableError
from flashlib.config import current_config
from flashlib.launch import splits
from flashlib.launch.checks import check_decoding
from flashlib.launch.decode import DecodeOptions, launch_decode
from flashlib.launch.splits import fewest_waves
from flashlib.masks import NO_LIMIT, KeyLengths, Window
from flashlib.partial import Partial, fold
from flashlib.reference import naive_attention
from flashlib.values import has_data, has_tangent, has_values, may_read

__all__ = ["choose_num_splits", "combine_splits", "decode_attention", "split_partials", "split_ranges"]

BACKENDS = ("auto", "triton", "cpu", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TILE = 64  # keys; where the tile is not the kernel's own


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


def split_ranges(
    length: int, *, num_splits: int = 0, split_size: int | None = None, first: int = 0, tile: int = TILE
) -> list[range]:
    """Where the keys ``[first, length)`` are cut: what the kernel does, on the host.

    Args:
        length: number of keys of the request.
        num_splits: exactly so many ranges share the tiles of keys evenly; the last of them may be empty.
        split_size: as many ranges as it takes, with cuts at multiples of this many keys. Give this or ``num_splits``.
        first: the first key that any row sees; 0 unless there is a window.
        tile: with ``num_splits``, cuts are at multiples of this.

    Raises:
        TypeError, ValueError: a number is out of range, or both or neither of num_splits and split_size are given.
    """
    for name, value, least in (
        ("length", length, 0),
        ("num_splits", num_splits, 0),
        ("first", first, 0),
        ("tile", tile, 1),
    ):
        _check_count(name, value, least)
    if (num_splits == 0) == (split_size is None):
        raise ValueError(
            f"give num_splits or split_size, one of them; got num_splits={num_splits}, split_size={split_size}"
        )
    first = min(first, length)
    if split_size is not None:
        _check_count("split_size", split_size, 1)
        begins = range(first // split_size * split_size, length, split_size) if first < length else []
    else:
        begin = first // tile * tile
        split_size = max(-(-(length - begin) // tile // num_splits), 1) * tile
        begins = [begin + split * split_size for split in range(num_splits)]
    return [_clipped(begin, begin + split_size, first, length) for begin in begins]


def _clipped(begin: int, end: int, first: int, length: int) -> range:
    begin, end = max(begin, first), min(end, length)
    return range(min(begin, end), end)


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
        _check_count(name, value, least)
    return max(
        fewest_waves(batch * kv_heads * row_blocks, max(_blocks(max_length, block_n), 1), sm_count),
        _blocks(max_length, splits.LONGEST_SPLIT),
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
        _partial(
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
    return _no_triton(out.device) or _too_wide(out.shape[-1]) or _needs_grad(out, lse)


@dataclass(frozen=True)
class Problem:
    """One call of :func:`decode_attention`, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None
    block_table: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float
    num_splits: int
    split_size: int | None

    @classmethod
    def checked(cls, q, k, v, lengths, block_table, causal, window, scale, softcap, num_splits, split_size) -> Problem:
        _check_tensors(q, k, v, block_table)
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False; got {causal!r}")
        left, right = _check_window(window)
        if causal:
            right = 0
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else _number("scale", scale)
        softcap = _number("softcap", softcap)
        if scale <= 0:
            raise ValueError(f"scale must be greater than 0; got {scale}")
        if softcap < 0:
            raise ValueError(f"softcap must be at least 0 (0 for none); got {softcap}")
        _check_count("num_splits", num_splits, 0)
        if split_size is not None:
            _check_count("split_size", split_size, 1)
            if num_splits:
                raise ValueError(f"give num_splits or split_size, not both; got {num_splits} and {split_size}")
            split_size = min(split_size, NO_LIMIT)
        problem = cls(q, k, v, lengths, block_table, left, right, scale, softcap, num_splits, split_size)
        problem._check_lengths()
        return problem

    @property
    def capacity(self) -> int:
        """How many keys a request may have."""
        return self.k.shape[2] if self.block_table is None else self.k.shape[2] * self.block_table.shape[1]

    def values(self) -> tuple:
        """All attributes in order, as the operator of :mod:`flashlib.inference.decode_operator` takes them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def tensors(self) -> list[Tensor]:
        return [x for x in self.values() if isinstance(x, Tensor)]

    def options(self, precision: str) -> DecodeOptions:
        """What the kernels must know of it, and into how many splits it is cut."""
        return DecodeOptions.chosen(
            self.q, self.k, self.v, scale=self.scale, softcap=self.softcap, lengths=self.lengths, block_table=self.block_table,
            left=self.left, right=self.right, num_splits=self.num_splits, split_size=self.split_size, precision=precision,
        )  # fmt: skip

    def first_key(self, length: int) -> int:
        """The first key that any row sees, of a request of this length."""
        return 0 if self.left is None else max(length - self.q.shape[2] - self.left, 0)

    def intervals(self) -> tuple[Tensor, Tensor]:
        """The first key that each row sees and the one behind the last, int64 ``[B, Sq]``, without asking the host."""
        batch, _, q_len, _ = self.q.shape
        full = torch.full((batch,), self.capacity, dtype=torch.int64, device=self.q.device)
        lengths = full if self.lengths is None else self.lengths.to(torch.int64).clamp(0, self.capacity)
        mask = KeyLengths(lengths) & Window(self.left, self.right, offset=lengths - q_len)
        intervals = mask.intervals(batch, q_len, self.capacity, self.q.device)
        return intervals.start, intervals.stop

    def triton_why_not(self) -> str | None:
        if self.q.dtype == torch.float64:
            return "takes fp16, bf16 and fp32; got torch.float64"
        tensors = (self.q, self.k, self.v)
        if has_data(*tensors) and not has_values(*tensors):
            return "does not go through the transforms of torch.func; backend 'torch' does"
        return _no_triton(self.q.device) or _too_wide(max(self.q.shape[3], self.v.shape[3])) or _needs_grad(*tensors)

    def cpu_why_not(self) -> str | None:
        from flashlib.launch.cpu.library import why_missing

        if self.q.device.type != "cpu":
            return f"the kernels run on the CPU; the tensors are on {self.q.device}"
        if self.q.dtype == torch.float64:
            return "takes fp16, bf16 and fp32; got torch.float64"
        tensors = (self.q, self.k, self.v)
        if has_data(*tensors) and not has_values(*tensors):
            return "does not go through the transforms of torch.func; backend 'torch' does"
        return _too_wide(max(self.q.shape[3], self.v.shape[3])) or _needs_grad(*tensors) or why_missing()

    def _check_lengths(self) -> None:
        lengths, batch = self.lengths, self.q.shape[0]
        if lengths is None:
            return
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be a torch.Tensor or None; got {type(lengths).__name__}")
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths is {lengths.dtype}; expected int32 or int64")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected ({batch},), one per request")
        if lengths.device != self.q.device:
            raise TypeError(f"lengths is on {lengths.device} but q is on {self.q.device}; all must be on one device")

    def check_values(self) -> None:
        """Read lengths and page numbers, and refuse those that cannot be. On a GPU this waits for it."""
        check_decoding(self.q, self.k, self.lengths, self.block_table, self.left)


# The two ways to run


def _torch(problem: Problem) -> tuple[Tensor, Tensor]:
    if not has_data(*problem.tensors()):
        from flashlib.inference.decode_operator import decode_torch  # registering operators imports PyTorch's compiler

        return decode_torch(*problem.values())
    return run_torch(problem)


def run_torch(problem: Problem) -> tuple[Tensor, Tensor]:
    """Request by request, so that nothing in a request's result can depend on its neighbours."""
    problem.check_values()  # the host reads them here in any case, and an index of PyTorch's may lie nowhere
    q, batch = problem.q, problem.q.shape[0]
    lengths = [problem.capacity] * batch if problem.lengths is None else problem.lengths.tolist()
    nothing = Partial.identity(0, *q.shape[1:3], problem.v.shape[3], dtype=_accumulate(q.dtype), device=q.device)
    results = [nothing, *(_decode_request(problem, request, length) for request, length in enumerate(lengths))]
    return torch.cat([result.out for result in results]).to(q.dtype), torch.cat([result.lse for result in results])


def _decode_request(problem: Problem, request: int, length: int) -> Partial:
    splits = {"split_size": problem.split_size} if problem.split_size else {"num_splits": problem.num_splits or 1}
    q = problem.q[request : request + 1]
    pieces = [Partial.identity(*q.shape[:3], problem.v.shape[3], dtype=_accumulate(q.dtype), device=q.device)]
    for keys in split_ranges(length, **splits, first=problem.first_key(length)):
        k, v = (_gather(x, request, keys, problem.block_table) for x in (problem.k, problem.v))
        pieces.append(_partial(q, k, v, length - keys.start, problem))
    return fold(pieces)


def _gather(x: Tensor, request: int, keys: range, block_table: Tensor | None) -> Tensor:
    """Some keys, or values, of one request: ``[1, Hkv, keys, channels]``."""
    if block_table is None:
        return x[request : request + 1, :, keys.start : keys.stop]
    key = torch.arange(keys.start, keys.stop, device=x.device)
    pages = block_table[request, key // x.shape[2]].long()
    return x[pages, :, key % x.shape[2]].transpose(0, 1)[None]


def _partial(q: Tensor, k: Tensor, v: Tensor, keys_from_here: int, problem: Problem) -> Partial:
    """Attention over one piece of the keys, of which the last query's is number ``keys_from_here - 1``."""
    mask = Window(problem.left, problem.right, offset=keys_from_here - q.shape[2])
    q, k, v = (x.to(_accumulate(x.dtype)) for x in (q, k, v))
    return Partial(*naive_attention(q, k, v, mask=mask, scale=problem.scale, softcap=problem.softcap, return_lse=True))


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _triton(problem: Problem) -> tuple[Tensor, Tensor]:
    precision = _precision(problem)
    if not has_data(*problem.tensors()):
        from flashlib.inference.decode_operator import decode_triton

        return decode_triton(*problem.values(), precision)
    # Not through the operator: a decoding step is short, and PyTorch's dispatch would cost as much again as the launch.
    return run_triton(problem, precision)


def _precision(problem: Problem) -> str:
    return current_config().triton.fp32_precision if problem.q.dtype == torch.float32 else "ieee"


def run_triton(problem: Problem, precision: str) -> tuple[Tensor, Tensor]:
    """By the kernels; ``precision`` of fp32 products as in :class:`flashlib.config.TritonConfig`."""
    if may_read(*(x for x in (problem.q, problem.lengths, problem.block_table) if x is not None)):
        problem.check_values()
    return launch_decode(problem.q, problem.k, problem.v, problem.options(precision))


def _cpu(problem: Problem) -> tuple[Tensor, Tensor]:
    from flashlib.launch.cpu.operators import decode

    size = problem.split_size or (_blocks(problem.capacity, problem.num_splits) if problem.num_splits else 0)
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


def _no_triton(device: torch.device) -> str | None:
    from flashlib.launch.start import TRITON_INSTALLED, interpreting

    if not TRITON_INSTALLED:
        return "triton is not installed (it exists for Linux only)"
    expected = "cpu" if interpreting() else "cuda"
    if device.type != expected:
        return f"the kernels run on {expected} here; the tensors are on {device}"
    return None


def _too_wide(head_dim: int) -> str | None:
    return f"takes a head_dim of at most 256; got {head_dim}" if head_dim > 256 else None


def _needs_grad(*tensors: Tensor) -> str | None:
    if any(has_tangent(x) for x in tensors):
        return "has no forward-mode derivative; backend 'torch' has one"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "has no gradient: call it under torch.no_grad(), or take backend 'torch', or flashlib.attention"
    return None


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


# What is refused


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise TypeError(
                f"{name} is {x.dtype}; expected float16, bfloat16, float32 or float64, one dtype for q, k and v"
            )
        if x.dim() != 4 or x.shape[3] < 1:
            raise ValueError(f"{name} must be 4-dimensional, with at least one channel; got shape {tuple(x.shape)}")
        if x.device != q.device:
            raise TypeError(f"{name} is on {x.device} but q is on {q.device}; all must be on one device")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in all but their channels: {shapes}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head_dim {k.shape[3]} but q has head_dim {q.shape[3]}: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k has {k.shape[1]}; expected a multiple of the KV heads: {shapes}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"{name} must have its channels next to each other; got strides {x.stride()} for shape {tuple(x.shape)}"
            )
    if block_table is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k has batch {k.shape[0]} but q has batch {q.shape[0]}: {shapes}; or is a block_table missing?"
            )
        return
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table must be a torch.Tensor or None; got {type(block_table).__name__}")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table is {block_table.dtype}; expected int32")
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table must be [{q.shape[0]}, max_pages]; got shape {tuple(block_table.shape)}")
    if block_table.device != q.device:
        raise TypeError(f"block_table is on {block_table.device} but q is on {q.device}; all must be on one device")
    if block_table.stride(1) != 1 and block_table.shape[1] > 1:
        raise ValueError(
            f"block_table must have the pages of a request next to each other; got strides {block_table.stride()}"
        )
    if k.shape[2] == 0:
        raise ValueError(f"with a block_table, k must have pages of at least one key: {shapes}")


def _check_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window must be (left, right), each an int or None; got {window!r}")
    for side, width in zip(("left", "right"), window, strict=True):
        if width is not None:
            _check_count(f"window's {side}", width, 0)
    return Window(*window).band()  # a width beyond all lengths is no limit


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace for a dynamic float
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)
