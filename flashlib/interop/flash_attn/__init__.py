"""The functions of the ``flash_attn`` package, version 2.8, on :func:`flashlib.attention`.

A program written for flash_attn changes its import and nothing else::

    from flashlib.interop.flash_attn import flash_attn_func, flash_attn_varlen_func
    from flashlib.interop.flash_attn.bert_padding import pad_input, unpad_input

A program that imports flash_attn itself, and transformers with ``attn_implementation="flash_attention_2"``, get these functions after
:func:`install`. Names, argument order, layouts, defaults and return values are those of flash_attn. It runs on every device that
:func:`flashlib.attention` runs on, a CPU too, on the backend that :func:`flashlib.use_config` says.

=========================  ====================================================================================
flash_attn 2.8             here
=========================  ====================================================================================
dtypes                     fp16 and bf16 as there; fp32 and fp64 too
head_dim                   any; v may have another than q and k; there at most 256, one for all
GQA, MQA                   as there: query head h uses KV head ``h // (nheads // nheads_k)``
softmax_scale, softcap     as there
causal, window_size        as there: aligned bottom-right, in each sequence where they are packed
cu_seqlens                 as there, int32 or int64. Sequences may be empty; tokens behind the last one give 0. Never read on a GPU,
                           so that calls go into CUDA graphs; :func:`flashlib.check_values` has them checked there
max_seqlen                 as there: sizes come from it
alibi_slopes               as there; the LSE is that of the biased scores. There, with causal and no window, that of row i is
                           larger by ``slope * (i + seqlen_k - seqlen_q)``
deterministic              as there; gradients come only from backends that repeat them bit by bit
return_attn_probs          ``(out, softmax_lse, S_dmask)``; as there, S_dmask is empty where there is no dropout, and else the softmax
                           with a minus where it is dropped, without the padding to multiples of 128 that it has there
flags                      what has a truth value, as there: ``causal=1``
torch.autocast             q, k and v are cast to its dtype; there they must have it
torch.compile              one graph, also for sizes that change
gradient through the LSE   computed; there it is silently 0
a row that sees nothing    out 0, as there; its LSE is -inf, the log of an empty sum; there it is +inf
dropout_p                  as there, by other bits: :mod:`flashlib.dropout`
block_table                as there: forward only. Pages of any size, there multiples of 256
flash_attn_with_kvcache    as there, all arguments; cache_leftpad with pages too
flash_attn_combine         as in FlashAttention-3: ``(out, lse)``
=========================  ====================================================================================

A call with packed sequences is one problem with one mask, :class:`flashlib.masks.Varlen`: no loop over the sequences and no
matrix of all queries by all keys.

Source: the signatures and docstrings of flash_attn 2.8 (github.com/Dao-AILab/flash-attention).
"""

from flashlib.interop.flash_attn import bert_padding as bert_padding
from flashlib.interop.flash_attn.flash_attn_interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flashlib.interop.flash_attn.stand_in import VERSION, install, installed, uninstall

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "installed",
    "uninstall",
]

__version__ = VERSION
