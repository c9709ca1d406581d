"""The front door."""

from __future__ import annotations

from torch import Tensor

from flashlib.backends import choose
from flashlib.config import FlashAttentionConfig, current_config
from flashlib.masks import Mask
from flashlib.spec import AttentionSpec
from flashlib.tiled import run_tiled

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
        return_lse: also return the log-sum-exp of each row's scores.
        backend: ``"auto"``, or the name of one backend: it runs there or raises (:func:`flashlib.backends.explain`).
        config: settings for this call; None for those in force (:func:`flashlib.use_config`).

    Returns:
        out ``[B, Hq, Sq, Dv]``, dtype of q. With ``return_lse``, ``(out, lse)``: lse ``[B, Hq, Sq]``, natural logarithm,
        fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: bad arguments; the message names the argument, what came and what was expected.
        flashlib.BackendUnavailableError: the named backend cannot run this problem; the message says why.

    Sources: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Dao et al. 2022 (arXiv 2205.14135).
    """
    spec = AttentionSpec.from_tensors(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
    )
    if config is not None and not isinstance(config, FlashAttentionConfig):
        raise TypeError(f"config must be a FlashAttentionConfig; got {type(config).__name__}")
    config = config or current_config()
    chosen = choose(spec, backend, config)
    if spec.is_empty:
        out, lse = run_tiled(q, k, v, spec, config.tiled)  # no tile to visit, so no kernel to launch: zeros and -inf
    else:
        out, lse = chosen.run(q, k, v, spec, config)
    return (out, lse) if return_lse else out
