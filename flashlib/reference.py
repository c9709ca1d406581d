"""What every other implementation is held against: naive attention, the float64 oracle, and the error budget.

* :func:`naive_attention` is ``softmax(Q K^T) V`` as the formula reads, every intermediate rounded to the inputs' dtype.
* :func:`oracle` is the same formula in float64. At float32 precision and below its own rounding does not show.
* :func:`error_budget` says how far from the oracle a result may be: at most twice as far as naive attention in the same
  dtype. The factor 2 is the criterion of FlashAttention's own test suite. Two things make it fair on small inputs, where
  naive attention may be exact by luck or by structure (the softmax of one key is 1, whatever its score): naive's error is
  the worst over several orders of rows, keys and channels, and the roundings that no algorithm can avoid are granted on top.

A budget is a finite number. Where naive attention overflows its dtype, as fp16 does at a score of 65,520, its scores are kept in the
accumulation dtype instead. Where that overflows, too, or the exact result does not fit the dtype or is no number, there is no budget,
and who asks for one, or for a check by one, is told so by a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlib.masks import Mask
from flashlib.spec import AttentionSpec

__all__ = [
    "Comparison",
    "ErrorBudget",
    "assert_gradients_within_budget",
    "assert_within_budget",
    "check",
    "check_gradients",
    "error_budget",
    "naive_attention",
    "oracle",
    "oracle_gradients",
]

# Rounding errors of naive attention on a small input are a small sample: one lucky draw would make the budget unfairly
# tight. Reordering the rows, the keys or the channels changes no exact result but redraws every rounding error: outputs and dQ are
# sums over keys, scores over channels, dK and dV over rows.
REORDERINGS = 8
LARGE_ENOUGH = 2**20  # scores; beyond this one draw already holds a representative worst case


def naive_attention(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as the formula reads (Vaswani et al. 2017, arXiv 1706.03762, equation 1). Makes the Sq x Sk matrix.

    Args:
        q, k, v: ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]``, ``[B, Hkv, Sk, Dv]``, one floating dtype.
        mask, causal, scale, softcap, alibi_slopes, sinks, dropout_p, dropout_seed: as in :func:`flashlib.attention`.
        return_lse: also return the log-sum-exp ``[B, Hq, Sq]`` of each row.

    Returns:
        out ``[B, Hq, Sq, Dv]`` in the inputs' dtype; with ``return_lse`` also lse (fp32, or fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: as :meth:`flashlib.AttentionSpec.from_tensors`.
    """
    options: dict[str, Any] = {
        "mask": mask,
        "causal": causal,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    options |= {"sinks": sinks, "dropout_p": dropout_p, "dropout_seed": dropout_seed}
    spec = AttentionSpec.from_tensors(q, k, v, **options, return_lse=return_lse)
    out, lse = naive_forward(q, k, v, spec)
    return (out, lse) if return_lse else out


def naive_forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """:func:`naive_attention` for a problem already checked: ``(out, lse)``."""
    return _naive(*hide_unseen(q, k, v, spec), *_dense(spec), spec)


def _dense(spec: AttentionSpec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The whole mask, bool ``[B or 1, 1, Sq, Sk]``, the whole bias, ``[B or 1, Hq, Sq, Sk]``, and dropout's factors, ``[B, Hq, Sq, Sk]``.

    The last two are None where there is none.
    """
    whole = slice(0, spec.q_len), slice(0, spec.kv_len)
    return spec.intervals.dense()[:, None], spec.bias(*whole), spec.keep_factors(*whole)


def _naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    spec: AttentionSpec,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """``wide``: scores in the accumulation dtype, and weights rounded to that of v."""
    k, v = (x.repeat_interleave(spec.group_size, dim=1) for x in (k, v))
    if wide:
        q, k = q.to(spec.accumulate_dtype), k.to(spec.accumulate_dtype)
    scores = (q @ k.mT) * spec.scale  # [B, Hq, Sq, Sk]
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    scores = scores.masked_fill(~visible, float("-inf"))
    if spec.sinks is not None:  # one more key, which every row sees, and whose value is 0
        sink = spec.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :-1]
        lse = torch.logsumexp(scores.to(spec.accumulate_dtype), dim=-1)
    else:
        sees_nothing = ~visible.any(-1, keepdim=True)
        # A row of -inf has no softmax. Give it finite scores, and throw what comes out away.
        weights = torch.softmax(scores.masked_fill(sees_nothing, 0.0), dim=-1).masked_fill(sees_nothing, 0.0)
        lse = torch.logsumexp(scores.masked_fill(sees_nothing, 0.0).to(spec.accumulate_dtype), dim=-1)
        lse = lse.masked_fill(sees_nothing[..., 0], float("-inf"))
    if keep is not None:
        weights = weights * keep.to(weights.dtype)
    weights = weights.to(v.dtype)
    return weights @ v, lse


def hide_unseen(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with zeros where the mask says that nobody looks.

    Multiplying by a softmax weight of 0 does not hide a NaN: ``0 * NaN`` is NaN. So keys that no row sees, and rows that see
    no key, are blanked before any arithmetic. Padding may then hold anything.
    """
    left, right = spec.mask.band() or (0, 0)
    if left is None and (right is None or spec.q_len <= spec.kv_len):
        return q, k, v  # the last row sees every key and every row sees the first: nothing to hide
    unseen_keys = ~spec.intervals.seen_keys()[:, None, :, None]
    empty_rows = spec.intervals.empty_rows()[:, None, :, None]
    return q.masked_fill(empty_rows, 0.0), k.masked_fill(unseen_keys, 0.0), v.masked_fill(unseen_keys, 0.0)


def oracle(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Naive attention computed in float64: ``(out, lse)``, both float64.

    Args:
        q, k, v: as in :func:`naive_attention`, any floating dtype.
        **options: ``mask``, ``causal``, ``scale``, ``softcap``, ``alibi_slopes``, ``sinks``; ``dropout_p`` together with ``dropout_seed``, without which
            each call would drop other weights.

    Raises:
        TypeError, ValueError: as :meth:`flashlib.AttentionSpec.from_tensors`; dropout without a seed.
    """
    if options.get("dropout_p") and options.get("dropout_seed") is None:
        raise ValueError("dropout_seed must say which weights are dropped, so that results can be compared; got None")
    AttentionSpec.from_tensors(q, k, v, **options)
    q, k, v = q.double(), k.double(), v.double()
    return naive_forward(q, k, v, AttentionSpec.from_tensors(q, k, v, **options, return_lse=True))


@dataclass(frozen=True)
class ErrorBudget:
    """The largest absolute error allowed, for the output and for the LSE."""

    out: float
    lse: float


@dataclass(frozen=True)
class Comparison:
    """A result held against the oracle.

    Attributes:
        passed: whether every error is within its budget.
        error, budget: largest absolute error found and allowed, by name ("out", "lse", or "dq", "dk", "dv").
        message: one line that says so.
    """

    passed: bool
    error: dict[str, float]
    budget: dict[str, float]

    @property
    def message(self) -> str:
        parts = [f"{name}: error {self.error[name]:.3g}, budget {self.budget[name]:.3g}" for name in self.error]
        return ("within" if self.passed else "OUTSIDE") + " the error budget; " + "; ".join(parts)


def error_budget(q: Tensor, k: Tensor, v: Tensor, **options) -> ErrorBudget:
    """How far from the oracle a result on these inputs may be.

    ``2 * max |naive - oracle| + one rounding of the result + one rounding of its terms``: naive attention's worst error in
    the inputs' dtype, doubled; the spacing of that dtype at the largest result, lost merely by writing the result down; and
    one rounding, in the accumulation dtype, of each term that the result is a sum of (:func:`_rounding_of_terms`).

    Args:
        q, k, v, **options: as in :func:`oracle`.

    Raises:
        ValueError: there is no budget: naive attention does not stay finite, or the exact result does not fit the dtype.
    """
    exact_out, exact_lse = oracle(q, k, v, **options)
    return _budget(q, k, v, exact_out, exact_lse, **options)


def _budget(q: Tensor, k: Tensor, v: Tensor, exact_out: Tensor, exact_lse: Tensor, **options) -> ErrorBudget:
    spec = AttentionSpec.from_tensors(q, k, v, **options)
    worst = dict.fromkeys(("out", "lse"), 0.0)
    for rows, _, _, problem in _reordered(q, k, v, spec):
        _raise_to(worst, _naive, (*problem, spec), (exact_out[:, :, rows], exact_lse[:, :, rows]))
    terms = _rounding_of_terms(q, k, v, exact_out, exact_lse, spec)
    return ErrorBudget(
        out=_finite_budget("out", 2 * worst["out"] + one_rounding(exact_out, spec.dtype) + terms["out"], spec),
        lse=_finite_budget(
            "lse", 2 * worst["lse"] + one_rounding(exact_lse, spec.accumulate_dtype) + terms["lse"], spec
        ),
    )


def _raise_to(
    worst: dict[str, float], naive: Callable[..., tuple[Tensor, ...]], arguments: tuple, exact: tuple[Tensor, ...]
) -> None:
    """Raise each number of ``worst`` to the error of ``naive(*arguments)`` in one order: not wide, or if that overflows, wide."""
    for wide in (False, True):
        errors = [
            largest_error(result, reference)
            for result, reference in zip(naive(*arguments, wide=wide), exact, strict=True)
        ]
        if all(map(math.isfinite, errors)):
            break
    worst.update({name: max(worst[name], error) for name, error in zip(worst, errors, strict=True)})


def _finite_budget(name: str, budget: float, spec: AttentionSpec) -> float:
    if not math.isfinite(budget):
        dtype, wide = (str(x).removeprefix("torch.") for x in (spec.dtype, spec.accumulate_dtype))
        raise ValueError(
            f"there is no error budget for {name}: naive attention on these inputs is not finite, not even with its scores in {wide}, "
            f"or the exact {name} does not fit {dtype}; got inputs that are too large, or not finite where they are seen"
        )
    return budget


def _reorderings(spec: AttentionSpec) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Orders of the rows, the keys and the channels in which to repeat the naive computation; first the order given."""
    sizes = spec.q_len, spec.kv_len, spec.head_dim
    rows, keys, channels = (torch.arange(size, device=spec.device) for size in sizes)
    yield rows, keys, channels
    small = spec.batch * spec.q_heads * spec.q_len * spec.kv_len < LARGE_ENOUGH
    generator = torch.Generator("cpu").manual_seed(0)  # the budget of given inputs is a number, not a draw
    for _ in range(REORDERINGS if small else 0):
        rows, keys, channels = (torch.randperm(size, generator=generator, device="cpu") for size in sizes)
        yield rows.to(spec.device), keys.to(spec.device), channels.to(spec.device)


def _reordered(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple]]:
    """The problem in each order: rows, keys, channels, and ``(q, k, v, visible, bias, keep)`` as :func:`_naive` takes them."""
    q, k, v = hide_unseen(q.detach(), k.detach(), v.detach(), spec)
    dense = _dense(spec)
    for rows, keys, channels in _reorderings(spec):
        by_pair = (None if x is None else x[..., rows, :][..., keys] for x in dense)
        yield (
            rows,
            keys,
            channels,
            (q[:, :, rows][..., channels], k[:, :, keys][..., channels], v[:, :, keys], *by_pair),
        )


def largest_error(result: Tensor, exact: Tensor) -> float:
    """``max |result - exact|`` in float64. Equal infinities agree; NaN, or an infinity where none belongs, is an infinite error."""
    if result.numel() == 0:
        return 0.0
    result, exact = result.detach().double(), exact.detach().double()
    error = torch.where(result == exact, 0.0, (result - exact).abs())
    return float(error.nan_to_num(nan=float("inf")).max())


def one_rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Spacing of ``dtype`` at the largest finite value of ``exact``: what writing that value down can cost."""
    finite = exact.detach()[exact.isfinite()]
    return torch.finfo(dtype).eps * float(finite.abs().max()) if finite.numel() else 0.0


def check(out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **options) -> Comparison:
    """Hold a result against the oracle and the error budget.

    Args:
        out: ``[B, Hq, Sq, Dv]``.
        lse: ``[B, Hq, Sq]``, or None if there is none to check.
        q, k, v, **options: the inputs it was computed from, as in :func:`oracle`.

    Raises:
        ValueError: a result does not have the shape the inputs call for, or there is no budget (:func:`error_budget`).
    """
    exact_out, exact_lse = oracle(q, k, v, **options)
    allowed = _budget(q, k, v, exact_out, exact_lse, **options)
    _expect_shape("out", out, exact_out.shape)
    error, budget = {"out": largest_error(out, exact_out)}, {"out": allowed.out}
    if lse is not None:
        _expect_shape("lse", lse, exact_lse.shape)
        error["lse"], budget["lse"] = largest_error(lse, exact_lse), allowed.lse
    return Comparison(all(error[name] <= budget[name] for name in error), error, budget)


def assert_within_budget(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, lse: Tensor | None = None, **options) -> None:
    """:func:`check`, raising AssertionError with the numbers if a result is outside its budget."""
    _expect_passed(check(out, lse, q, k, v, **options))


def _expect_passed(comparison: Comparison) -> None:
    if not comparison.passed:  # not an assert statement: python -O would leave that out
        raise AssertionError(comparison.message)


def oracle_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor | None = None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(out * grad_out) + sum(lse * grad_lse)`` in float64: ``(dq, dk, dv)``, shaped like q, k, v."""
    AttentionSpec.from_tensors(q, k, v, **options)
    spec = AttentionSpec.from_tensors(q.double(), k.double(), v.double(), **options)
    _expect_shape("grad_out", grad_out, spec.out_shape)
    hidden = hide_unseen(q.detach().double(), k.detach().double(), v.detach().double(), spec)
    return _naive_gradients(*hidden, *_dense(spec), grad_out, grad_lse, spec)


def _naive_gradients(q, k, v, visible, bias, keep, grad_out, grad_lse, spec, *, wide=False):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out, lse = _naive(*inputs, visible, bias, keep, spec, wide=wide)
        objective = (out * grad_out.to(out.dtype)).sum()
        if grad_lse is not None:
            objective = objective + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse.to(lse.dtype)).sum()
    return torch.autograd.grad(objective, inputs)


def assert_gradients_within_budget(
    gradients: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    **options,
) -> None:
    """Hold ``(dq, dk, dv)`` against float64, with autograd through naive attention in the same dtype as the measure.

    The budget is formed as in :func:`error_budget`.

    Raises:
        AssertionError: a gradient is further from the oracle than its budget; with the numbers.
        ValueError: there is no budget, as in :func:`error_budget`.
    """
    _expect_passed(check_gradients(gradients, q, k, v, grad_out, grad_lse, **options))


def check_gradients(gradients, q, k, v, grad_out, grad_lse=None, **options) -> Comparison:
    """As :func:`assert_gradients_within_budget`, but returning the :class:`Comparison`."""
    spec = AttentionSpec.from_tensors(q, k, v, **options)
    if len(gradients) != 3:
        raise ValueError(f"gradients must be (dq, dk, dv); got {len(gradients)} of them")
    exact = oracle_gradients(q, k, v, grad_out, grad_lse, **options)
    names = ("dq", "dk", "dv")
    worst = dict.fromkeys(names, 0.0)
    for rows, keys, channels, problem in _reordered(q, k, v, spec):
        dq, dk, dv = exact
        same_order = (dq[:, :, rows][..., channels], dk[:, :, keys][..., channels], dv[:, :, keys])
        incoming = grad_out[:, :, rows], None if grad_lse is None else grad_lse[:, :, rows]
        _raise_to(worst, _naive_gradients, (*problem, *incoming, spec), same_order)
    exact_out, exact_lse = oracle(q, k, v, **options)
    terms = _rounding_of_terms(q, k, v, exact_out, exact_lse, spec, grad_out, grad_lse)
    error, budget = {}, {}
    for name, result, reference in zip(names, gradients, exact, strict=True):
        _expect_shape(name, result, reference.shape)
        error[name] = largest_error(result, reference)
        budget[name] = _finite_budget(name, 2 * worst[name] + one_rounding(reference, spec.dtype) + terms[name], spec)
    return Comparison(all(error[name] <= budget[name] for name in names), error, budget)


def _rounding_of_terms(q, k, v, out, lse, spec, grad_out=None, grad_lse=None) -> dict[str, float]:
    """By how much a result moves if each term of the sums that make it is rounded once, in the accumulation dtype.

    A score is a sum of D products, so it is uncertain by ``eps * scale * sum |q||k|``, and a probability ``exp(S - lse)`` by
    that fraction of itself. Naive softmax often hides it, because the same S stands above and below its division. An
    algorithm that recomputes S, as every FlashAttention backward must, cannot. Nor can it form ``dP - delta`` without the
    roundings of both: with a single key the difference is exactly 0. There delta comes from the output as stored, in the
    inputs' dtype.
    """
    with torch.no_grad():
        q, k, v = (x.double() for x in hide_unseen(q, k, v, spec))
        k, v = (x.repeat_interleave(spec.group_size, dim=1) for x in (k, v))
        scores = (q @ k.mT) * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        visible, bias, keep = _dense(spec)
        score_terms = spec.scale * (q.abs() @ k.abs().mT)
        if bias is not None:
            scores, score_terms = scores + bias.double(), score_terms + bias.abs().double()
        lse = lse.masked_fill(lse.isinf(), 0.0)[..., None]
        p = torch.exp(scores - lse).masked_fill(~visible, 0.0)
        eps, stored_eps = (torch.finfo(dtype).eps for dtype in (spec.accumulate_dtype, spec.dtype))
        p_error = eps * p * (1 + lse.abs() + score_terms)
        # A softmax weight is off by 1 at most, however uncertain the scores. One that a backward recomputes is not.
        weight_error = p_error.clamp(max=1)
        if keep is not None:  # on its way to V a weight is multiplied, and so is the gradient on its way back
            weight_error, p_error, p_kept = weight_error * keep, p_error * keep.clamp(min=1), p * keep.clamp(min=1)
        errors = {"out": weight_error @ v.abs(), "lse": eps * (p * score_terms).sum(-1)}
        p = p if keep is None else p_kept
        if grad_out is not None:
            incoming = grad_out.double().abs()
            delta = (incoming * out.abs()).sum(-1, keepdim=True)
            dp = incoming @ v.abs().mT
            ds_error = p_error * (dp + delta) + stored_eps * p * delta
            if grad_lse is not None:
                ds_error = ds_error + p_error * grad_lse.double().abs()[..., None]
            ds_error = spec.scale * ds_error
            shared = (spec.kv_heads, spec.group_size)
            errors["dq"] = ds_error @ k.abs()
            errors["dk"] = (ds_error.mT @ q.abs()).unflatten(1, shared).sum(2)
            errors["dv"] = (p_error.mT @ incoming).unflatten(1, shared).sum(2)
        return {name: float(error.max()) if error.numel() else 0.0 for name, error in errors.items()}


def _expect_shape(name: str, result: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(result).__name__}")
    if result.shape != shape:
        raise ValueError(f"{name} has shape {tuple(result.shape)}; expected {tuple(shape)}")
