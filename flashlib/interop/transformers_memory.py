"""Give a Hugging Face ``transformers`` model a memory: a text read once, attended to in later prompts, never part of them.

    from flashlib.interop.transformers_memory import encode_memory, with_memory

    memory = encode_memory(model, tokenizer(text).input_ids)      # once; may be kept
    with with_memory(model, memory) as injector:                  # as often as wanted, for any prompt
        model.generate(**tokenizer(question, return_tensors="pt"))
    print(injector.statistics[12])

The memory's keys and values are injected into the attention layers by a :class:`flashlib.inference.injection.KVInjector`. They
are not put into the prompt's cache, not concatenated with it, and not copied for the requests of a batch.

Positions: the prompt counts its own tokens from 0, as always. A memory of M tokens stands before it, at ``-M .. -1``
(:meth:`ModelMemory.at` moves it elsewhere). To the model, which sees only differences of positions, that is the text followed by
the prompt: with alpha = 1 in every layer the logits are those of a model that reads both, up to rounding.

Needs the extra ``models``: ``pip install 'flashlib[models]'``, transformers 5.20 or newer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flashlib.inference.injection import Alpha, KVInjector, Memory, alphas_by_layer
from flashlib.interop.transformers import FlashlibCache, attention_forward, make_mask_tensor

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface
except ImportError as error:
    raise ImportError(f"flashlib.interop.transformers_memory needs transformers: {error}") from error

_NAME = "fl_memory"
_INJECTIONS: WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class ModelMemory:
    """Keys and values of one text in every layer of one model.

    Attributes:
        layers: each layer's :class:`flashlib.inference.injection.Memory`, ``[1, Hkv, M, D]``.
        start: the position of the first token, as the prompt counts them.
        frequencies: ``[D / 2]``, the model's RoPE.
    """

    layers: tuple[Memory, ...]
    start: int
    frequencies: Tensor

    @property
    def length(self) -> int:
        """M, the number of tokens."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes in all layers."""
        return sum(memory.nbytes for memory in self.layers)

    def at(self, start: int) -> ModelMemory:
        """The same memory with its first token at another position. Turns the keys; the values are shared."""
        if isinstance(start, bool) or not isinstance(start, int):
            raise TypeError(f"start must be an int; got {type(start).__name__}")
        turned = tuple(memory.turned(start - self.start, self.frequencies) for memory in self.layers)
        return replace(self, layers=turned, start=start)


@torch.no_grad()
def encode_memory(model: PreTrainedModel, ids: Tensor | Sequence[int]) -> ModelMemory:
    """Let a model read a text, and keep what its attention layers would look back on.

    Args:
        model: a causal transformers model laid out as Llama is (SmolLM2, Qwen2, Mistral ...), with rotary positions.
        ids: the text's M tokens, integers ``[M]`` or ``[1, M]``.

    Returns:
        the memory, at the positions ``-M .. -1``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    layers = _attention_layers(model)
    ids = torch.as_tensor(ids, device=model.device)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers; got {ids.dtype}")
    if ids.dim() not in (1, 2) or ids.numel() != ids.shape[-1] or not ids.numel():
        raise ValueError(f"ids must be one text of at least one token, [M] or [1, M]; got {list(ids.shape)}")
    cache = FlashlibCache(capacity=ids.numel())
    model.base_model(input_ids=ids.reshape(1, -1), past_key_values=cache, use_cache=True)
    memories = tuple(Memory(store.keys, store.values) for store in cache.stores)
    if len(memories) != len(layers):
        raise ValueError(f"model must keep keys and values in each of its {len(layers)} layers; got {len(memories)}")
    body: Any = model.base_model
    read = ModelMemory(memories, start=0, frequencies=body.rotary_emb.inv_freq)
    return read.at(-read.length)


@contextmanager
def with_memory(
    model: PreTrainedModel,
    memory: ModelMemory,
    *,
    alpha: Alpha | Sequence[Alpha] | Mapping[int, Alpha] | None = None,
    injector: KVInjector | None = None,
) -> Iterator[KVInjector]:
    """Inside the block every call of the model attends to the memory too: forward passes and ``generate``, with any cache.

    What a layer adds to the prompt's own keys is decided per call: nothing of the memory enters a cache. Every row attends to
    all of the memory, padding included.

    Args:
        model: the model that encoded the memory, or one with the same shapes.
        memory: from :func:`encode_memory`; or made of tensors that are to be learned.
        alpha: how much the memory counts: one number for all layers, a sequence of one per layer, or a mapping from layers to
            alphas, 0 for the others (:func:`flashlib.inference.injection.alphas_by_layer`). None for the injector's.
        injector: how to inject (mode, backend), and where the statistics go. None for ``KVInjector()``.

    Yields:
        the injector; its ``statistics`` say per layer what part of the attention output came from the memory.

    Raises:
        TypeError, ValueError: an argument does not fit; or the model already has a memory; or, when a layer runs, it has a
            sliding window, in which the memory's tokens have no place.
    """
    if not isinstance(memory, ModelMemory):
        raise TypeError(f"memory must be a ModelMemory; got {type(memory).__name__}")
    if injector is not None and not isinstance(injector, KVInjector):
        raise TypeError(f"injector must be a KVInjector; got {type(injector).__name__}")
    layers = _attention_layers(model)
    if len(memory.layers) != len(layers):
        raise ValueError(f"memory has {len(memory.layers)} layers, the model {len(layers)}")
    usual = model.config._attn_implementation
    if usual == _NAME:
        raise ValueError("the model already has a memory; leave that block first")
    injector = KVInjector() if injector is None else injector
    alphas = alphas_by_layer(injector.config.alpha if alpha is None else alpha, len(layers))
    for number, (layer, own, share) in enumerate(zip(layers, memory.layers, alphas, strict=True)):
        _INJECTIONS[layer] = partial(injector.inject, memory=own, alpha=share, layer=number)
    try:
        model.set_attn_implementation(_NAME)
        yield injector
    finally:
        model.set_attn_implementation(usual)
        for layer in layers:
            _INJECTIONS.pop(layer, None)


def _attend(module, query, key, value, attention_mask, *, sliding_window=None, **options) -> tuple[Tensor, None]:
    """What transformers calls in each layer of a model with a memory."""
    if sliding_window is not None:
        raise ValueError(
            f"layer {module.layer_idx} has a sliding window of {sliding_window} tokens, in which a memory has no place"
        )
    return attention_forward(
        module, query, key, value, attention_mask, compute=_INJECTIONS[module], takes=(), **options
    )


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, make_mask_tensor)


def _attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    layers = getattr(model.base_model, "layers", None)
    rotary = getattr(model.base_model, "rotary_emb", None)
    if layers is None or not hasattr(rotary, "inv_freq") or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"model must be laid out as Llama is (layers[i].self_attn, rotary_emb.inv_freq); got {type(model).__name__}"
        )
    return [layer.self_attn for layer in layers]
