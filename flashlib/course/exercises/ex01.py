"""Checks of ex01: a softmax that does not overflow, and attention as the formula reads."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises import drawing
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.mistakes import (
    ASSUMES_CONTIGUOUS,
    CAUSAL_IGNORED,
    CAUSAL_MISSES_ITSELF,
    CAUSAL_SEES_THE_NEXT,
    CAUSAL_TOP_LEFT,
    KEYS_RESHAPED,
)
from flashlib.course.exercises.softmax import (
    NOT_NORMALIZED,
    row_max,
    softmax64,
    softmax_naive,
    softmax_terms,
    softmax_with,
)
from flashlib.course.grader.exercise import SDPA, SOFTMAX, Exercise, Misconception, Target, budget_of
from flashlib.course.grader.inputs import transposed_in_poison
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex01",
    file="ex01_softmax.py",
    title="Stable softmax and naive attention",
    chapter="01_naive_attention",
    difficulty=2,
    importance=5,
    minutes=30,
    forbidden=SDPA | SOFTMAX,
)

# ------------------------------------------------------------------------------------------------------------- softmax


def summed_in_half(x: Tensor) -> Tensor:
    weights = torch.exp(x - row_max(x))
    return weights / weights.sum(-1, keepdim=True)


def softmax_in_float32(x: Tensor) -> Tensor:
    weights = torch.exp(x.float() - row_max(x.float()))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


_PLAIN_MISTAKES = (
    Misconception(
        "computed-in-float32",
        "float64 scores were computed in float32: half of their digits are lost.",
        "To which dtype do you convert? At least float32 is not always float32.",
        lambda x: softmax_in_float32(x).to(x.dtype),
    ),
    Misconception(
        "masked-row-nan",
        "A row of nothing but -inf gave NaN: -inf minus the maximum of -inf is NaN.",
        "Find the rows whose maximum is -inf before you subtract. What should exp see there?",
        lambda x: softmax_with(x, x.amax(-1, keepdim=True)),
    ),
    Misconception(
        "max-starts-at-zero",
        "The maximum was never below 0. In a row of very negative scores every exp is then 0, and 0 / 0 is NaN.",
        "From which value must a running maximum start, so that any first entry replaces it?",
        lambda x: softmax_with(x, row_max(x).clamp(min=0.0)),
    ),
    Misconception(
        "no-max-subtraction",
        "exp was taken of the raw scores. exp(89) is already infinite in float32, exp(12) in float16.",
        "Softmax does not change when the same number is subtracted from a whole row. Which number keeps exp in range?",
        lambda x: softmax_with(x, torch.zeros(())),
    ),
    Misconception(
        "max-over-whole-tensor",
        "One maximum was subtracted from the whole tensor. A row far below it turns into zeros, and 0 / 0 is NaN.",
        "Each row has its own softmax. Along which axis must the maximum be taken?",
        lambda x: softmax_with(x, x.max()),
    ),
    Misconception(
        "mean-subtracted",
        "The mean of the row was subtracted instead of its maximum. An entry far above the mean still overflows.",
        "What is the largest exponent that remains after your subtraction?",
        lambda x: softmax_with(x, x.mean(-1, keepdim=True)),
    ),
    Misconception(
        "wrong-axis",
        "The weights sum to 1 over another axis than the last.",
        "Print the sum of your result over the last axis. What should it be?",
        lambda x: softmax64(x.movedim(0, -1)).movedim(-1, 0),
    ),
    Misconception(
        "wrong-axis",
        "The weights sum to 1 over the last but one axis: each column is normalized, not each row.",
        "Print the sum of your result over the last axis. What should it be?",
        lambda x: softmax64(x[None].mT).mT[0],
    ),
    replace(NOT_NORMALIZED, model=lambda x: torch.exp(x.double() - row_max(x.double()))),
    Misconception(
        "epsilon-in-denominator",
        "Something was added to the denominator. It makes every weight too small, and it is not needed.",
        "After the maximum is subtracted the sum is at least 1, unless the row is empty. Treat that row by itself.",
        lambda x: _over_total_plus(x, 1e-6),
    ),
    Misconception(
        "epsilon-in-denominator",
        "Something was added to the denominator. It makes every weight too small, and it is not needed.",
        "After the maximum is subtracted the sum is at least 1, unless the row is empty. Treat that row by itself.",
        lambda x: _over_total_plus(x, 1e-5),
    ),
    Misconception(
        "masked-row-uniform",
        "A row of nothing but -inf gave equal weights. There is nothing to look at: its weights are all 0.",
        "A large negative number is not -inf: when all scores are that number, subtracting the maximum gives all zeros.",
        lambda x: torch.softmax(x.double().nan_to_num(neginf=-1e9), -1),
    ),
    Misconception(
        "summed-in-half",
        "The sum was kept in float16, which ends at 65504. More keys than that, and the sum is infinite.",
        "Keep the exponentials and their sum in float32, and round once at the end.",
        summed_in_half,
    ),
    Misconception(
        "lse-cancellation",
        "exp(x - (max + log(sum))) is right on paper. Where the scores are large, max + log(sum) rounds away the logarithm.",
        "In which order do the subtractions keep the small number small?",
        lambda x: torch.exp(x - (row_max(x) + torch.exp(x - row_max(x)).sum(-1, keepdim=True).log())),
    ),
)


def _with_nan_replaced(mistake: Misconception) -> Misconception:
    """The same mistake in code that also turns 0 / 0 into 0."""
    return replace(mistake, model=lambda x: mistake.model(x).nan_to_num(nan=0.0, posinf=torch.inf))


SOFTMAX_MISTAKES = (*_PLAIN_MISTAKES, *(_with_nan_replaced(mistake) for mistake in _PLAIN_MISTAKES))


def _over_total_plus(x: Tensor, epsilon: float) -> Tensor:
    weights = torch.exp(x.double() - row_max(x.double()))
    return weights / (weights.sum(-1, keepdim=True) + epsilon)


softmax = Target(
    "softmax",
    oracle=softmax64,
    budget=budget_of(softmax_naive, softmax64, softmax_terms),
    outputs={"weights": None},
    misconceptions=SOFTMAX_MISTAKES,
)


@exercise.property(points=2, hints=["Two axes are involved: the one you sum over, and the ones you keep."])
def softmax_of_moderate_rows(t: Trial) -> None:
    """softmax agrees with float64 on ordinary rows, for any number of axes"""
    for shape, dtype in [
        ((4, 4), torch.float32),
        ((2, 3, 5), torch.float16),
        ((7,), torch.float64),
        ((2, 3, 4, 1), torch.float32),
    ]:
        t.check(softmax, t.randn(*shape, dtype=dtype))


@exercise.property(
    points=2, hints=["What does exp give for the largest entry of the row, before and after your subtraction?"]
)
def softmax_of_large_rows(t: Trial) -> None:
    """softmax survives rows of very large scores"""
    t.check(softmax, t.uniform(9e3, 9.01e3, 5, 6))
    t.check(softmax, 3e4 + 16 * t.randn(5, 6, dtype=torch.float16))


@exercise.property(points=2, hints=["If every exponential of a row is 0, which number did you subtract?"])
def softmax_of_very_negative_rows(t: Trial) -> None:
    """softmax survives rows of very negative scores"""
    t.check(softmax, t.uniform(200, 210, 5, 6))  # who fails here never subtracts; who fails only below starts at 0
    x = t.uniform(-9.01e3, -9e3, 5, 6)
    x[t.integer(0, 4)] += 1e3
    t.check(softmax, x)


@exercise.property(points=1, hints=["Follow one row whose scores are much smaller than those of another row."])
def softmax_of_rows_far_apart(t: Trial) -> None:
    """softmax treats each row by itself, however far apart they are, and each entry, however far it stands out"""
    t.check(softmax, t.randn(6, 8) + 400.0 * t.permutation(6)[:, None])
    standing_out = t.randn(6, 64) + 1000.0
    standing_out[torch.arange(6), t.permutation(64)[:6]] += 300.0
    t.check(softmax, standing_out)


@exercise.property(
    points=2, hints=["An entry of -inf has weight 0. A row of them has no maximum to subtract and no sum to divide by."]
)
def softmax_of_masked_rows(t: Trial) -> None:
    """softmax gives -inf the weight 0, and a row of nothing but -inf all zeros"""
    height = 200.0 * (1 + t.permutation(6))
    x = t.randn(6, 8) + height[:, None]
    x[t.uniform(0, 1, 6, 8) < 0.4] = -torch.inf
    x[:, 3] = height
    t.check(softmax, x)
    x[t.integer(0, 5)] = -torch.inf
    t.check(softmax, x)


@exercise.property(points=1, hints=["What is the largest number that float16 can hold?"])
def softmax_of_long_half_rows(t: Trial) -> None:
    """softmax of a float16 row of 80,000 entries still sums to 1"""
    t.check(softmax, t.uniform(-0.01, 0.01, 2, 80_000, dtype=torch.float16))


@exercise.property(points=1)
def softmax_leaves_its_input_alone(t: Trial) -> None:
    """softmax does not change its input"""
    t.check_inputs_untouched(softmax, t.randn(5, 6))


# ----------------------------------------------------------------------------------------------------------- attention


def attention64(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    return reference.oracle(q, k, v, scale=scale, causal=causal)[0]


def attention_budget(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> float:
    return reference.error_budget(q, k, v, scale=scale, causal=causal).out


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return (q.double() @ k.double().mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def _masked(scores: Tensor, causal: bool, offset: int | None = None, fill: float = -torch.inf) -> Tensor:
    """Scores with `fill` where key j > i + offset; bottom-right aligned unless an offset is given."""
    if not causal:
        return scores
    offset = scores.shape[-1] - scores.shape[-2] if offset is None else offset
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(offset), fill)


def _shifted_mask(amount: int):
    def model(q, k, v, scale=None, causal=False):
        return softmax64(_masked(_scores(q, k, scale), causal, k.shape[-2] - q.shape[-2] + amount)) @ v.double()

    return model


def _masked_afterwards(q, k, v, scale=None, causal=False):
    return _masked(softmax64(_scores(q, k, scale)), causal, fill=0.0) @ v.double()


def _keys_reversed(q, k, v, scale=None, causal=False):
    scores = _scores(q, k, scale)
    offset = k.shape[-2] - q.shape[-2]
    return (
        softmax64(scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).triu(offset), -torch.inf)) @ v.double()
    )


def as_dense(q, k, v, scale=None, causal=False) -> Dense:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1 + k.shape[-2] - q.shape[-2])
    return Dense(
        q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, scale is None, hidden=hidden if causal else None
    )


# The causal ones, and those of the softmax, are more than the formula knows of.
_FORMULA_MISTAKES = (
    *(
        mistake
        for mistake in formula_mistakes(as_dense, lambda out, lse: out)
        if mistake.slug in ("missing-scale", "scale-ignored", "wrong-axis")
    ),
    replace(
        KEYS_RESHAPED,
        model=lambda q, k, v, scale=None, causal=False: (
            softmax64(_masked(_scores(q, k.reshape(*k.shape[:2], *k.shape[:1:-1]).mT, scale), causal)) @ v.double()
        ),
    ),
    Misconception(
        "scaled-by-d",
        "The scores were divided by D, not by its square root.",
        "The scale should bring the scores' standard deviation to 1, not their variance to 1 / D.",
        lambda q, k, v, scale=None, causal=False: (
            softmax64(_masked(_scores(q, k, 1 / q.shape[-1]), causal)) @ v.double()
        ),
    ),
    Misconception(
        "scaled-by-length",
        "The scale was taken from the sequence length, not from the head dimension.",
        "Which axis of q is summed over in the dot product?",
        lambda q, k, v, scale=None, causal=False: (
            softmax64(_masked(_scores(q, k, q.shape[-2] ** -0.5), causal)) @ v.double()
        ),
    ),
    replace(
        CAUSAL_IGNORED, model=lambda q, k, v, scale=None, causal=False: softmax64(_scores(q, k, scale)) @ v.double()
    ),
    replace(
        CAUSAL_TOP_LEFT,
        model=lambda q, k, v, scale=None, causal=False: (
            softmax64(_masked(_scores(q, k, scale), causal, 0)) @ v.double()
        ),
    ),
    replace(CAUSAL_MISSES_ITSELF, model=_shifted_mask(-1)),
    replace(CAUSAL_SEES_THE_NEXT, model=_shifted_mask(1)),
    Misconception(
        "causal-reversed",
        "The causal mask hides the past and shows the future.",
        "Print the mask of a 3 x 3 example: which corner is hidden?",
        _keys_reversed,
    ),
    Misconception(
        "masked-after-softmax",
        "The mask was applied to the weights. What is left of a row then no longer sums to 1.",
        "Hide a key before it takes part in the sum.",
        _masked_afterwards,
    ),
    Misconception(
        "masked-with-zero",
        "Hidden scores were set to 0. exp(0) is 1: a hidden key still gets a weight.",
        "Which score has the weight 0 under exp?",
        lambda q, k, v, scale=None, causal=False: (
            softmax64(_masked(_scores(q, k, scale), causal, fill=0.0)) @ v.double()
        ),
    ),
    Misconception(
        "masked-row-uniform",
        "A query that may see no key got the average of all values. It should get zeros.",
        "A large negative number is not -inf: when all scores are that number, they are all equal.",
        lambda q, k, v, scale=None, causal=False: (
            torch.softmax(_masked(_scores(q, k, scale), causal, fill=-1e9), -1) @ v.double()
        ),
    ),
    Misconception(
        "masked-row-nan",
        "A query that may see no key got NaN. It should get zeros.",
        "Does your attention use the softmax that you wrote, with its answer for rows of nothing but -inf?",
        lambda q, k, v, scale=None, causal=False: torch.softmax(_masked(_scores(q, k, scale), causal), -1) @ v.double(),
    ),
    Misconception(
        "not-normalized",
        "The weights of a query do not sum to 1.",
        "Print the sum of the weights over the keys.",
        lambda q, k, v, scale=None, causal=False: (
            torch.exp((s := _masked(_scores(q, k, scale), causal)) - row_max(s)) @ v.double()
        ),
    ),
)


def _in_attention(mistake: Misconception) -> Misconception:
    """A mistake in the softmax, seen through attention."""

    def model(q, k, v, scale=None, causal=False):
        return mistake.model(_masked(_scores(q, k, scale), causal)) @ v.double()

    return replace(mistake, says=f"{mistake.says} (In the softmax that your attention uses.)", model=model)


ATTENTION_MISTAKES = (*_FORMULA_MISTAKES, *(_in_attention(mistake) for mistake in SOFTMAX_MISTAKES))
attention = Target("naive_attention", oracle=attention64, budget=attention_budget, misconceptions=ATTENTION_MISTAKES)


draw = partial(drawing.draw, batch=2, heads=3, dim=8, v_dim=8)


@exercise.property(points=2, hints=["Write the shape beside each line: scores [B, H, Sq, Sk], output [B, H, Sq, Dv]."])
def attention_matches_the_formula(t: Trial) -> None:
    """naive_attention agrees with float64, also when Sq, Sk, D and Dv all differ"""
    t.check(attention, *draw(t, 6, 6))
    t.check(attention, *draw(t, 5, 9, dim=16, v_dim=7))
    t.check(attention, *draw(t, 1, 13, dim=4, v_dim=3))


@exercise.property(points=1, hints=["The caller's scale replaces the default; it does not multiply it."])
def attention_uses_the_given_scale(t: Trial) -> None:
    """naive_attention uses the scale it is given"""
    t.check(attention, *draw(t, 5, 7), scale=float(t.uniform(0.6, 0.9, 1)))
    t.check(attention, *draw(t, 5, 7), scale=1.0)


@exercise.property(points=2, hints=["Hide the scores of the future before the softmax."])
def attention_causal(t: Trial) -> None:
    """causal: a query sees itself and its past"""
    t.check(attention, *draw(t, 7, 7), causal=True)
    t.check(attention, *draw(t, 1, 1), causal=True)


@exercise.property(points=2, hints=["With a cache of Sk - Sq earlier keys, query i stands at position i + Sk - Sq."])
def attention_causal_with_more_keys(t: Trial) -> None:
    """causal with Sq < Sk: the last query sees the last key"""
    t.check(attention, *draw(t, 4, 9), causal=True)
    t.check(attention, *draw(t, 1, 6), causal=True)


@exercise.property(points=1, hints=["With Sq > Sk the first Sq - Sk queries stand before the first key."])
def attention_rows_that_see_nothing(t: Trial) -> None:
    """causal with Sq > Sk: a query before all keys gets zeros"""
    t.check(attention, *draw(t, 9, 5), causal=True)


@exercise.property(points=1, hints=["The output has the dtype of the inputs."])
def attention_in_half_precision(t: Trial) -> None:
    """naive_attention of float16 gives float16, within the error budget"""
    t.check(attention, *draw(t, 6, 33, dim=32, dtype=torch.float16))
    t.check(attention, *draw(t, 6, 6, dtype=torch.float16), causal=True)


@exercise.property(
    points=1, hints=["A tensor in any memory layout has the same values. Do not rely on where they lie."]
)
def attention_of_transposed_inputs(t: Trial) -> None:
    """naive_attention reads strided inputs right, and nothing beyond them"""
    plain = draw(t, 5, 7)
    strided = [transposed_in_poison(x) for x in plain]
    t.check(attention, *strided, causal=True, if_it_raises=ASSUMES_CONTIGUOUS, but_not_on=plain)


@exercise.property(points=1)
def attention_leaves_its_inputs_alone(t: Trial) -> None:
    """naive_attention does not change q, k or v"""
    t.check_inputs_untouched(attention, *draw(t, 5, 5), causal=True)
