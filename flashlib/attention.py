"""The front door."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlib.autocast import autocast_inputs, autocast_off
from flashlib.backends import choose
from flashlib.config import FlashAttentionConfig, current_config
from flashlib.engines import run_engine
from flashlib.launch.engines import TiledEngine
from flashlib.masks import Mask
from flashlib.nested import is_nested, nested_attention
from flashlib.packing import AlignedPack, sequences_of
from flashlib.partial import merge_sinks
from flashlib.routes import find_route, new_route, related_route, route_key
from flashlib.spec import AttentionSpec

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    config: FlashAttentionConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, ``softmax(softcap(scale * Q K^T) + bias + mask) V``, by the best backend that can run it. Differentiable.

    Args:
        q: queries ``[B, Hq, Sq, D]``; fp16, bf16, fp32 or fp64; any strides.
        k: keys ``[B, Hkv, Sk, D]``, Hq a multiple of Hkv. Query head h uses KV head ``h // (Hq / Hkv)``.
        v: values ``[B, Hkv, Sk, Dv]``; Dv may differ from D.
        mask: which pairs are visible (:mod:`flashlib.masks`); None for all. What no row may see is never read, whatever
            it holds. A row that sees no key gives 0, LSE -inf and gradient 0. A key that some row sees must be finite.
        causal: also hide the future. Aligned bottom-right: row i sees keys ``j <= i + Sk - Sq`` (PyTorch's SDPA aligns
            top-left when the lengths differ).
        scale: positive factor on the scores; ``1 / sqrt(D)`` by default.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        alibi_slopes: fp32 ``[Hq]`` or ``[B, Hq]``, or with one for each row ``[B or 1, Hq, Sq]``; ``slope * |i + Sk - Sq - j|`` is
            taken from the score of row i and key j (ALiBi, Press et al. 2022, arXiv 2108.12409). A mask that says where rows sit, by
            its offset or as :class:`flashlib.masks.Varlen` does, says it here too, in place of Sk - Sq. None for no bias. They get no
            gradient.
        sinks: ``[Hq]``, a floating dtype: one more score that every row of a head sees, and that has no value: it takes weight from the others
            (gpt-oss, arXiv 2508.10925, section 2.3). It is part of the LSE, and gets a gradient. None for none.
        dropout_p: the share of attention weights that is set to 0, at least 0 and below 1, the others growing by ``1 / (1 - dropout_p)``
            (Srivastava et al. 2014). The LSE does not know of it.
        dropout_seed: int64 ``[1]``, on the device: which weights; the same ones on every backend (:mod:`flashlib.dropout`). None to draw it from the
            device's default generator.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: ``"auto"``, or the name of one backend: it runs there or raises (:func:`flashlib.backends.explain`).
        config: settings for this call; None for those in force (:func:`flashlib.use_config`).

    Returns:
        out ``[B, Hq, Sq, Dv]``, dtype of q. With ``return_lse``, ``(out, lse)``: lse ``[B, Hq, Sq]``, natural logarithm,
        fp32 (fp64 for fp64 inputs).

        Jagged nested tensors ``[B, H, j, D]`` are taken as PyTorch's SDPA takes them, and give jagged results: :mod:`flashlib.nested`.

        Under ``torch.autocast`` q, k and v are cast to its dtype first, as for PyTorch's SDPA: fp64 alone stays as it is.

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.
        flashlib.BackendUnavailableError: the named backend cannot run this problem; the message says why.

    Sources: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Dao et al. 2022 (arXiv 2205.14135).
    """
    key: tuple | None = None
    given: list[Tensor] = []
    if not torch.compiler.is_compiling() and sinks is None and not dropout_p:
        chosen_config = current_config() if config is None else config
        key, given = route_key(q, k, v, mask, causal, scale, softcap, alibi_slopes, return_lse, backend, chosen_config)
        route = find_route(key) or related_route(key, q, k, v, given)
        if route is not None:
            return route(q, k, v, given)
    if is_nested(q, k, v):
        inside: dict[str, Any] = {
            "mask": mask,
            "causal": causal,
            "alibi_slopes": alibi_slopes,
            "return_lse": return_lse,
            "config": config,
        }
        scores: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
        return nested_attention(
            attention, q, k, v, **inside, **scores, dropout_p=dropout_p, dropout_seed=dropout_seed, backend=backend
        )
    q, k, v = autocast_inputs(q, k, v)
    spec = AttentionSpec.from_tensors(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    if config is not None and not isinstance(config, FlashAttentionConfig):
        raise TypeError(f"config must be a FlashAttentionConfig; got {type(config).__name__}")
    config = config or current_config()
    chosen = choose(spec, backend, config)
    sequences = sequences_of(spec.mask) if config.packing == "aligned" and not spec.is_empty else None
    if key is not None and chosen.name == "triton" and sequences is None and not spec.is_empty:
        route = new_route(key, q, k, v, spec, config, return_lse, given)
        if route is not None:
            return route(q, k, v, given)
    with autocast_off(spec.device):
        if sequences is not None:
            pack = AlignedPack.of(q, k, v, spec, sequences)
            q, k, v, spec = pack.q, pack.k, pack.v, pack.spec
        if spec.is_empty:  # no tile to visit, so no kernel to launch: zeros and -inf
            out, lse = run_engine(TiledEngine(config.tiled), q, k, v, spec)
        else:
            out, lse = chosen.run(q, k, v, spec, config)
        if sequences is not None:
            out, lse = pack.gathered(out, lse)
        if sinks is not None and (spec.is_empty or not chosen.has_sinks):
            assert lse is not None  # a problem with sinks asks for it
            out, lse = merge_sinks(out, lse, sinks)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
