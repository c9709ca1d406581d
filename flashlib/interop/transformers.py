"""Hugging Face ``transformers`` models on :func:`flashlib.attention`, and on our KV cache.

    from flashlib.interop.transformers import FlashlibCache, set_attention

    set_attention(model, backend="tiled")                         # every layer now calls flashlib.attention
    model.generate(**inputs, past_key_values=FlashlibCache(capacity=512))

transformers asks two things of an attention implementation. One is a function that computes attention. The other is a
function that makes the mask: it gets a rule (causal, sliding window, packed documents ...) and the padding of the batch, once
per forward pass, and whatever it returns reaches every layer. Ours returns a :class:`flashlib.masks.Mask`, so that the layers
get two integers per row where others get an Sq x Sk matrix.

An attention function of your own goes in the same way: ``set_attention(model, my_attention)``.

Needs the extra ``models``: ``pip install 'flashlib[models]'``, transformers 5.20 or newer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, Cache, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        f"flashlib.interop.transformers needs transformers 5.20 or newer: pip install 'flashlib[models]' ({error})"
    ) from error

from flashlib.attention import attention
from flashlib.backends import BACKENDS
from flashlib.inference.cache import KVCache
from flashlib.masks import Causal, Intervals, Mask, RowIntervals, Unmasked, Window

# transformers looks into a name before it looks it up. One that contains "flash" sends it searching for the flash_attn
# package; "sdpa" and "flex_attention" are refused by models that those two cannot run; "|" and "/" have meanings of their own.
_MEANINGFUL = ("flash", "sdpa", "flex_attention", "eager", "|", "/")

# Arguments with which a model changes the result of attention itself, and which flashlib.attention does not have.
_UNSUPPORTED = {
    "s_aux": "attention sinks",
    "position_bias": "a learned bias on the scores",
    "head_mask": "a mask per head",
    "cache": "transformers' own paged cache",
    "output_attentions": "returning the attention weights (they are never formed)",
}

_STRIP_ELEMENTS = 1 << 22

# ``(q, k, v, *, mask, scale, softcap) -> out``, with the shapes and meanings of flashlib.attention.
AttentionFunction = Callable[..., Tensor]


def set_attention(model: PreTrainedModel, backend: str | AttentionFunction = "auto") -> None:
    """Make every attention layer of a model call :func:`flashlib.attention` with this backend, or a function of your own.

    ``model.set_attn_implementation("eager")`` or ``("sdpa")`` goes back to transformers' own.

    Args:
        model: a transformers model that finds its attention through ``AttentionInterface``, as nearly all do.
        backend: ``"auto"``, a name from :data:`flashlib.backends.BACKENDS`, or a function that is called as
            ``function(q, k, v, mask=mask, scale=scale, softcap=softcap)`` and returns ``[B, Hq, Sq, Dv]``; all as in
            :func:`flashlib.attention`.

    Raises:
        TypeError: ``model`` is not a transformers model, or ``backend`` is neither a name nor a function.
        ValueError: there is no such backend, or some of the model's attention cannot be replaced.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    name = register(backend)
    model.set_attn_implementation(name)
    for part in model.modules():
        # transformers only logs a warning where a part of a model keeps its own attention.
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != name:
            raise ValueError(f"model: the attention of {type(part).__name__} cannot be replaced, transformers says")


def register(backend: str | AttentionFunction = "auto", *, name: str | None = None) -> str:
    """Make a backend known to transformers, and say under which name.

    The name serves ``from_pretrained(..., attn_implementation=name)`` and ``model.set_attn_implementation(name)``. Registering
    twice is harmless.

    Args:
        backend: as in :func:`set_attention`.
        name: the name to use; ``fl_`` and the backend's unless given, with what transformers would misread shortened:
            ``fl_auto``, ``fl_tiled``, ``fl_torch_sdp_fa`` for torch_sdpa_flash.

    Raises:
        TypeError: ``backend`` is neither a name nor a function.
        ValueError: there is no such backend, or transformers would misread the name.
    """
    if callable(backend):
        compute, own_name = partial(_checked, backend), f"function_{id(backend):x}"
    elif not isinstance(backend, str):
        raise TypeError(f"backend must be a name or a function; got {type(backend).__name__}")
    elif backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto', one of {', '.join(BACKENDS)}, or a function; got {backend!r}")
    else:
        compute, own_name = partial(attention, backend=backend), backend.replace("flash", "fa").replace("sdpa", "sdp")
    if name is None:
        name = f"fl_{own_name}"
    if not isinstance(name, str) or not name or any(part in name for part in _MEANINGFUL):
        raise ValueError(
            f"name must not contain {', '.join(_MEANINGFUL)}, which transformers reads its own way; got {name!r}"
        )
    AttentionInterface.register(name, partial(attention_forward, compute=compute))
    AttentionMaskInterface.register(name, make_mask)
    return name


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    *,
    compute: AttentionFunction = attention,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: the layer; its ``is_causal`` counts where neither a mask nor ``is_causal`` says more.
        query: ``[B, Hq, Sq, D]``. key, value: ``[B, Hkv, Sk, D]`` and ``[B, Hkv, Sk, Dv]``, never repeated for GQA.
        attention_mask: from :func:`make_mask`; or a 4-D matrix that the caller made; or None.
        compute: what computes attention, with the arguments of :func:`flashlib.attention`.
        scaling, softcap: as ``scale`` and ``softcap`` of :func:`flashlib.attention`.
        dropout: must be 0.
        sliding_window: is already in the mask.

    Returns:
        ``(out [B, Sq, Hq, Dv], None)``: None stands for the attention weights.

    Raises:
        ValueError: the model asks for something that :func:`flashlib.attention` does not do; the message names it.
    """
    if dropout:
        raise ValueError(f"dropout must be 0: flashlib.attention has none; got {dropout} (config.attention_dropout)")
    for argument, meaning in _UNSUPPORTED.items():
        given = kwargs.get(argument)
        if given is not None and given is not False:
            raise ValueError(
                f"{argument} ({meaning}) is not supported by flashlib.attention; use attn_implementation='eager'"
            )
    if attention_mask is None:
        if sliding_window is not None:
            raise ValueError(
                f"sliding_window={sliding_window} came without a mask; expected one from transformers.masking_utils"
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = Causal() if causal else Unmasked()
    elif isinstance(attention_mask, Mask):
        mask = attention_mask
    else:
        mask = _mask_from_matrix(attention_mask)
    out = compute(query, key, value, mask=mask, scale=scaling, softcap=softcap or 0.0)
    return out.transpose(1, 2).contiguous(), None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Mask:
    """What transformers calls once per forward pass to make the mask.

    The rule is whatever ``mask_function`` says (causal, window, packed documents, blocks that see each other ...) together with
    the padding. It is asked strip by strip, so that no Sq x Sk matrix is ever held, and each row keeps its first and last key.

    Args:
        batch_size, q_length, kv_length: B, Sq, Sk.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: ``(batch, head, query position, key position) -> bool``.
        attention_mask: bool ``[B, tokens so far]``, False for padding; or None.
        use_vmap: whether ``mask_function`` must be called element by element.
        kwargs: for the mask functions of transformers' own implementations.

    Raises:
        ValueError: a row sees keys in several runs, which no flashlib mask can say.
    """
    rows = max(1, _STRIP_ELEMENTS // max(1, batch_size * kv_length))
    strips = []
    for row in range(0, q_length, rows):
        visible = sdpa_mask(
            batch_size,
            min(rows, q_length - row),
            kv_length,
            q_offset=q_offset + row,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        strips.append(_runs(visible[:, 0], row))
    start, stop = (torch.cat(side, dim=1) for side in zip(*strips, strict=True))
    return _simplest(RowIntervals(start, stop, kv_length))


def _checked(function: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Call a function that is not ours, and see that its result can be what it should be."""
    out = function(q, k, v, **options)
    expected = [*q.shape[:3], v.shape[3]]
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor; got {type(out).__name__}")
    if list(out.shape) != expected or out.dtype != q.dtype:
        raise ValueError(f"{name} must return {expected} {q.dtype}; got {list(out.shape)} {out.dtype}")
    return out


def _mask_from_matrix(matrix: Tensor) -> Mask:
    """A caller's own 4-D mask, bool (True = visible) or additive (0 = visible, the dtype's minimum or -inf = hidden)."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"attention_mask must be a flashlib mask, a tensor or None; got {type(matrix).__name__}")
    if matrix.dim() != 4 or matrix.shape[1] != 1:
        raise ValueError(f"attention_mask must be [B, 1, Sq, Sk], one for all heads; got {list(matrix.shape)}")
    if matrix.dtype == torch.bool:
        visible = matrix
    else:
        visible = matrix == 0
        if not (visible | (matrix <= torch.finfo(matrix.dtype).min)).all():
            raise ValueError("attention_mask must hold only 0 and the dtype's minimum: flashlib.attention adds no bias")
    start, stop = _runs(visible[:, 0], 0)
    return _simplest(RowIntervals(start, stop, matrix.shape[3]))


def _runs(visible: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """The run of keys that each row of ``visible`` [B, rows, Sk] sees: (start, stop), each int64 [B, rows]."""
    if visible.shape[2] == 0:
        empty = torch.zeros(visible.shape[:2], dtype=torch.int64, device=visible.device)
        return empty, empty
    beginnings = visible.clone()
    beginnings[..., 1:] &= ~visible[..., :-1]
    broken = beginnings.sum(-1) > 1
    if broken.any():
        entry, row = broken.nonzero()[0].tolist()
        runs = beginnings[entry, row].nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask: row {first_row + row} of batch entry {entry} sees several separate runs of keys, which begin at "
            f"{runs}; expected one run. Was the batch padded on the right and then continued? Generate with "
            "tokenizer.padding_side = 'left'"
        )
    count = visible.sum(-1)
    start = visible.to(torch.uint8).argmax(-1)
    return start, start + count


def _simplest(intervals: RowIntervals) -> Mask:
    """The same mask as a band, which every backend knows, if it is one."""
    q_len, kv_len = intervals.q_len, intervals.kv_len
    if 0 in (q_len, kv_len) or intervals.start.shape[0] == 0:
        return Intervals(intervals)
    first_stop, last_start = int(intervals.stop[0, 0]), int(intervals.start[0, -1])
    left = None if last_start == 0 else kv_len - 1 - last_start
    right = None if first_stop == kv_len else first_stop - 1 - (kv_len - q_len)
    if right is not None and right < 0:
        return Intervals(intervals)
    band = Window(left, right)
    expected = band.intervals(intervals.start.shape[0], q_len, kv_len, intervals.start.device)
    same = torch.equal(expected.start.expand_as(intervals.start), intervals.start)
    same = same and torch.equal(expected.stop.expand_as(intervals.stop), intervals.stop)
    return band if same else Intervals(intervals)


class KVCacheLayer(CacheLayerMixin):
    """One layer of a :class:`FlashlibCache`. Its memory is reserved at the first token, when the shapes are known.

    Attributes:
        store: the :class:`flashlib.inference.cache.KVCache`; None before the first token.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.store: KVCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads, _, head_dim = key_states.shape
        v_head_dim, dtype, device = value_states.shape[3], key_states.dtype, key_states.device
        self.store = KVCache(
            batch, kv_heads, self.capacity, head_dim, v_head_dim=v_head_dim, dtype=dtype, device=device
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append, and return everything there is: views of the store, not copies."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states, value_states)
        return self._show()

    def get_seq_length(self) -> int:
        return self.store.max_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens: transformers counts them below zero."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative or 0; got {tokens_to_remove}")
        if self.is_initialized:
            self.store.truncate(max(0, self.get_seq_length() + tokens_to_remove))
            self._show()

    def reset(self) -> None:
        if self.is_initialized:
            self.store.reset()
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.store.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("a FlashlibCache stays on its device: offloading is not supported")

    def _select(self, requests: Tensor) -> None:
        if self.is_initialized:
            self.store = self.store.select(requests)
            self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.store.keys, self.store.values
        return self.keys, self.values


class FlashlibCache(Cache):
    """A cache for ``model.generate(..., past_key_values=cache)`` and ``model(..., past_key_values=cache)``: a
    :class:`flashlib.inference.cache.KVCache` in every layer.

    Layers with a sliding window keep all tokens too; the mask hides the old ones.

    Args:
        capacity: how many tokens each request may hold, prompt and output together. One more raises
            :class:`flashlib.inference.cache.CacheFullError`.

    Raises:
        TypeError, ValueError: ``capacity`` is not a positive int.
    """

    def __init__(self, capacity: int) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity must be an int; got {type(capacity).__name__}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        super().__init__(layer_class_to_replicate=partial(KVCacheLayer, capacity))
        self.capacity = capacity

    @property
    def stores(self) -> list[KVCache]:
        """Each layer's :class:`flashlib.inference.cache.KVCache`; empty before the first token."""
        return [layer.store for layer in self.layers if layer.is_initialized]

    @property
    def nbytes(self) -> int:
        """Bytes reserved in all layers."""
        return sum(store.nbytes for store in self.stores)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one request takes in all layers."""
        return sum(store.bytes_per_token for store in self.stores)
