"""flash_attn's functions for decoding with a cache.

Every cache is seen as :class:`Pages` here: a contiguous one has one page for each request, as long as the cache, and
``cache_batch_idx`` is then nothing but its table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.autocast import autocast_active
from flashlib.interop.flash_attn.arguments import Options, check_alike, check_tensors, flag, whole
from flashlib.interop.flash_attn.pages import Pages, check_indices, check_range, decode, forward_only
from flashlib.masks import Mask, Window
from flashlib.rotary import turn_pairs
from flashlib.spec import AttentionSpec
from flashlib.values import may_read

__all__ = ["flash_attn_combine", "flash_attn_with_kvcache"]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new tokens over a cache, to which their keys and values may be appended first, in place.

    With seqlen_k the tokens of a request in the cache, the new ones included, and not counting its padding on the left: row i sees
    keys as in :func:`flash_attn_func`, aligned bottom-right to seqlen_k.

    Args:
        q: ``[batch, seqlen_q, nheads, headdim]``.
        k_cache: ``[batch_cache, seqlen_cache, nheads_k, headdim]``, or with block_table ``[num_blocks, page_block_size, nheads_k,
            headdim]``, of any page size.
        v_cache: the same, with headdim_v.
        k: ``[batch, seqlen_new, nheads_k, headdim]``: written to the cache behind cache_seqlens. There must be room: on a CPU, and
            on a GPU under :func:`flashlib.check_values`, an error says so before anything is written. Without it, where asking would wait for the
            GPU, a request without room for all its new tokens is left as it was, and its out and LSE are NaN.
        v: ``[batch, seqlen_new, nheads_k, headdim_v]``; with k or not at all.
        rotary_cos, rotary_sin: ``[seqlen_ro, rotary_dim / 2]``, at least as many rows as a request has room for tokens: k is turned
            by the rows cache_seqlens, cache_seqlens + 1, ..., and so is q with causal or a window; without them all of q is
            turned by the row cache_seqlens. Only together with k.
        cache_seqlens: how many tokens each request has in the cache before this call, padding on the left included: an int for
            all or int32 or int64 ``[batch]``. None for all of the cache, if there is no k.
        cache_batch_idx: int32 or int64 ``[batch]``: which row of the cache each request has; None for 0, 1, 2, ... If a row comes
            twice and there is k, either may be the one that is written.
        cache_leftpad: int32 or int64 ``[batch]``: how many slots at the beginning of each request hold nothing. None for 0.
            On a GPU, where cache_seqlens, cache_batch_idx, cache_leftpad and block_table are not looked at, a request for which one of
            them cannot be gives NaN; nothing outside of the cache is read or written.
        block_table: int32 or int64 ``[batch, max_num_blocks_per_seq]``: the pages of each request; not with cache_batch_idx.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in :func:`flash_attn_func`.
        rotary_interleaved: channels 0 and 1 make a pair, 2 and 3, ...; if False 0 and rotary_dim / 2, ...
        num_splits: into how many parts the keys are cut, 0 for as many as seem best. A question of speed alone.
        return_softmax_lse: also return the LSE.

    Returns:
        out ``[batch, seqlen_q, nheads, headdim_v]``. With return_softmax_lse, ``(out, softmax_lse)``: ``[batch, nheads, seqlen_q]``,
        natural logarithm, fp32 (fp64 for fp64 inputs).

        There is no backward pass, as there: asking for a gradient raises NotImplementedError.

    With alibi_slopes or cache_leftpad the keys and values of all requests are copied, which decoding without them never does.

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.
        flashlib.BackendUnavailableError: as :func:`flashlib.attention`.
    """
    options = Options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False, False)
    rotary_interleaved = flag("rotary_interleaved", rotary_interleaved)
    return_softmax_lse = flag("return_softmax_lse", return_softmax_lse)
    q, k, v = _as_the_cache(k_cache, q, k, v)
    _check_layouts(q, k_cache, v_cache, k, v, paged=block_table is not None)
    _check_options(q, k_cache, v_cache, options, num_splits)
    inputs = (q, k_cache, v_cache, *(() if k is None else (k, v)))
    with torch.no_grad():
        cache = _cache(q, k_cache, v_cache, block_table, cache_batch_idx)
        before = _lengths_before(cache_seqlens, cache, new=k)
        leftpad = _leftpad(cache_leftpad, cache, before)
        if rotary_cos is not None or rotary_sin is not None:
            cos, sin = _checked_rotary(rotary_cos, rotary_sin, q, k, cache.capacity)
            rows = before[:, None] + torch.arange(k.shape[1], device=k.device)
            k = _turned(k, cos, sin, rows, interleaved=rotary_interleaved)
            advance = 0 if options.window_size == (None, None) else 1
            rows = before[:, None] + advance * torch.arange(q.shape[1], device=q.device)
            q = _turned(q, cos, sin, rows, interleaved=rotary_interleaved)
        lengths = before
        if k is not None:
            # -1 is no length: what a request gives to whose cache nothing was written must not pass for a result.
            lengths = torch.where(cache.write(k, v, before), before + k.shape[1], -1)
        if alibi_slopes is None and leftpad is None:
            out, lse = decode(q, cache, lengths, options, num_splits=num_splits)
        else:
            out, lse = _attend_to_copies(q, cache, lengths, leftpad, options)
    out, lse = forward_only("flash_attn_with_kvcache", (out, lse), inputs)
    return (out, lse) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over each of several parts of them.

    Args:
        out_partial: ``[num_splits, batch, seqlen, nheads, headdim]``, fp32; num_splits at least 1.
        lse_partial: ``[num_splits, batch, seqlen, nheads]``, fp32, natural logarithm. -inf for a part without keys: its output is not
            looked at.
        out: where to write the result, ``[batch, seqlen, nheads, headdim]``; None for a new tensor.
        out_dtype: dtype of the new tensor; None for fp32.

    Returns:
        ``(out, lse)``: lse fp32 ``[batch, seqlen, nheads]``. Rows without any keys: 0 and -inf.

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.

    Source: the function of this name in FlashAttention-3 (``hopper/`` in flash_attn's repository); Dao et al. 2023, Flash-Decoding.
    """
    from flashlib.inference.decode import combine_splits

    _check_partials(out_partial, lse_partial)
    if out is None:
        return combine_splits(out_partial, lse_partial, dtype=out_dtype)
    _check_destination(out, out_dtype, out_partial[0])
    whole, lse = combine_splits(out_partial, lse_partial, dtype=out.dtype)
    return out.copy_(whole), lse


def _cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None, cache_batch_idx: Tensor | None
) -> Pages:
    batch, rows = q.shape[0], k_cache.shape[0]
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx must be None where there is a block_table, which says it already")
        check_indices("block_table", block_table, batch, q.device, "[batch, max_num_blocks_per_seq]", ndim=2)
        return Pages(k_cache, v_cache, block_table)
    if cache_batch_idx is not None:
        check_indices("cache_batch_idx", cache_batch_idx, batch, q.device, "[batch]")
        check_range("cache_batch_idx", cache_batch_idx, 0, rows - 1)
        if k_cache.shape[1]:
            return Pages(k_cache, v_cache, cache_batch_idx[:, None])
        # Rows without room for a token are no pages, and each of them is like any other.
        k_cache, v_cache = (x.new_empty(batch, *x.shape[1:]) for x in (k_cache, v_cache))
    elif rows < batch:
        raise ValueError(f"k_cache must hold at least as many requests as q, {batch}; got shape {tuple(k_cache.shape)}")
    table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    return Pages(k_cache[:batch], v_cache[:batch], table, True)


def _lengths_before(cache_seqlens: int | Tensor | None, cache: Pages, new: Tensor | None) -> Tensor:
    """How many tokens each request holds before the new ones come: int64 ``[batch]``."""
    batch, capacity = len(cache.table), cache.capacity
    if cache_seqlens is None:
        if new is not None:
            raise ValueError("cache_seqlens must say where k is to be written; got None")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, Tensor):
        check_indices("cache_seqlens", cache_seqlens, batch, cache.table.device, "[batch]")
        known = lengths = cache_seqlens.to(torch.int64)
    else:
        try:
            known = whole(cache_seqlens)
        except TypeError:
            raise TypeError(f"cache_seqlens must be an int or a torch.Tensor [batch]; got {cache_seqlens!r}") from None
        lengths = torch.full((batch,), known, dtype=torch.int64, device=cache.table.device)
    count = 0 if new is None else new.shape[1]
    if batch and count > capacity:
        raise ValueError(f"k has {count} new tokens for each request, but there is room for {capacity}")
    why = ", where each request has room for {capacity} tokens"
    check_range("cache_seqlens", known, 0, capacity - count, why, capacity=capacity)
    return lengths


def _leftpad(cache_leftpad: Tensor | None, cache: Pages, lengths: Tensor) -> Tensor | None:
    if cache_leftpad is None:
        return None
    check_indices("cache_leftpad", cache_leftpad, len(cache.table), cache.table.device, "[batch]")
    check_range("cache_leftpad", cache_leftpad, 0, cache.capacity)
    return cache_leftpad.to(torch.int64)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """x ``[batch, seqlen, heads, headdim]``, each token turned by its row of the tables."""
    positions = positions.clamp(0, len(cos) - 1)  # of rows of q that stand behind the end, whose output has no meaning
    return turn_pairs(x.transpose(1, 2), cos[positions], sin[positions], interleaved=interleaved).transpose(1, 2)


def _attend_to_copies(
    q: Tensor, cache: Pages, lengths: Tensor, leftpad: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Every request's tokens copied so that the last one is the last key: then one bottom-right mask, and one ALiBi, fits all."""
    capacity, device = cache.capacity, q.device
    leftpad = torch.zeros_like(lengths) if leftpad is None else leftpad
    sound = (lengths >= 0) & (lengths <= capacity) & (leftpad >= 0) & (leftpad <= capacity)
    shift = capacity - lengths.where(sound, 0)[:, None]
    start = (shift + leftpad.where(sound, 0)[:, None]).clamp(max=capacity)
    slots, request = torch.arange(capacity, device=device), torch.arange(len(lengths), device=device)[:, None]
    # Before the first token the table may hold anything: no row sees what is read there.
    positions = (slots - shift).clamp(min=0)
    page, slot, there = cache.places(request, positions)
    if may_read(there):
        left = options.window_size[0]
        first_seen = start if left is None else start.clamp(min=capacity - q.shape[1] - left)
        cache.check(request, positions, (slots >= first_seen) & ~there)
    out, lse = attention(
        q.transpose(1, 2),
        *(x.transpose(1, 2) for x in cache.read(page, slot, there)),
        mask=_KeysFrom(start) & Window(*options.window_size),
        scale=options.softmax_scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        return_lse=True,
    )
    unsound = ~sound[:, None, None]
    out = out.transpose(1, 2).masked_fill(unsound[..., None], float("nan"))
    return out.contiguous(), lse.masked_fill(unsound, float("nan"))


@dataclass(frozen=True, eq=False)
class _KeysFrom(Mask):
    """A batch padded on the left: sequence b has the keys from ``start[b]`` on. start: int64 ``[B, 1]``."""

    start: Tensor

    def bounds(self, batch, q_len, kv_len, device):
        return self.start.to(device), torch.full_like(self.start, kv_len, device=device)


def _as_the_cache(k_cache: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Under ``torch.autocast`` what is new comes in the dtype of the cache, in which it is kept. Attention casts both."""
    if not isinstance(k_cache, Tensor) or not autocast_active(k_cache.device.type):
        return tensors
    return tuple(x.to(k_cache.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors)


def _check_layouts(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, *, paged: bool
) -> None:
    lead = "num_blocks page_block_size" if paged else "batch_cache seqlen_cache"
    layouts: dict[str, Any] = {
        "q": (q, "batch seqlen_q nheads headdim"),
        "k_cache": (k_cache, f"{lead} nheads_k headdim"),
        "v_cache": (v_cache, f"{lead} nheads_k headdim_v"),
    }
    if (k is None) != (v is None):
        given, missing = ("k", "v") if v is None else ("v", "k")
        raise ValueError(f"{missing} must be given where {given} is; got None")
    if k is not None:
        layouts["k"] = (k, "batch seqlen_new nheads_k headdim")
        layouts["v"] = (v, "batch seqlen_new nheads_k headdim_v")
    check_tensors(**layouts)


def _check_options(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options, num_splits: int) -> None:
    """What attention would refuse is refused here, before the cache is written to."""
    no_keys, no_values = (x.new_empty(len(q), x.shape[2], 0, x.shape[3]) for x in (k_cache, v_cache))
    softcap, slopes = options.softcap, options.alibi_slopes
    AttentionSpec.from_tensors(
        q.transpose(1, 2), no_keys, no_values, scale=options.softmax_scale, softcap=softcap, alibi_slopes=slopes
    )
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits must be an int of at least 0; got {num_splits!r}")


def _checked_rotary(cos: Any, sin: Any, q: Tensor, k: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
    """Both tables, if they are what they must be."""
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(table, Tensor) or not table.is_floating_point():
            came = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"{name} must be a floating-point torch.Tensor [seqlen_ro, rotary_dim / 2]; got {came}")
        if table.dim() != 2 or table.shape != cos.shape or not 0 < 2 * table.shape[1] <= q.shape[3]:
            raise ValueError(
                f"{name} must be [seqlen_ro, rotary_dim / 2], as the other table, with rotary_dim at most headdim, {q.shape[3]}; "
                f"got shape {tuple(table.shape)}"
            )
        if table.device != q.device:
            raise TypeError(f"{name} has device {table.device}, but q has {q.device}; all must have one")
    if k is None:
        raise ValueError("rotary_cos and rotary_sin turn new keys and the queries with them; they need k and v")
    if len(cos) < capacity:
        raise ValueError(f"rotary_cos must have a row for each of the cache's {capacity} positions; got {len(cos)}")
    return cos, sin


def _check_partials(out_partial: Tensor, lse_partial: Tensor) -> None:
    for name, partial, ndim in (("out_partial", out_partial, 5), ("lse_partial", lse_partial, 4)):
        layout = ", ".join(("num_splits", "batch", "seqlen", "nheads", "headdim")[:ndim])
        if not isinstance(partial, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor [{layout}]; got {type(partial).__name__}")
        if partial.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {partial.dtype}")
        if partial.dim() != ndim or partial.shape[:4] != out_partial.shape[:4] or not len(partial):
            raise ValueError(
                f"{name} must be [{layout}] with num_splits at least 1, as the other; got shape {tuple(partial.shape)}"
            )
    check_alike({"out_partial": out_partial, "lse_partial": lse_partial})


def _check_destination(out: Tensor, out_dtype: torch.dtype | None, whole: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor or None; got {type(out).__name__}")
    if out.shape != whole.shape or out.device != whole.device:
        raise ValueError(
            f"out must be {tuple(whole.shape)} on {whole.device}; got shape {tuple(out.shape)} on {out.device}"
        )
    if out_dtype not in (None, out.dtype):
        raise TypeError(f"out_dtype must be None or that of out, {out.dtype}; got {out_dtype}")
