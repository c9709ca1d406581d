"""flash_attn's functions: read its layouts, make the mask, call :func:`flashlib.attention`, answer in its layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlib import routes
from flashlib.attention import attention
from flashlib.autocast import autocast_inputs, autocast_off
from flashlib.backends import config_for
from flashlib.config import FlashAttentionConfig, current_config
from flashlib.dropout import draw_seed
from flashlib.interop.flash_attn.arguments import Options, check_tensors, whole
from flashlib.interop.flash_attn.kv_cache import flash_attn_combine, flash_attn_with_kvcache
from flashlib.interop.flash_attn.pages import Pages, check_indices, decode, forward_only
from flashlib.masks import Mask, Varlen, Window
from flashlib.reference import naive_attention
from flashlib.routes import find_route, packed_key, related_route
from flashlib.spec import AttentionSpec
from flashlib.values import may_read

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

PACKED_DIMS = 3  # [total, nheads, headdim]
MOST_DECODED = 16  # queries of a sequence; with more, decoding would read its keys several times

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over a batch of sequences of one length.

    Args:
        q: ``[batch, seqlen_q, nheads, headdim]``.
        k: ``[batch, seqlen_k, nheads_k, headdim]``; nheads is a multiple of nheads_k (GQA, MQA).
        v: ``[batch, seqlen_k, nheads_k, headdim_v]``.
        dropout_p: as in :func:`flashlib.attention`; the seed is drawn from the device's default generator.
        softmax_scale: positive factor on the scores; None for ``1 / sqrt(headdim)``.
        causal: row i sees keys ``j <= i + seqlen_k - seqlen_q``.
        window_size: ``(left, right)``: row i sees keys ``i + seqlen_k - seqlen_q - left`` to ``i + seqlen_k - seqlen_q + right``,
            both included; a negative number for no limit. With ``causal``, right is 0.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 or less for none.
        alibi_slopes: fp32 ``[nheads]`` or ``[batch, nheads]``: ``slope * |i + seqlen_k - seqlen_q - j|`` is taken from the score.
        deterministic: only use backends whose gradients are the same bits every time.
        return_attn_probs: also return the LSE, and S_dmask.

    Returns:
        out ``[batch, seqlen_q, nheads, headdim_v]``, contiguous. With ``return_attn_probs``, ``(out, softmax_lse, S_dmask)``:
        softmax_lse fp32 (fp64 for fp64 inputs) ``[batch, nheads, seqlen_q]``, natural logarithm. S_dmask ``[0]``, or with dropout
        ``[batch, nheads, seqlen_q, seqlen_k]``, of the LSE's dtype: the softmax, before any of it is dropped, with a minus where it is. It is a
        dense matrix and takes its time: for tests, as there.

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.
        flashlib.BackendUnavailableError: as :func:`flashlib.attention`.
    """
    options = Options.checked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    q, k, v = autocast_inputs(q, k, v)
    check_tensors(
        q=(q, "batch seqlen_q nheads headdim"),
        k=(k, "batch seqlen_k nheads_k headdim"),
        v=(v, "batch seqlen_k nheads_k headdim_v"),
    )
    return _padded(q, k, v, options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` for q, k and v in one tensor, qkv ``[batch, seqlen, 3, nheads, headdim]``.

    The other arguments, the results and the errors are those of :func:`flash_attn_func`.
    """
    options = Options.checked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    (qkv,) = autocast_inputs(qkv)
    check_tensors(qkv=(qkv, "batch seqlen 3 nheads headdim"))
    q, k, v = qkv.unbind(2)
    return _padded(q, k, v, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` for k and v in one tensor, kv ``[batch, seqlen_k, 2, nheads_k, headdim]``.

    The other arguments, the results and the errors are those of :func:`flash_attn_func`.
    """
    options = Options.checked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    q, kv = autocast_inputs(q, kv)
    check_tensors(q=(q, "batch seqlen_q nheads headdim"), kv=(kv, "batch seqlen_k 2 nheads_k headdim"))
    k, v = kv.unbind(2)
    return _padded(q, k, v, options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention over sequences of different lengths, packed one after another.

    Args:
        q: ``[total_q, nheads, headdim]``.
        k: ``[total_k, nheads_k, headdim]``. v: ``[total_k, nheads_k, headdim_v]``.
        cu_seqlens_q: int32 or int64 ``[batch + 1]``: sequence n has the queries ``cu_seqlens_q[n]`` up to ``cu_seqlens_q[n + 1]``.
            Queries behind the last sequence give 0 and LSE -inf.
        cu_seqlens_k: the same for keys; those behind the last sequence are not read.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence. No length is read on the host, but to check it
            (:mod:`flashlib.values`): sizes come from these two, so that a call may be captured into a CUDA graph and lengths may change.
        alibi_slopes: fp32 ``[nheads]`` or ``[batch, nheads]``.
        block_table: int32 or int64 ``[batch, max_num_blocks_per_seq]``: keys and values lie in pages, of any size; k is then
            ``[num_blocks, page_block_size, nheads_k, headdim]``, v the same with headdim_v, and token t of sequence n is slot
            ``t % page_block_size`` of page ``block_table[n, t // page_block_size]``. Pages that hold no token that a query sees may have
            any number. There is no backward pass then, as there: asking for a gradient raises NotImplementedError.

    The other arguments and the errors are those of :func:`flash_attn_func`; alignment is inside each sequence.

    With a block_table, a call with max_seqlen_q of at most 16 reads the pages where they lie. With more queries; or with a left window and
    more than one; or with alibi_slopes or dropout: keys and values are copied first, of at most max_seqlen_k tokens for each sequence.

    Returns:
        out ``[total_q, nheads, headdim_v]``, contiguous. With ``return_attn_probs``, ``(out, softmax_lse, S_dmask)``:
        softmax_lse ``[nheads, total_q]``; S_dmask ``[0]``, or with dropout ``[batch, nheads, max_seqlen_q, max_seqlen_k]``, with zeros behind
        the end of a sequence.
    """
    options = Options.checked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    if block_table is None:
        out = _packed_again(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), options)
        if out is not None:
            return out
    q, k, v = autocast_inputs(q, k, v)
    tokens = "total_k" if block_table is None else "num_blocks page_block_size"
    check_tensors(
        q=(q, "total_q nheads headdim"), k=(k, f"{tokens} nheads_k headdim"), v=(v, f"{tokens} nheads_k headdim_v")
    )
    sequences = _Sequences.checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is None:
        return _packed(q, k, v, sequences, options)
    return _paged(q, Pages(k, v, block_table), sequences, options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` for q, k and v in one tensor, qkv ``[total, 3, nheads, headdim]``.

    The other arguments, the results and the errors are those of :func:`flash_attn_varlen_func`.
    """
    options = Options.checked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    (qkv,) = autocast_inputs(qkv)
    check_tensors(qkv=(qkv, "total 3 nheads headdim"))
    q, k, v = qkv.unbind(1)
    return _packed_between(q, k, v, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen), options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` for k and v in one tensor, kv ``[total_k, 2, nheads_k, headdim]``.

    The other arguments, the results and the errors are those of :func:`flash_attn_varlen_func`.
    """
    options = Options.checked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    q, kv = autocast_inputs(q, kv)
    check_tensors(q=(q, "total_q nheads headdim"), kv=(kv, "total_k 2 nheads_k headdim"))
    k, v = kv.unbind(1)
    return _packed_between(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), options)


def _padded(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Result:
    """Attention for ``[batch, seqlen, nheads, headdim]``."""
    config = _config(options, (q, k, v), packed=False)
    return _attend(q, k, v, Window(*options.window_size), options.alibi_slopes, options, config)


@dataclass(frozen=True, eq=False)
class _Sequences:
    """Where packed sequences begin and end, and how long they are at most, which the host knows."""

    mask: Varlen
    longest_q: int
    longest_k: int

    @classmethod
    def checked(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> _Sequences:
        for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if not isinstance(cu_seqlens, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor [batch + 1]; got {type(cu_seqlens).__name__}")
        mask = Varlen(cu_seqlens_q, cu_seqlens_k)
        longest_q = _longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
        longest_k = _longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
        return cls(mask, longest_q, longest_k)

    def __len__(self) -> int:
        return self.mask.num_sequences

    def ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both cumulative lengths, int64 ``[N + 1]``."""
        ends_q, ends_k = self.mask.ends
        return ends_q.to(device), ends_k.to(device)


def _longest(name: str, max_seqlen: int, ends: Tensor) -> int:
    try:
        # A tensor of one element serves too, as there; if it is on a GPU, the caller has the host wait for it.
        max_seqlen = whole(max_seqlen.item() if isinstance(max_seqlen, Tensor) else max_seqlen)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {max_seqlen!r}") from None
    if may_read(ends) and len(ends) > 1 and max_seqlen < int(ends.diff().max()):
        longest = int(ends.diff().max())
        raise ValueError(f"{name} must be at least the length of the longest sequence, {longest}; got {max_seqlen}")
    return max_seqlen


def _packed_between(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], options: Options
) -> Result:
    """:func:`_packed` between cumulative lengths of queries and of keys, the longest of which are told."""
    out = _packed_again(q, k, v, ends, longest, options)
    return _packed(q, k, v, _Sequences.checked(*ends, *longest), options) if out is None else out


def _packed_again(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], options: Options
) -> Tensor | None:
    """What :func:`_packed` returns, if a call of the same class was checked before: then nothing is, and no mask is made. Else None."""
    if (
        torch.compiler.is_compiling()
        or not isinstance(q, Tensor)
        or not routes.on_gpu(q)
        or not type(longest[0]) is type(longest[1]) is int
        or options.alibi_slopes is not None
        or options.dropout_p
        or options.return_attn_probs
        or not (isinstance(k, Tensor) and isinstance(v, Tensor) and q.dim() == k.dim() == v.dim() == PACKED_DIMS)
    ):
        return None
    config = _config(options, (q, k, v), packed=True)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    key, given = packed_key(q, k, v, [*ends], options.window_size, options.softmax_scale, options.softcap, config)
    route = find_route(key) or related_route(key, q, k, v, given)
    return None if route is None else route(q, k, v, given)[0].transpose(0, 1).contiguous()


def _packed(q: Tensor, k: Tensor, v: Tensor, sequences: _Sequences, options: Options) -> Result:
    """Attention for ``[total, nheads, headdim]``: one problem of batch 1, whose mask keeps the sequences apart."""
    config = _config(options, (q, k, v), packed=True)
    mask, slopes = _packed_mask(sequences, q, options), _packed_slopes(options.alibi_slopes, sequences, q)
    result = _attend(q[None], k[None], v[None], mask, slopes, options, config)
    if not options.return_attn_probs:
        return result[0]
    out, lse, probabilities = result
    return out[0], lse[0], _by_sequence(probabilities, sequences) if options.dropout_p else probabilities


def _packed_mask(sequences: _Sequences, q: Tensor, options: Options) -> Mask:
    if options.window_size == (None, None):
        return sequences.mask
    return sequences.mask & Window(*options.window_size, sequences.mask)


def _packed_slopes(slopes: Tensor | None, sequences: _Sequences, q: Tensor) -> Tensor | None:
    """``[batch, nheads]`` as :func:`flashlib.attention` takes them: ``[1, nheads, total_q]``. All others as they are: it checks them."""
    if not isinstance(slopes, Tensor) or slopes.dim() < 2:
        return slopes
    count, nheads = len(sequences), q.shape[1]
    if slopes.shape != (count, nheads):
        raise ValueError(
            f"alibi_slopes has shape {tuple(slopes.shape)}; expected ({nheads},) or ({count}, {nheads}): one per query head, or "
            "one per sequence and query head"
        )
    behind = F.pad(slopes, (0, 0, 0, 1))  # rows behind the last sequence see nothing, and any slope will do
    return behind[sequences.mask.sequence_of_rows(len(q), slopes.device)].mT


def _paged(q: Tensor, pages: Pages, sequences: _Sequences, options: Options) -> Result:
    """:func:`_packed` for keys and values that lie in pages."""
    _check_pages(pages, sequences, q)
    with torch.no_grad():
        if _reads_pages_in_place(q, pages, sequences, options):
            results: Any = _decode(q, pages, sequences, options)
        else:
            result = _packed(q, *_seen_tokens(q, pages, sequences, options), sequences, options)
            results = result if options.return_attn_probs else (result,)
    inputs = (q, pages.keys, pages.values)
    results = forward_only("flash_attn_varlen_func with a block_table", results, inputs)
    return results if options.return_attn_probs else results[0]


def _seen_tokens(q: Tensor, pages: Pages, sequences: _Sequences, options: Options) -> tuple[Tensor, Tensor]:
    """Keys and values packed; those that no query sees hold anything, since their pages need not be there."""
    _, ends = sequences.mask.ends
    total = int(ends[-1]) if may_read(ends) else len(sequences) * min(sequences.longest_k, pages.capacity)
    intervals = _packed_mask(sequences, q, options).intervals(1, len(q), total, q.device)
    return pages.packed(ends, intervals.seen_keys()[0])


def _reads_pages_in_place(q: Tensor, pages: Pages, sequences: _Sequences, options: Options) -> bool:
    """Whether each sequence has few queries, the decoding kernel can do what is asked, and nobody says which backend is to run."""
    config, left = current_config(), options.window_size[0]
    few = len(sequences) > 0 and len(q) > 0 and 0 < sequences.longest_q <= MOST_DECODED
    # Padding in front of a sequence's queries would look at keys in front of all their windows, which may hold anything.
    few = few and (left is None or sequences.longest_q == 1)
    readable = all(x.stride(3) == 1 for x in (pages.keys, pages.values))
    plain = options.alibi_slopes is None and not options.dropout_p
    return few and readable and plain and config.backend == "auto" and not config.order


def _decode(q: Tensor, pages: Pages, sequences: _Sequences, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Every sequence is a request, and its queries are its newest tokens, with padding in front where it has fewer than others."""
    total, count, width, device = len(q), len(sequences), sequences.longest_q, q.device
    ends_q, ends_k = sequences.ends(device)
    row = ends_q[1:, None] - width + torch.arange(width, device=device)
    is_padding = row < ends_q[:-1, None]
    newest = q[row.clamp(0, total - 1)].masked_fill(is_padding[..., None, None], 0.0)
    lengths = ends_k.diff().clamp(min=0).masked_fill(ends_q.diff() == 0, 0)
    out, lse = decode(newest, pages, lengths, options)
    sequence = sequences.mask.sequence_of_rows(total, device)[0]
    behind, sequence = sequence >= count, sequence.clamp(max=count - 1)
    slot = torch.arange(total, device=device) - ends_q[sequence + 1] + width
    place = sequence * width + slot.clamp(0, width - 1)
    out = out.flatten(0, 1)[place].masked_fill(behind[:, None, None], 0.0)
    lse = lse.transpose(0, 1).flatten(1)[:, place].masked_fill(behind, float("-inf"))
    return out, lse, out.new_empty(0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, slopes: Tensor | None, options: Options, config: FlashAttentionConfig
) -> Result:
    """``out [B, S, H, Dv]`` for ``[B, S, H, D]``; with ``return_attn_probs`` also ``lse [B, H, S]`` and S_dmask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores: dict[str, Any] = {
        "mask": mask,
        "scale": options.softmax_scale,
        "softcap": options.softcap,
        "alibi_slopes": slopes,
    }
    seed = draw_seed(q.device) if options.dropout_p else None
    result: Any = attention(
        q,
        k,
        v,
        **scores,
        dropout_p=options.dropout_p,
        dropout_seed=seed,
        return_lse=options.return_attn_probs,
        config=config,
    )
    if not options.return_attn_probs:
        return result.transpose(1, 2).contiguous()
    out, lse = result
    probabilities = out.new_empty(0) if seed is None else _signed_softmax(q, k, scores, options.dropout_p, seed)
    return out.transpose(1, 2).contiguous(), lse, probabilities


@torch.no_grad()
def _signed_softmax(q: Tensor, k: Tensor, scores: dict, dropout_p: float, seed: Tensor) -> Tensor:
    """``[B, Hq, Sq, Sk]``: the softmax, with a minus where dropout takes it away."""
    with autocast_off(q.device):
        spec = AttentionSpec.from_tensors(q, k, k, dropout_p=dropout_p, dropout_seed=seed)
        q, k = (x.to(spec.accumulate_dtype) for x in (q, k))
        each_key_itself = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        softmax: Any = naive_attention(q, k, each_key_itself, **scores)
        keep: Any = spec.keep_factors(slice(0, spec.q_len), slice(0, spec.kv_len))
        return torch.where(keep > 0, softmax, -softmax)


def _by_sequence(probabilities: Tensor, sequences: _Sequences) -> Tensor:
    """``[batch, nheads, max_seqlen_q, max_seqlen_k]`` of those of the whole pack, ``[1, nheads, total_q, total_k]``."""
    ends = sequences.ends(probabilities.device)
    at, inside = [], []
    for side, longest, total in zip(
        ends, (sequences.longest_q, sequences.longest_k), probabilities.shape[2:], strict=True
    ):
        token = side[:-1, None] + torch.arange(longest, device=side.device)
        inside.append(token < side[1:, None])
        at.append(token.clamp(max=max(total - 1, 0)))
    blocks = probabilities[0][:, at[0][:, :, None], at[1][:, None, :]].transpose(0, 1)
    return torch.where((inside[0][:, :, None] & inside[1][:, None, :])[:, None], blocks, 0.0)


def _config(options: Options, tensors: tuple[Tensor, ...], *, packed: bool) -> FlashAttentionConfig:
    """The configuration in force, less the backends that would make a total_q x total_k matrix or unrepeatable gradients."""
    repeatable = options.deterministic and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return config_for(tensors[0].device.type, packed=packed, repeatable=repeatable)


def _check_pages(pages: Pages, sequences: _Sequences, q: Tensor) -> None:
    """Whether the table has a row for each sequence, of as many pages as its keys take, and the queries are there."""
    check_indices("block_table", pages.table, len(sequences), q.device, "[batch, max_num_blocks_per_seq]", ndim=2)
    ends_q, ends_k = sequences.mask.ends
    if not may_read(ends_q, ends_k):
        return
    longest = int(ends_k.diff().max()) if len(sequences) else 0
    if longest > pages.capacity:
        raise ValueError(
            f"block_table has {pages.table.shape[1]} pages of {pages.keys.shape[1]} tokens for each sequence, but cu_seqlens_k has a "
            f"sequence of {longest}"
        )
    if int(ends_q[-1]) > len(q):
        raise ValueError(f"cu_seqlens_q goes up to {int(ends_q[-1])}, but there are only {len(q)} tokens")
