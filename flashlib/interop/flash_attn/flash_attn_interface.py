"""flash_attn's functions: read its layouts, make the mask, call :func:`flashlib.attention`, answer in its layouts."""

from __future__ import annotations

import operator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlib.attention import attention
from flashlib.backends import BACKENDS, BackendUnavailableError, order_of_choice
from flashlib.config import FA2Config, FA3Config, FlashAttentionConfig, current_config
from flashlib.interop.flash_attn.arguments import Options, check_tensors
from flashlib.interop.flash_attn.kv_cache import flash_attn_combine, flash_attn_with_kvcache
from flashlib.interop.flash_attn.pages import Pages, check_indices, decode, forward_only
from flashlib.masks import Mask, Varlen, Window

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
        dropout_p: must be 0.
        softmax_scale: positive factor on the scores; None for ``1 / sqrt(headdim)``.
        causal: row i sees keys ``j <= i + seqlen_k - seqlen_q``.
        window_size: ``(left, right)``: row i sees keys ``i + seqlen_k - seqlen_q - left`` to ``i + seqlen_k - seqlen_q + right``,
            both included; a negative number for no limit. With ``causal``, right is 0.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 or less for none.
        alibi_slopes: fp32 ``[nheads]`` or ``[batch, nheads]``: ``slope * |i + seqlen_k - seqlen_q - j|`` is taken from the score.
        deterministic: only use backends whose gradients are the same bits every time.
        return_attn_probs: also return the LSE, and an empty tensor in the place of the probabilities, which exist nowhere.

    Returns:
        out ``[batch, seqlen_q, nheads, headdim_v]``, contiguous. With ``return_attn_probs``, ``(out, softmax_lse, S_dmask)``:
        softmax_lse fp32 (fp64 for fp64 inputs) ``[batch, nheads, seqlen_q]``, natural logarithm; S_dmask ``[0]``.

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.
        NotImplementedError: flash_attn can do this and flashlib cannot; the message names the argument.
        flashlib.BackendUnavailableError: as :func:`flashlib.attention`.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
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
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    check_tensors(qkv=(qkv, "batch seqlen 3 nheads headdim"))
    return _padded(*qkv.unbind(2), options)


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
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    check_tensors(q=(q, "batch seqlen_q nheads headdim"), kv=(kv, "batch seqlen_k 2 nheads_k headdim"))
    return _padded(q, *kv.unbind(2), options)


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
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence.
        alibi_slopes: fp32 ``[nheads]`` or ``[batch, nheads]``.
        block_table: int32 or int64 ``[batch, max_num_blocks_per_seq]``: keys and values lie in pages, of any size; k is then
            ``[num_blocks, page_block_size, nheads_k, headdim]``, v the same with headdim_v, and token t of sequence n is slot
            ``t % page_block_size`` of page ``block_table[n, t // page_block_size]``. Pages that hold no token that a query sees may have
            any number. There is no backward pass then, as there: asking for a gradient raises NotImplementedError.

    The other arguments and the errors are those of :func:`flash_attn_func`; alignment is inside each sequence.

    With a block_table, a decoding step, a few queries of each sequence and of all equally many, reads the pages where they lie. With
    more queries, or of some sequences more than of others, or with alibi_slopes, the sequences' keys and values are copied first.

    Returns:
        out ``[total_q, nheads, headdim_v]``, contiguous. With ``return_attn_probs``, ``(out, softmax_lse, S_dmask)``:
        softmax_lse ``[nheads, total_q]``; S_dmask ``[0]``.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    tokens = "total_k" if block_table is None else "num_blocks page_block_size"
    check_tensors(
        q=(q, "total_q nheads headdim"), k=(k, f"{tokens} nheads_k headdim"), v=(v, f"{tokens} nheads_k headdim_v")
    )
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
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
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    check_tensors(qkv=(qkv, "total 3 nheads headdim"))
    return _packed(*qkv.unbind(1), _sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), options)


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
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    check_tensors(q=(q, "total_q nheads headdim"), kv=(kv, "total_k 2 nheads_k headdim"))
    return _packed(q, *kv.unbind(1), _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), options)


def _padded(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Result:
    """Attention for ``[batch, seqlen, nheads, headdim]``."""
    config = _config(options, (q, k, v), packed=False)
    out, lse = _attend(q, k, v, Window(*options.window_size), options.alibi_slopes, options, config)
    return (out, lse, out.new_empty(0)) if options.return_attn_probs else out


def _packed(q: Tensor, k: Tensor, v: Tensor, sequences: Varlen, options: Options) -> Result:
    """Attention for ``[total, nheads, headdim]``: one problem of batch 1, whose mask keeps the sequences apart."""
    config = _config(options, (q, k, v), packed=True)
    mask, slopes = _packed_mask(sequences, q, options), _packed_slopes(options.alibi_slopes, sequences, q)
    out, lse = _attend(q[None], k[None], v[None], mask, slopes, options, config)
    return (out[0], lse[0], out.new_empty(0)) if options.return_attn_probs else out[0]


def _packed_mask(sequences: Varlen, q: Tensor, options: Options) -> Mask:
    if options.window_size == (None, None):
        return sequences
    return sequences & Window(*options.window_size, sequences.offset(len(q)))


def _packed_slopes(slopes: Tensor | None, sequences: Varlen, q: Tensor) -> Tensor | None:
    """``[batch, nheads]`` as :func:`flashlib.attention` takes them: ``[1, nheads, total_q]``. All others as they are: it checks them."""
    if not isinstance(slopes, Tensor) or slopes.dim() < 2:
        return slopes
    count, nheads = len(sequences.lengths_q), q.shape[1]
    if slopes.shape != (count, nheads):
        raise ValueError(
            f"alibi_slopes has shape {tuple(slopes.shape)}; expected ({nheads},) or ({count}, {nheads}): one per query head, or "
            "one per sequence and query head"
        )
    behind = F.pad(slopes, (0, 0, 0, 1))  # rows behind the last sequence see nothing, and any slope will do
    return behind[sequences.sequence_of_rows(len(q), slopes.device)].mT


def _paged(q: Tensor, pages: Pages, sequences: Varlen, options: Options) -> Result:
    """:func:`_packed` for keys and values that lie in pages."""
    _check_pages(pages, sequences, q)
    with torch.no_grad():
        if _is_decoding_step(pages, sequences, options):
            results = _decode(q, pages, sequences, options)
        else:
            result = _packed(q, *_seen_tokens(q, pages, sequences, options), sequences, options)
            results = result if options.return_attn_probs else (result,)
    inputs = (q, pages.keys, pages.values)
    results = forward_only("flash_attn_varlen_func with a block_table", results, inputs)
    return results if options.return_attn_probs else results[0]


def _seen_tokens(q: Tensor, pages: Pages, sequences: Varlen, options: Options) -> tuple[Tensor, Tensor]:
    """Keys and values packed; those that no query sees hold anything, since their pages need not be there."""
    total = int(sequences.lengths_k.sum())
    intervals = _packed_mask(sequences, q, options).intervals(1, len(q), total, q.device)
    return pages.packed(sequences.cu_seqlens_k, intervals.seen_keys()[0])


def _is_decoding_step(pages: Pages, sequences: Varlen, options: Options) -> bool:
    """Whether all sequences have equally many queries, and few, and nobody says which backend is to run."""
    config, queries = current_config(), sequences.lengths_q
    few = len(queries) > 0 and 0 < int(queries.max()) == int(queries.min()) <= MOST_DECODED
    readable = all(x.stride(3) == 1 for x in (pages.keys, pages.values))
    return few and readable and options.alibi_slopes is None and config.backend == "auto" and not config.order


def _decode(q: Tensor, pages: Pages, sequences: Varlen, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Every sequence is a request, and its queries are its newest tokens."""
    count, total = len(sequences.lengths_q), int(sequences.lengths_q.sum())
    lengths = sequences.cu_seqlens_k.to(q.device).diff()
    out, lse = decode(q[:total].unflatten(0, (count, -1)), pages, lengths, options)
    behind = len(q) - total  # queries behind the last sequence
    out = F.pad(out.flatten(0, 1), (0, 0, 0, 0, 0, behind))
    return out, F.pad(lse.transpose(0, 1).flatten(1), (0, behind), value=float("-inf")), out.new_empty(0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, slopes: Tensor | None, options: Options, config: FlashAttentionConfig
) -> tuple[Tensor, Tensor | None]:
    """``(out [B, S, H, Dv], lse [B, H, S])`` for ``[B, S, H, D]``; lse is None if nobody asked for it."""
    result = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        mask=mask,
        scale=options.softmax_scale,
        softcap=options.softcap,
        alibi_slopes=slopes,
        return_lse=options.return_attn_probs,
        config=config,
    )
    out, lse = result if options.return_attn_probs else (result, None)
    return out.transpose(1, 2).contiguous(), lse


def _config(options: Options, tensors: tuple[Tensor, ...], *, packed: bool) -> FlashAttentionConfig:
    """The configuration in force, less the backends that would make a total_q x total_k matrix or unrepeatable gradients."""
    config = current_config()
    repeatable = options.deterministic and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if repeatable:
        fa2, fa3 = (_changed(settings, deterministic=True) for settings in (config.fa2, config.fa3))
        config = _changed(config, fa2=fa2, fa3=fa3)
        if config.backend != "auto" and not BACKENDS[config.backend].repeats_gradients:
            raise BackendUnavailableError(
                f"deterministic=True: the gradients of {config.backend!r} may differ from run to run"
            )
    if config.backend == "auto" and (packed or repeatable):
        order = order_of_choice(config, tensors[0].device)
        unfit = [
            name
            for name in order
            if (packed and BACKENDS[name].makes_dense_mask) or (repeatable and not BACKENDS[name].repeats_gradients)
        ]
        allowed = [name for name in order if name not in unfit]
        if not allowed:
            raise BackendUnavailableError(
                f"none of {', '.join(order)} runs packed sequences, or gives deterministic gradients"
            )
        config = _changed(config, order=allowed)
    return config


def _changed(settings: FlashAttentionConfig | FA2Config | FA3Config, **changes):
    """``dataclasses.replace``, which torch.compile cannot trace on a configuration (PyTorch 2.13 fails inside)."""
    return type(settings)(**(vars(settings) | changes))


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> Varlen:
    """The boundaries of packed sequences as a mask."""
    given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    for name, cu_seqlens in given.items():
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor [batch + 1]; got {type(cu_seqlens).__name__}")
    if any(cu_seqlens.is_inference() for cu_seqlens in given.values()):
        sequences = Varlen(cu_seqlens_q, cu_seqlens_k)  # such tensors do not say when they are written to
    else:
        sequences = _known_sequences(cu_seqlens_q, cu_seqlens_k, cu_seqlens_q._version, cu_seqlens_k._version)
    _check_longest("max_seqlen_q", max_seqlen_q, sequences.lengths_q)
    _check_longest("max_seqlen_k", max_seqlen_k, sequences.lengths_k)
    return sequences


# All layers of a model are given the same cu_seqlens. Checking them waits for the GPU, so it is done once, not once per layer;
# the version counts the writes to a tensor.
@lru_cache(maxsize=8)
def _known_sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *versions: int) -> Varlen:
    return Varlen(cu_seqlens_q, cu_seqlens_k)


def _check_longest(name: str, max_seqlen: int, lengths: Tensor) -> None:
    try:
        max_seqlen = operator.index(max_seqlen)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {max_seqlen!r}") from None
    longest = int(lengths.max()) if len(lengths) else 0
    if max_seqlen < longest:
        raise ValueError(f"{name} must be at least the length of the longest sequence, {longest}; got {max_seqlen}")


def _check_pages(pages: Pages, sequences: Varlen, q: Tensor) -> None:
    """Whether the table has a row for each sequence, of as many pages as its keys take, and the queries are there."""
    count, total = len(sequences.lengths_k), int(sequences.lengths_q.sum())
    check_indices("block_table", pages.table, count, q.device, "[batch, max_num_blocks_per_seq]", ndim=2)
    longest = int(sequences.lengths_k.max()) if count else 0
    if longest > pages.capacity:
        raise ValueError(
            f"block_table has {pages.table.shape[1]} pages of {pages.keys.shape[1]} tokens for each sequence, but cu_seqlens_k has a "
            f"sequence of {longest}"
        )
    if total > len(q):
        raise ValueError(f"cu_seqlens_q goes up to {total}, but there are only {len(q)} tokens")
