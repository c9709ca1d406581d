"""flash_attn's functions: read its layouts, make the mask, call :func:`flashlib.attention`, answer in its layouts."""

from __future__ import annotations

import operator
from functools import lru_cache

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.backends import BACKENDS, PREFERENCES, BackendUnavailableError
from flashlib.config import FA2Config, FA3Config, FlashAttentionConfig, current_config
from flashlib.interop.flash_attn.arguments import Options, check_tensors
from flashlib.interop.flash_attn.kv_cache import flash_attn_combine, flash_attn_with_kvcache
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
        alibi_slopes: fp32 ``[nheads]``, and then cu_seqlens_q must equal cu_seqlens_k.
        block_table: must be None: paged keys are not supported.

    The other arguments and the errors are those of :func:`flash_attn_func`; alignment is inside each sequence.

    Returns:
        out ``[total_q, nheads, headdim_v]``, contiguous. With ``return_attn_probs``, ``(out, softmax_lse, S_dmask)``:
        softmax_lse ``[nheads, total_q]``; S_dmask ``[0]``.
    """
    if block_table is not None:
        raise NotImplementedError("block_table (paged keys and values) is not supported here; it must be None")
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    check_tensors(
        q=(q, "total_q nheads headdim"), k=(k, "total_k nheads_k headdim"), v=(v, "total_k nheads_k headdim_v")
    )
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)


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
    return _packed(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, options)


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
    return _packed(q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)


def _padded(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Result:
    """Attention for ``[batch, seqlen, nheads, headdim]``."""
    out, lse = _attend(q, k, v, Window(*options.window_size), options, _config(options, (q, k, v), packed=False))
    return (out, lse, out.new_empty(0)) if options.return_attn_probs else out


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
) -> Result:
    """Attention for ``[total, nheads, headdim]``: one problem of batch 1, whose mask keeps the sequences apart."""
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k)
    _check_longest("max_seqlen_q", max_seqlen_q, sequences.lengths_q)
    _check_longest("max_seqlen_k", max_seqlen_k, sequences.lengths_k)
    _check_packed_slopes(options.alibi_slopes, sequences, len(q), len(k))
    mask: Mask = sequences
    if options.window_size != (None, None):
        mask = sequences & Window(*options.window_size, sequences.offset(len(q)))
    config = _config(options, (q, k, v), packed=True)
    out, lse = _attend(q[None], k[None], v[None], mask, options, config)
    return (out[0], lse[0], out.new_empty(0)) if options.return_attn_probs else out[0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: Options, config: FlashAttentionConfig
) -> tuple[Tensor, Tensor | None]:
    """``(out [B, S, H, Dv], lse [B, H, S])`` for ``[B, S, H, D]``; lse is None if nobody asked for it."""
    result = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        mask=mask,
        scale=options.softmax_scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
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
        order = config.order or [preference.backend for preference in PREFERENCES]
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


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Varlen:
    given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    for name, cu_seqlens in given.items():
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor [batch + 1]; got {type(cu_seqlens).__name__}")
    if any(cu_seqlens.is_inference() for cu_seqlens in given.values()):
        return Varlen(cu_seqlens_q, cu_seqlens_k)  # such tensors do not say when they are written to
    return _known_sequences(cu_seqlens_q, cu_seqlens_k, cu_seqlens_q._version, cu_seqlens_k._version)


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


def _check_packed_slopes(slopes: Tensor | None, sequences: Varlen, total_q: int, total_k: int) -> None:
    """ALiBi knows the distance of packed tokens only where queries and keys are the same ones."""
    if slopes is None:
        return
    if isinstance(slopes, Tensor) and slopes.dim() == 2:
        raise NotImplementedError("alibi_slopes [batch, nheads] is not supported for packed sequences; [nheads] is")
    if total_q != total_k or not torch.equal(sequences.lengths_q, sequences.lengths_k):
        raise NotImplementedError("alibi_slopes is not supported where cu_seqlens_q differs from cu_seqlens_k")
