"""KV injection: let a model attend to a memory that is not in its prompt.

A memory is the keys and values of some other text, or keys and values that were learned. Injecting it into an attention layer
puts them in front of the layer's own keys, for every query to see::

    injected = softmax(q [k_memory ; k]^T) [v_memory ; v]

The concatenation is never made. Attention over the memory and attention over the layer's own keys are two pieces of one
softmax (:mod:`flashlib.partial`), and merging them is exact; so is cutting the memory into chunks that are looked at one after
the other. A memory shared by a batch is read once for all its requests (:mod:`flashlib.inference.prefix`).

**Two meanings of alpha.** How much the memory counts can be said in two places. Let ``w`` be the memory's share of a row's
softmax, ``w = exp(lse_memory - lse_injected)``, so that ``injected = (1 - w) * local + w * memory``.

* ``"blend"``, after the softmax: ``out = (1 - alpha) * local + alpha * injected``. The memory's part of the output is
  ``alpha * w``: linear in alpha, and at most alpha.
* ``"gate"``, inside it: each of the memory's exponentials counts alpha times, which is ``log(alpha)`` added to its scores, or
  once to its LSE. The memory's part is ``alpha * w / (1 - w + alpha * w)``: a memory that a row needs (w near 1) still comes
  through at a small alpha. Alphas above 1 have a meaning here: the memory is amplified.

In both, alpha = 0 is attention without the memory, to the bit, and alpha = 1 is attention over the concatenation.

**Positions.** Keys carry the rotation of the position at which they were encoded (:mod:`flashlib.rotary`). A text encoded from
position 0 on and a prompt encoded from 0 on would overlap: to the model, both stand in the same place. :meth:`Memory.turned`
moves a memory: turned by ``-M``, M tokens stand at ``-M .. -1``, right before the prompt. As only differences of positions
matter, this is the same as reading the memory at ``0 .. M - 1`` and the prompt from M on.

Sources: Wu et al. 2022, "Memorizing Transformers" (arXiv 2203.08913), section 3.2, for attention over an external memory and a
gate on its output; Zhang et al. 2023, "LLaMA-Adapter" (arXiv 2303.16199), section 3.2, for a learned gate that begins at 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.config import InjectionConfig, check_alpha, current_config
from flashlib.inference.checks import check_size
from flashlib.inference.prefix import SharedPrefix
from flashlib.masks import Mask
from flashlib.partial import Partial, merge
from flashlib.rotary import apply_rotary

__all__ = ["InjectionStatistics", "KVInjector", "Memory", "alphas_by_layer"]

Alpha = float | Tensor
_LARGEST_ODDS = 60.0  # keeps the gradient at alpha = 0, exp of a difference of LSEs, within fp32


@dataclass(frozen=True, eq=False)
class Memory:
    """Keys and values to inject into one attention layer.

    Attributes:
        k: ``[B, Hkv, M, D]``; or ``[1, Hkv, M, D]``, one memory for all requests of a batch. v: ``[B or 1, Hkv, M, Dv]``.
            They may require gradients: a memory can be learned.

    Raises:
        TypeError, ValueError: the two do not fit together.
    """

    k: Tensor
    v: Tensor

    def __post_init__(self):
        for name in ("k", "v"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"memory {name} must be a torch.Tensor; got {type(tensor).__name__}")
            if tensor.dim() != 4:
                raise ValueError(f"memory {name} must be [B or 1, Hkv, M, head_dim]; got {list(tensor.shape)}")
        if self.k.shape[:3] != self.v.shape[:3]:
            raise ValueError(
                f"memory k and v must agree in all but head_dim; got k {list(self.k.shape)} and v {list(self.v.shape)}"
            )

    @property
    def length(self) -> int:
        """M, the number of keys."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes

    def chunks(self, chunk_size: int) -> Iterator[Memory]:
        """The memory in pieces of ``chunk_size`` keys, the last maybe shorter: views, in order."""
        check_size("chunk_size", chunk_size, 1)
        for first in range(0, self.length, chunk_size):
            keys = slice(first, first + chunk_size)
            yield Memory(self.k[:, :, keys], self.v[:, :, keys])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Memory:
        """The memory in another place or precision; itself if it is there already."""
        return Memory(self.k.to(device, dtype), self.v.to(device, dtype))

    def turned(self, by: int, frequencies: Tensor, *, interleaved: bool = False) -> Memory:
        """The memory moved by ``by`` positions: its keys turned (RoPE), its values as they are.

        Args:
            by: new position minus old, the same for all keys; may be negative.
            frequencies, interleaved: as in :func:`flashlib.rotary.apply_rotary`; those the model uses.
        """
        positions = torch.full((self.length,), by, device=self.k.device)
        return Memory(apply_rotary(self.k, positions, frequencies, interleaved=interleaved), self.v)


@dataclass
class InjectionStatistics:
    """Running means over the calls of one layer. No call's numbers are kept.

    Attributes:
        calls: how many injections there were.
        keys: the mean number of memory keys.
    """

    calls: int = 0
    keys: float = 0.0
    _share: Tensor | float = 0.0

    @property
    def share(self) -> float:
        """The mean part of the output that came from the memory, 0 to 1, over requests, heads, rows and calls.

        Asking waits for the GPU; recording does not.
        """
        return float(self._share)

    def record(self, keys: int, share: Tensor | float) -> None:
        """Count one call. ``share``: its mean part of the output that came from the memory, or that of each of its rows."""
        if isinstance(share, Tensor):
            share = share.detach().mean() if share.numel() else 0.0
        self.calls += 1
        self.keys += (keys - self.keys) / self.calls
        self._share = self._share + (share - self._share) / self.calls

    def __str__(self) -> str:
        return f"{self.calls} calls, {self.keys:g} memory keys on average, {self.share:.1%} of the output from them"


class KVInjector:
    """Injects memories into attention layers, and keeps count of what they contributed.

    Args:
        config: how to inject; None for ``injection`` of the configuration in force (:func:`flashlib.use_config`).
        backend: as in :func:`flashlib.attention`; one that returns the LSE.

    Attributes:
        statistics: :class:`InjectionStatistics` by layer number; calls that name no layer are under None.

    Raises:
        TypeError: ``config`` is not an :class:`flashlib.config.InjectionConfig`.

    Example::

        injector = KVInjector(InjectionConfig(mode="gate", alpha=0.5))
        out = injector.inject(q, k, v, Memory(k_memory, v_memory), causal=True)
    """

    def __init__(self, config: InjectionConfig | None = None, *, backend: str = "auto") -> None:
        if config is not None and not isinstance(config, InjectionConfig):
            raise TypeError(f"config must be an InjectionConfig; got {type(config).__name__}")
        self.config = config or current_config().injection
        self.backend = backend
        self.statistics: dict[int | None, InjectionStatistics] = {}

    def inject(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: Memory,
        *,
        alpha: Alpha | None = None,
        mask: Mask | None = None,
        causal: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        layer: int | None = None,
    ) -> Tensor:
        """Attention with a memory put in front of the layer's own keys. Differentiable in q, k, v, the memory and alpha.

        Args:
            q, k, v: the layer's own, as in :func:`flashlib.attention`; mask and causal speak of them alone. Every row sees
                all of the memory.
            memory: of the dtype and on the device of q. One with batch 1 serves all requests, and is not copied.
            alpha: how much the memory counts, 0 to 1 (any size from 0 in mode ``"gate"``). A number; or a tensor ``[]``,
                ``[Hq]`` or ``[B, Hq]``, whose values are not looked at, so that a GPU is not waited for. None for the
                configuration's. At the number 0 the memory is not read.
            mask, causal, scale, softcap: as in :func:`flashlib.attention`.
            layer: under which number to keep the statistics.

        Returns:
            ``[B, Hq, Sq, Dv]``, dtype of q.

        Raises:
            TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.
        """
        _check_is_memory(memory)
        return self._inject(q, k, v, [memory], alpha, layer, mask=mask, causal=causal, scale=scale, softcap=softcap)

    def inject_chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: Memory | Iterable[Memory],
        *,
        chunk_size: int | None = None,
        alpha: Alpha | None = None,
        mask: Mask | None = None,
        causal: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        layer: int | None = None,
    ) -> Tensor:
        """:meth:`inject` for a memory too large to have beside the model. The same result; at most one chunk is held.

        The chunks' results are merged as they come, by their LSEs: averaging them would be wrong, since each chunk's softmax is
        normalized over its own keys.

        Args:
            memory: a :class:`Memory` on any device and of any precision, of which ``chunk_size`` keys at a time are brought
                to the device and dtype of q; or the chunks themselves, from an iterator that loads or makes them. No
                reference to a chunk is kept when the next is asked for. (Gradients need what they pass through: where one
                is wanted, autograd keeps every chunk.)
            chunk_size: None for the configuration's. Chunks from an iterator keep the size they have.
            alpha, mask, causal, scale, softcap, layer: as in :meth:`inject`.

        Raises:
            TypeError, ValueError: as :meth:`inject`.
        """
        if isinstance(memory, Memory):
            size = self.config.chunk_size if chunk_size is None else chunk_size
            memory = memory.chunks(size)
        elif chunk_size is not None:
            raise ValueError(f"chunk_size must be None for a memory that comes in chunks; got {chunk_size}")
        # map, unlike a generator, holds no reference to one chunk while it fetches the next.
        memory = map(partial(_brought, q), memory)
        return self._inject(q, k, v, memory, alpha, layer, mask=mask, causal=causal, scale=scale, softcap=softcap)

    def inject_multi_layer(
        self,
        inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
        memories: Sequence[Memory | None],
        *,
        alpha: Alpha | Sequence[Alpha] | Mapping[int, Alpha] | None = None,
        mask: Mask | None = None,
        causal: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> list[Tensor]:
        """:meth:`inject` in several layers at once, each with its own memory and alpha.

        In a model the layers come one after another, and :func:`flashlib.interop.transformers_memory.with_memory` injects
        into each as it runs. This is for layers whose inputs are all there.

        Args:
            inputs: ``(q, k, v)`` of each layer.
            memories: each layer's memory, or None for none.
            alpha: see :func:`alphas_by_layer`.
            mask, causal, scale, softcap: as in :func:`flashlib.attention`, the same for all layers.

        Returns:
            each layer's output.

        Raises:
            TypeError, ValueError: as :meth:`inject`; or the counts differ.
        """
        if len(memories) != len(inputs):
            raise ValueError(f"memories must be one per layer, {len(inputs)}; got {len(memories)}")
        alphas = alphas_by_layer(self.config.alpha if alpha is None else alpha, len(inputs))
        options: dict[str, Any] = {"mask": mask, "causal": causal, "scale": scale, "softcap": softcap}
        return [
            self._inject(q, k, v, *(([], 0.0) if memory is None else ([memory], alpha)), layer, **options)
            for layer, ((q, k, v), memory, alpha) in enumerate(zip(inputs, memories, alphas, strict=True))
        ]

    def _inject(self, q, k, v, chunks: Iterable[Memory], alpha: Alpha | None, layer: int | None, **options) -> Tensor:
        alpha = self._checked_alpha(self.config.alpha if alpha is None else alpha, q)
        statistics = self.statistics.setdefault(layer, InjectionStatistics())
        if not isinstance(alpha, Tensor) and alpha == 0:
            statistics.record(0, 0.0)
            alone: Any = attention(q, k, v, backend=self.backend, **options)
            return alone
        local = _piece(*attention(q, k, v, return_lse=True, backend=self.backend, **options))
        memory, keys = self._attend(local, q, k, v, chunks, options["scale"], options["softcap"])
        combine = _blend if self.config.mode == "blend" else _gate
        out, share = combine(local, memory, alpha)
        statistics.record(keys, share)
        return out.to(q.dtype)

    def _attend(self, local: Partial, q, k, v, chunks: Iterable[Memory], scale, softcap) -> tuple[Partial, int]:
        """Attention over all chunks together, and how many keys they had."""
        nothing_seen = torch.full_like(local.lse, float("-inf"))
        total, keys = Partial(torch.zeros_like(local.out), nothing_seen), 0
        options = {"scale": scale, "softcap": softcap, "backend": self.backend}
        for chunk in chunks:
            _check_fits(chunk, q, k, v)
            if chunk.k.shape[0] == 1:
                piece = SharedPrefix(chunk.k, chunk.v).attend(q, **options)
            else:
                piece = Partial(*attention(q, chunk.k, chunk.v, return_lse=True, **options))
            total, keys = merge(total, _piece(piece.out, piece.lse)), keys + chunk.length
            del chunk  # before the iterator makes the next: two are never there at once
        return total, keys

    def _checked_alpha(self, alpha: Alpha, q: Tensor) -> Alpha:
        """A number; or a tensor that broadcasts against ``[B, Hq, Sq]``, in the accumulation dtype."""
        if isinstance(alpha, Tensor):
            batch, q_heads = q.shape[:2]
            if not alpha.is_floating_point():
                raise TypeError(f"alpha must be floating point; got {alpha.dtype}")
            if alpha.shape not in ((), (q_heads,), (batch, q_heads)):
                raise ValueError(
                    f"alpha must be a number or [], [Hq] or [B, Hq], here [{q_heads}] or [{batch}, {q_heads}]; "
                    f"got {list(alpha.shape)}"
                )
            alpha = alpha.to(q.device, torch.float64 if q.dtype == torch.float64 else torch.float32)
            return alpha[..., None] if alpha.dim() else alpha
        check_alpha(alpha, self.config.mode)
        return alpha


def alphas_by_layer(alpha: Alpha | Sequence[Alpha] | Mapping[int, Alpha], layers: int) -> list[Alpha]:
    """One alpha per layer.

    Args:
        alpha: one for all layers; or a sequence of one per layer; or a mapping from layer numbers, and 0 for those not in it:
            ``dict.fromkeys(range(10, 20), 0.5)``.
        layers: how many there are.

    Raises:
        ValueError: the sequence has another length, or the mapping names a layer that is not there.
    """
    if isinstance(alpha, Mapping):
        for layer in alpha:
            if layer not in range(layers):
                raise ValueError(f"alpha: layers are 0 to {layers - 1}; got {layer!r}")
        return [alpha.get(layer, 0.0) for layer in range(layers)]
    if isinstance(alpha, Sequence):
        if len(alpha) != layers:
            raise ValueError(f"alpha must be one per layer, {layers}; got {len(alpha)}")
        return list(alpha)
    return [alpha] * layers


def _blend(local: Partial, memory: Partial, alpha: Alpha) -> tuple[Tensor, Tensor]:
    """``(1 - alpha) * local + alpha * injected``, and the memory's part in it ``[B, Hq, Sq]``."""
    injected = merge(local, memory)
    weight = alpha[..., None] if isinstance(alpha, Tensor) else alpha
    return torch.lerp(local.out, injected.out, weight), alpha * _share(memory, injected)


def _gate(local: Partial, memory: Partial, alpha: Alpha) -> tuple[Tensor, Tensor]:
    """Softmax with the memory's exponentials times alpha, and the memory's part in it ``[B, Hq, Sq]``."""
    if not isinstance(alpha, Tensor) and alpha == 1:
        injected = merge(local, memory)
        return injected.out, _share(memory, injected)
    nothing = memory.lse == float("-inf")
    odds = (memory.lse - local.lse).masked_fill(nothing, float("-inf"))  # log of w / (1 - w)
    if isinstance(alpha, Tensor):
        # Learned gates often begin at 0, and may step below it. The logarithm has no gradient there; the share has, but for a row
        # that sees nothing else: the memory is all of it at any alpha above 0, which changes nothing there.
        shut = alpha <= 0
        share = torch.sigmoid(odds + alpha.masked_fill(shut, 1.0).log())
        growth = odds.masked_fill(odds == float("inf"), float("-inf")).clamp(max=_LARGEST_ODDS).exp()
        ratio = alpha.masked_fill(~shut, 0.0) * growth
        share = torch.where(shut, ratio / (1 - ratio), share)  # below 0 the mirror image of above, without a pole
    else:
        share = torch.sigmoid(odds + math.log(alpha))
    return torch.lerp(local.out, memory.out, share[..., None]), share


def _share(part: Partial, whole: Partial) -> Tensor:
    """What part of the whole's softmax falls on the part's keys: ``exp(lse_part - lse_whole)``, ``[B, Hq, Sq]``."""
    infinite = part.lse.isinf()
    share = torch.exp(part.lse.masked_fill(infinite, 0.0) - whole.lse.masked_fill(infinite, 0.0))
    return torch.where(infinite, (part.lse > 0).to(share.dtype), share)


def _piece(out: Tensor, lse: Tensor) -> Partial:
    """A piece to be merged: its output in the precision of the LSE, so that merging adds no rounding to it."""
    return Partial(out.to(lse.dtype), lse)


def _brought(q: Tensor, chunk: Memory) -> Memory:
    """A chunk where q is and in its precision."""
    _check_is_memory(chunk)
    return chunk.to(q.device, q.dtype)


def _check_is_memory(memory: Memory) -> None:
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be a Memory, or Memory objects in an iterator; got {type(memory).__name__}")


def _check_fits(memory: Memory, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor, own in (("k", memory.k, k), ("v", memory.v, v)):
        batch, heads, _, dim = own.shape
        if tensor.shape[0] not in (1, batch) or tensor.shape[1] != heads or tensor.shape[3] != dim:
            raise ValueError(
                f"memory {name} must be [{batch}, {heads}, M, {dim}] or [1, {heads}, M, {dim}], to fit {name} "
                f"{list(own.shape)}; got {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(
                f"memory {name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}; bring it there with "
                "Memory.to, or use inject_chunked, which does so chunk by chunk"
            )
