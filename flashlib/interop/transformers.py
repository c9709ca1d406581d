"""Hugging Face ``transformers`` models on :func:`flashlib.attention`, and on our KV cache.

    from flashlib.interop.transformers import FlashlibCache, set_attention

    set_attention(model, backend="tiled")                         # every layer now calls flashlib.attention
    model.generate(**inputs, past_key_values=FlashlibCache(capacity=512))

transformers asks two things of an attention implementation. One is a function that computes attention. The other is a
function that makes the mask: it gets a rule (causal, sliding window, packed documents ...) and the padding of the batch, once
per forward pass, and whatever it returns reaches every layer. Ours returns two integers per row, the run of keys that it sees, where others
return an Sq x Sk matrix.

An attention function of your own goes in the same way: ``set_attention(model, my_attention)``.

Training under ``torch.autocast`` or in bf16, gradient checkpointing, dropout of attention weights, attention sinks, ``generate`` with every cache,
``generate_batch``, ``torch.compile`` and ``torch.export`` work as they do with transformers' own implementations.

Needs the extra ``models``: ``pip install 'flashlib[models]'``, transformers 5.20 or newer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

try:
    from transformers import AttentionInterface, Cache, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin
    from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        f"flashlib.interop.transformers needs transformers 5.20 or newer: pip install 'flashlib[models]' ({error})"
    ) from error

from flashlib.attention import attention
from flashlib.autocast import autocast_inputs
from flashlib.backends import BACKENDS
from flashlib.inference.cache import KVCache
from flashlib.masks import Causal, Intervals, Mask, RowIntervals, Unmasked, Varlen, Window, band_of
from flashlib.values import has_values

# transformers looks into a name before it looks it up. One that contains "flash" sends it searching for the flash_attn
# package; "sdpa" and "flex_attention" are refused by models that those two cannot run; "|" and "/" have meanings of their own.
_MEANINGFUL = ("flash", "sdpa", "flex_attention", "eager", "|", "/")

# Arguments with which a model changes the result of attention itself, and which flashlib.attention does not have.
_UNSUPPORTED = {
    "position_bias": "a learned bias on the scores",
    "head_mask": "a mask per head",
    "cache": "a paged cache that is not transformers' PagedAttentionCache",
    "block_table": "pages read in place",
    "output_attentions": "returning the attention weights (they are never formed)",
}

_STRIP_ELEMENTS = 1 << 22
# Made once: torch.compile in torch 2.11 cannot make one inside a function that it compiles.
_CAUSAL, _UNMASKED = Causal(), Unmasked()

# ``(q, k, v, *, mask, scale, softcap) -> out``, with the shapes and meanings of flashlib.attention. With ``dropout_p`` and ``sinks`` as well where
# a model asks for them.
AttentionFunction = Callable[..., Any]  # of q, k, v and options, to out
_ON_REQUEST = {"dropout_p": "dropout of attention weights", "sinks": "attention sinks"}


def set_attention(
    model: PreTrainedModel,
    backend: str | AttentionFunction = "auto",
    *,
    mesh: DeviceMesh | None = None,
    method: str = "auto",
    layout: str = "contiguous",
) -> None:
    """Make every attention layer of a model call :func:`flashlib.attention` with this backend, or a function of your own.

    With a mesh, every rank runs the model on its tokens, and the layers call :func:`flashlib.parallel.parallel_attention`::

        set_attention(model, mesh=mesh, layout="zigzag")
        ids = shard(input_ids, mesh, layout="zigzag", dim=1)
        logits = model(ids, position_ids=positions(length, mesh, layout="zigzag")[None]).logits   # of this rank's tokens

    ``model.set_attn_implementation("eager")`` or ``("sdpa")`` goes back to transformers' own.

    Args:
        model: a transformers model that finds its attention through ``AttentionInterface``, as nearly all do.
        backend: ``"auto"``, a name from :data:`flashlib.backends.BACKENDS`, or a function that is called as
            ``function(q, k, v, mask=mask, scale=scale, softcap=softcap)`` and returns ``[B, Hq, Sq, Dv]``; all as in
            :func:`flashlib.attention`. ``dropout_p=`` and ``sinks=`` come with it where the model asks for them, and only there.
        mesh: over whose ranks each sequence is spread; None for a rank that has the whole. Masks are then those of the model's rule, causal and sliding
            windows, by the place of a token in the layout, and not by ``position_ids``; packed sequences are told by ``cu_seq_lens_q``, of the whole. A batch is
            not padded. Dropout is refused.
        method, layout: as in :func:`flashlib.parallel.parallel_attention`.

    Raises:
        TypeError: ``model`` is not a transformers model, ``backend`` is neither a name nor a function, or there is a mesh and it is no name.
        ValueError: there is no such backend, or some of the model's attention cannot be replaced.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    name = register(backend) if mesh is None else _register_on_mesh(backend, mesh, method, layout)
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
    takes = tuple(_ON_REQUEST)
    if callable(backend):
        compute, own_name, takes = partial(_checked, backend), f"function_{id(backend):x}", _taken_by(backend)
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
    AttentionInterface.register(name, partial(attention_forward, compute=compute, takes=takes))
    AttentionMaskInterface.register(name, make_mask_tensor)
    _PAGED[name] = f"{name}_{_PAGED_SUFFIX}"
    AttentionInterface.register(_PAGED[name], partial(_paged_forward, compute=compute, takes=takes))
    _join_continuous_batching()
    return name


def _register_on_mesh(backend: str | AttentionFunction, mesh: DeviceMesh, method: str, layout: str) -> str:
    from flashlib.parallel import parallel_attention  # what needs no ranks does without torch.distributed

    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name where there is a mesh; got {type(backend).__name__}")
    compute = partial(parallel_attention, mesh=mesh, method=method, layout=layout, backend=backend)
    name = f"fl_{method}_{layout}_{backend}_on_{'x'.join(map(str, mesh.mesh.shape))}_{id(mesh):x}"
    AttentionInterface.register(name, partial(attention_forward, compute=compute, takes=("sinks",), on_mesh=True))
    AttentionMaskInterface.register(name, _no_mask_on_mesh)
    return name


def _no_mask_on_mesh(*_args: Any, attention_mask: Tensor | None = None, **_rule: Any) -> None:
    """transformers knows the tokens of one rank, and makes no mask of the whole. Each layer says its rule itself."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask must not hide tokens where a sequence is spread over a mesh: pack sequences and give cu_seq_lens_q, in place of padding"
        )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    *,
    compute: AttentionFunction = attention,
    takes: Collection[str] = tuple(_ON_REQUEST),
    on_mesh: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: the layer; its ``is_causal`` counts where neither a mask nor ``is_causal`` says more.
        query: ``[B, Hq, Sq, D]``. key, value: ``[B, Hkv, Sk, D]`` and ``[B, Hkv, Sk, Dv]``, never repeated for GQA. Under autocast their
            dtypes may differ, as rotary embeddings leave them; they are cast to its dtype.
        attention_mask: a mask of ours; or what :func:`make_mask_tensor` returns; or a 4-D matrix that the caller made; or None.
        compute: what computes attention, with the arguments of :func:`flashlib.attention`.
        takes: which of ``dropout_p`` and ``sinks`` it takes.
        on_mesh: whether the tokens are those of one rank, and the layer's rule is that of the whole sequence.
        scaling, softcap: as ``scale`` and ``softcap`` of :func:`flashlib.attention`.
        dropout: ``dropout_p`` there.
        s_aux: ``sinks`` there, ``[Hq]``.
        sliding_window: is already in the mask, where there is one.
        kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say where packed sequences end, as in flash_attn; ``cache``, a PagedAttentionCache of
            continuous batching, keeps the keys.

    Returns:
        ``(out [B, Sq, Hq, Dv], None)``: None stands for the attention weights.

    Raises:
        ValueError: the model asks for something that :func:`flashlib.attention` or ``compute`` does not do; the message names it.
    """
    if isinstance(kwargs.get("cache"), PagedAttentionCache) and kwargs.get("block_table") is None:
        key, value = kwargs.pop("cache").update(key, value, module.layer_idx, kwargs)
    for argument in kwargs:
        if argument in _UNSUPPORTED and kwargs[argument] is not None and kwargs[argument] is not False:
            raise ValueError(
                f"{argument} ({_UNSUPPORTED[argument]}) is not supported by flashlib.attention; use attn_implementation='eager'"
            )
    sharded = getattr(key, "flashlib_cache", None)
    query, key, value = autocast_inputs(query, key, value)
    options: dict[str, Any] = {}
    if dropout:
        options["dropout_p"] = dropout
    if s_aux is not None:
        options["sinks"] = s_aux
    for option in options:
        if option not in takes:
            raise ValueError(
                f"the model asks for {_ON_REQUEST[option]}, but {_name_of(compute)} takes no argument {option}; got "
                f"{'s_aux' if option == 'sinks' else f'dropout = {dropout} (config.attention_dropout or its like)'}"
            )
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = _mask_of_layer(query, causal, sliding_window, kwargs, on_mesh)
    elif on_mesh:
        raise ValueError("attention_mask must be None where a sequence is spread over a mesh: its rule is the layer's")
    else:
        kv_len = key.shape[2] if sharded is None else sharded.max_length
        mask, packed = _given_mask(attention_mask, kv_len), _packed(query, kwargs)
        mask = mask if packed is _UNMASKED else mask & packed
    if sharded is not None:
        if options:
            raise ValueError(
                f"a cache over several ranks has no {' and no '.join(_ON_REQUEST[option] for option in options)}"
            )
        newest = mask.band() == (None, 0) and sharded.is_uniform
        out = sharded.attend(query, mask=None if newest else mask, scale=scaling, softcap=softcap or 0.0)
        return out.transpose(1, 2).contiguous(), None
    out = compute(query, key, value, mask=mask, scale=scaling, softcap=softcap or 0.0, **options)
    return out.transpose(1, 2).contiguous(), None


def _paged_forward(module, query, key, value, attention_mask, **options):
    """What continuous batching calls in each layer. It makes no mask for it: the lengths of the packed requests come along."""
    if not isinstance(options.get("cache"), PagedAttentionCache):
        raise ValueError(
            f"attn_implementation={module.config._attn_implementation!r} is for model.generate_batch alone; use "
            "flashlib.interop.transformers.set_attention(model)"
        )
    return attention_forward(module, query, key, value, attention_mask, **options)


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
    *,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    config=None,
    **kwargs,
) -> Mask:
    """The mask of one forward pass, by transformers' rule.

    The rule is whatever ``mask_function`` says (causal, window, packed documents, blocks that see each other ...) together with
    the padding. It is asked strip by strip, so that no Sq x Sk matrix is ever held, and each row keeps its first and last key.

    Whether each row sees a single run of keys can only be seen by looking: on a GPU that waits once per forward pass, as transformers' own
    implementations do for the same batches. Where transformers says that the rule is a plain one, and there is no padding, nothing is looked at.
    While a CUDA graph is captured nothing can be: a row with several runs then sees from its first key to its last. Under torch.compile and
    torch.export the check becomes part of the graph (``torch._assert_async``).

    Args:
        batch_size, q_length, kv_length: B, Sq, Sk.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: ``(batch, head, query position, key position) -> bool``.
        attention_mask: bool ``[B, tokens so far]``, False for padding; or None.
        use_vmap: whether ``mask_function`` must be called element by element.
        allow_is_causal_skip: whether the rule is causal and nothing else, but for a window or chunk of ``local_size`` tokens.
        allow_is_bidirectional_skip: likewise for all that see all.
        config: the model's; says whether ``local_size`` is a window.
        kwargs: for the mask functions of transformers' own implementations.

    Raises:
        ValueError: a row sees keys in several runs, which no flashlib mask can say.
    """
    plain = None
    if not isinstance(q_offset, Tensor):
        sizes = q_length, kv_length, q_offset, kv_offset
        plain = _plain_rule(*sizes, allow_is_causal_skip, allow_is_bidirectional_skip, local_size, config)
    if plain is not None and attention_mask is None:
        return plain

    def visible(row: int, rows: int) -> Tensor:
        masks: Any = sdpa_mask
        return masks(
            batch_size,
            rows,
            kv_length,
            q_offset=q_offset + row,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )[:, 0]

    if torch.compiler.is_compiling() or not q_length:
        strips = [_runs(visible(0, q_length))]  # a loop would fix the number of rows
    else:
        rows = max(1, _STRIP_ELEMENTS // max(1, batch_size * kv_length))
        strips = [_runs(visible(row, min(rows, q_length - row))) for row in range(0, q_length, rows)]
    start, stop, broken = (torch.cat(side, dim=1) for side in zip(*strips, strict=True))
    return _one_run_per_row(start, stop, broken, kv_length, lambda row: visible(row, 1)[:, 0], plain)


def make_mask_tensor(
    batch_size: int, q_length: int, kv_length: int, *, device: torch.device | str = "cpu", **rule
) -> Tensor:
    """What transformers calls once per forward pass: :func:`make_mask`, as a tensor.

    ``generate`` with a static cache makes masks before it calls the model and hands them to compiled code, so that they have to be tensors, and
    of four dimensions, or the model would take them for the padding.

    Returns:
        int64 ``[B or 1, 1, Sq, 2]``: each row sees the keys ``start <= j < stop``. Outside of a tracer it remembers which mask it came from, so
        that layers can tell a plain band, which kernels know, from a list of rows.
    """
    mask = make_mask(batch_size, q_length, kv_length, device=device, **rule)
    if (
        mask is _CAUSAL
    ):  # in three operations instead of ten, of which each step of decoding would wait for the launches
        rows = torch.zeros(1, 1, q_length, 2, dtype=torch.int64, device=device)
        rows[0, 0, :, 1] = torch.arange(kv_length - q_length + 1, kv_length + 1, device=device).clamp(min=0)
    else:
        intervals = mask.intervals(batch_size, q_length, kv_length, device)
        rows = torch.stack([intervals.start, intervals.stop], dim=-1)[:, None]
    if has_values(rows):
        vars(rows)["flashlib_mask"] = mask
    return rows


def _plain_rule(q_len, kv_len, q_offset, kv_offset, causal, bidirectional, local_size, config) -> Mask | None:
    """The rule as a mask, where transformers says enough about it; what its own sdpa implementation goes by."""
    if 0 in (q_len, kv_len):
        return None
    everything = local_size is None or max(q_offset + q_len, kv_offset + kv_len) <= local_size
    if bidirectional and local_size is None:
        return _UNMASKED
    if not causal:
        return None
    if everything:
        left = None
    elif local_size == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None):
        left = local_size - 1
    else:
        return None
    offset = q_offset - kv_offset
    if offset == kv_len - q_len:
        offset = None
    return _CAUSAL if left is None and offset is None else Window(left, 0, offset)


def _mask_of_layer(query: Tensor, causal: bool, sliding_window: int | None, kwargs: dict, on_mesh: bool) -> Mask:
    """The mask where transformers made none."""
    packed = _packed(query, kwargs)
    if isinstance(packed, Unmasked):
        if sliding_window is not None and on_mesh:
            return Window(sliding_window - 1, 0 if causal else sliding_window - 1)
        if sliding_window is not None:
            raise ValueError(
                f"sliding_window={sliding_window} came without a mask; expected one from transformers.masking_utils"
            )
        return _CAUSAL if causal else _UNMASKED
    # The window counts the token itself.
    window = None if sliding_window is None else sliding_window - 1
    return packed & Window(window, 0 if causal else window, packed)


def _packed(query: Tensor, kwargs: dict) -> Varlen | Unmasked:
    """Where packed sequences end, if transformers' arguments for flash_attn say it."""
    ends_q, ends_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if ends_q is None:
        return _UNMASKED
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q says that sequences are packed into one; got a batch of {query.shape[0]}")
    return Varlen(ends_q, ends_k)


def _checked(function: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Call a function that is not ours, and see that its result can be what it should be."""
    out = function(q, k, v, **options)
    expected = [*q.shape[:3], v.shape[3]]
    if not isinstance(out, Tensor):
        raise TypeError(f"{_name_of(function)} must return a torch.Tensor; got {type(out).__name__}")
    if list(out.shape) != expected or out.dtype != q.dtype:
        raise ValueError(f"{_name_of(function)} must return {expected} {q.dtype}; got {list(out.shape)} {out.dtype}")
    return out


def _taken_by(function: AttentionFunction) -> tuple[str, ...]:
    """Which of the arguments that come only on request a function takes."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C: it will say itself what it does not take
        return tuple(_ON_REQUEST)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return tuple(option for option in _ON_REQUEST if takes_all or option in parameters)


def _name_of(function: AttentionFunction) -> str:
    while isinstance(function, partial):
        function = function.args[0] if function.func is _checked else function.func
    return getattr(function, "__name__", type(function).__name__)


def _given_mask(given: Mask | Tensor, kv_len: int) -> Mask:
    """The mask that a layer was given, in any of its forms."""
    if isinstance(given, Mask):
        return given
    if not isinstance(given, Tensor):
        raise TypeError(f"attention_mask must be a flashlib mask, a tensor or None; got {type(given).__name__}")
    if given.dim() != 4 or given.shape[1] != 1:
        raise ValueError(f"attention_mask must be [B, 1, Sq, Sk], one for all heads; got {list(given.shape)}")
    if given.dtype != torch.int64:
        return _mask_from_matrix(given)
    if given.shape[3] != 2:
        raise ValueError(
            f"attention_mask must be bool or floating, or [B, 1, Sq, 2] of ours; got {list(given.shape)} int64"
        )
    mask = None if torch.compiler.is_compiling() else getattr(given, "flashlib_mask", None)
    return mask or Intervals(RowIntervals(given[:, 0, :, 0], given[:, 0, :, 1], kv_len))


def _mask_from_matrix(matrix: Tensor) -> Mask:
    """A caller's own 4-D mask, bool (True = visible) or additive (0 = visible, the dtype's minimum or -inf = hidden)."""
    if not (matrix.dtype == torch.bool or matrix.is_floating_point()):
        raise TypeError(f"attention_mask must be bool or floating; got {matrix.dtype}")
    visible = matrix if matrix.dtype == torch.bool else matrix == 0
    if matrix.dtype != torch.bool:
        if not _can_look(matrix):
            raise ValueError(
                "attention_mask must be bool under a tracer or in a CUDA graph: whether a floating one holds a bias cannot be seen there"
            )
        if not (visible | (matrix <= torch.finfo(matrix.dtype).min)).all():
            raise ValueError("attention_mask must hold only 0 and the dtype's minimum: flashlib.attention adds no bias")
    visible = visible[:, 0]
    return _one_run_per_row(*_runs(visible), matrix.shape[3], lambda row: visible[:, row])


def _runs(visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each row of ``visible`` [B, rows, Sk] sees: (start, stop), each int64 [B, rows], and whether it is more than one run."""
    if visible.shape[2] == 0:
        empty = torch.zeros(visible.shape[:2], dtype=torch.int64, device=visible.device)
        return empty, empty, empty.bool()
    start = visible.to(torch.uint8).argmax(-1)
    stop = visible.shape[2] - visible.flip(-1).to(torch.uint8).argmax(-1)
    stop = torch.where(visible.any(-1), stop, 0)
    return start, stop, visible.sum(-1) != stop - start


def _one_run_per_row(
    start: Tensor,
    stop: Tensor,
    broken: Tensor,
    kv_len: int,
    visible_row: Callable[[int], Tensor],
    plain: Mask | None = None,
) -> Mask:
    """The mask of these rows: a band if it is one; refused if a row is broken. ``plain``: which band it may be, where that is known."""
    intervals = RowIntervals(start, stop, kv_len)
    if not _can_look(start):
        if torch.compiler.is_compiling():
            torch._assert_async(~broken.any(), "attention_mask: a row sees several separate runs of keys")
        return Intervals(intervals)
    if plain is None and start.device.type == "cpu":  # elsewhere each number that is looked at would be waited for
        plain = band_of(intervals)
    same = torch.zeros((), dtype=torch.bool, device=start.device)
    if plain is not None:
        expected = plain.intervals(start.shape[0], intervals.q_len, kv_len, start.device)
        same = (expected.start == start).all() & (expected.stop == stop).all()
    any_broken, is_plain = torch.stack([broken.any(), same]).tolist()
    if any_broken:
        entry, row = broken.nonzero()[0].tolist()
        seen = visible_row(row)[entry].long()
        runs = (seen.diff(prepend=torch.zeros_like(seen[:1])) == 1).nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask: row {row} of batch entry {entry} sees several separate runs of keys, which begin at "
            f"{runs}; expected one run. Was the batch padded on the right and then continued? Generate with "
            "tokenizer.padding_side = 'left'"
        )
    return plain if is_plain and plain is not None else Intervals(intervals)


def _can_look(x: Tensor) -> bool:
    """Whether there are numbers, and they may be waited for."""
    return has_values(x) and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


# Continuous batching

# It takes eager, sdpa, and what has "flash" in its name; for these it makes no mask, and takes CUDA graphs for granted. So each of our names has a
# second one that it reads so. What follows "flash" must hold no digit: 2 and 3 would be taken for versions, which are called in ways of their own.
_PAGED_SUFFIX = "paged_flash"
_PAGED: dict[str, str] = {}


@functools.cache
def _join_continuous_batching() -> None:
    """Have ``model.generate_batch`` take a model on our attention: it asks for the second name, and gives the first back when it ends."""
    usual = ContinuousBatchingManager.switch_to_cb_friendly_attn

    @functools.wraps(usual)
    def switch(self, model, auto_switch_to_flash=True):
        name = model.config._attn_implementation
        if name not in _PAGED:
            return usual(self, model, auto_switch_to_flash)
        for part in model.modules():
            # Not by set_attn_implementation, which tells models that have favourites among "flash" to take one of those.
            if isinstance(part, PreTrainedModel) and part.config._attn_implementation == name:
                part.config._attn_implementation_internal = _PAGED[name]
        self._original_attn_impl = name

    manager: Any = ContinuousBatchingManager
    manager.switch_to_cb_friendly_attn = switch


class KVCacheLayer(CacheLayerMixin):
    """One layer of a :class:`FlashlibCache`. Its memory is reserved at the first token, when the shapes are known.

    Attributes:
        store: the :class:`flashlib.inference.cache.KVCache`, or over a mesh the :class:`flashlib.parallel.ShardedKVCache`; None before the first token.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.capacity, self.mesh = capacity, mesh
        self.store: Any = None  # once it is initialized

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads, _, head_dim = key_states.shape
        sizes = (batch, kv_heads, self.capacity, head_dim)
        kind: Any = KVCache
        if self.mesh is not None:
            from flashlib.parallel import ShardedKVCache

            kind = partial(ShardedKVCache, self.mesh)
        self.store = kind(*sizes, v_head_dim=value_states.shape[3], dtype=key_states.dtype, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append, and return everything there is: views of the store, not copies. Under autocast, in its dtype."""
        key_states, value_states = autocast_inputs(key_states, value_states)
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
        if self.mesh is not None:
            vars(self.keys)["flashlib_cache"] = self.store  # by which attention_forward knows that they are not all
        return self.keys, self.values


class FlashlibCache(Cache):
    """A cache for ``model.generate(..., past_key_values=cache)`` and ``model(..., past_key_values=cache)``: a
    :class:`flashlib.inference.cache.KVCache` in every layer.

    Layers with a sliding window keep all tokens too; the mask hides the old ones.

    Args:
        capacity: how many tokens each request may hold, prompt and output together. One more raises
            :class:`flashlib.inference.cache.CacheFullError`.
        mesh: over whose ranks the tokens are spread (:class:`flashlib.parallel.ShardedKVCache`): each rank runs the whole model on the same input, holds a
            W-th of the cache, and gets the same tokens. None for a cache on this rank alone.

    Raises:
        TypeError, ValueError: ``capacity`` is not a positive int.
    """

    def __init__(self, capacity: int, *, mesh: DeviceMesh | None = None) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity must be an int; got {type(capacity).__name__}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        layer: Any = partial(KVCacheLayer, capacity, mesh)
        super().__init__(layer_class_to_replicate=layer)
        self.capacity = capacity

    @property
    def stores(self) -> list[Any]:
        """Each layer's :class:`flashlib.inference.cache.KVCache`, or over a mesh its :class:`flashlib.parallel.ShardedKVCache`; empty before the first token."""
        return [layer.store for layer in self.layers if isinstance(layer, KVCacheLayer) and layer.is_initialized]

    @property
    def nbytes(self) -> int:
        """Bytes reserved in all layers."""
        return sum(store.nbytes for store in self.stores)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one request takes in all layers."""
        return sum(store.bytes_per_token for store in self.stores)
