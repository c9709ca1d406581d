"""Results over disjoint sets of keys that become one result, as ex02 and ex10 write it, and the mistakes that people make.

Shapes: outs ``[P, ..., Dv]`` and lses ``[P, ...]`` of P pieces, out ``[..., Dv]`` and lse ``[...]`` of the whole. A mistake is
a function of outs and lses, which answers with out and lse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises.online_softmax import finite, nonzero
from flashlib.course.grader.exercise import Misconception, budget_of


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """What `fold` should compute, in the dtype of its arguments. An lse of +inf outweighs all others."""
    if not len(lses):
        return torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)
    weights = from_largest(lses)
    total = weights.sum(0)
    outs = outs.masked_fill((lses == -torch.inf)[..., None], 0.0)
    return (weights[..., None] * outs).sum(0) / nonzero(total)[..., None], lses.amax(0) + total.log()


def from_largest(lses: Tensor) -> Tensor:
    """exp(lse - largest lse of the row), ``[P, ...]``. Equal infinities differ by 0, except that -inf has no weight."""
    largest = lses.amax(0)
    return torch.exp(torch.where(lses == largest, 0.0, lses - largest)).masked_fill(lses == -torch.inf, 0.0)


def combine64(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = combine(outs.double(), lses.double())
    return out.double(), lse.double()


def combine_by_lse(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The other common formula: weights exp(lse_i - lse), one piece after the other. It rounds lse at every step."""
    out, lse = torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)
    for piece, piece_lse in zip(outs, lses, strict=True):
        both = torch.logaddexp(lse, piece_lse)
        piece = piece.masked_fill((piece_lse == -torch.inf)[..., None], 0.0)
        old_weight, weight = (torch.exp(x - finite(both))[..., None] for x in (lse, piece_lse))
        out, lse = old_weight * out + weight * piece, both
    return out, lse


def combine_terms(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Whoever merges one piece after the other rounds what he has with each of them."""
    lse = finite(combine64(outs, lses)[1])
    weights = len(lses) * torch.exp(lses - lse) * (1 + lse.abs() + finite(lses).abs())
    outs = outs.masked_fill((lses == -torch.inf)[..., None], 0.0)
    return (weights[..., None] * outs.abs()).sum(0), weights.sum(0)


fold_budget = budget_of(lambda outs, lses: [combine(outs, lses), combine_by_lse(outs, lses)], combine64, combine_terms)


def merged_budget(q: Tensor, k: Tensor, v: Tensor, pieces: int, **options) -> reference.ErrorBudget:
    """Attention's error budget, for an answer that is merged from so many pieces.

    Every merge rounds the running lse. It is an exponent of what is merged next, so an output that has been through n
    merges carries n roundings of 1 + |lse|. Naive attention makes none of them, in whatever order it sums.

    Args:
        q, k, v, **options: as in :func:`flashlib.reference.error_budget`.
        pieces: tiles, chunks, pages or splits of a row's keys.
    """
    budget = reference.error_budget(q, k, v, **options)
    magnitude, lse = reference.oracle(q, k, v.abs(), **options)
    rounding = pieces * torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps * (1 + finite(lse).abs())
    return reference.ErrorBudget(
        out=budget.out + float((rounding[..., None] * magnitude).max()), lse=budget.lse + float(rounding.max())
    )


def weighted(
    weights_of: Callable[[Tensor], Tensor], *, hides: bool = True, normalized: bool = True
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A model with the right lse, whose output has other weights `[P, ...]`, made from lses `[P, ...]`."""

    def model(outs, lses):
        weights = weights_of(lses)[..., None]
        hidden = outs.masked_fill((lses == -torch.inf)[..., None], 0.0) if hides else outs
        total = nonzero(weights.sum(0)) if normalized else 1.0
        return (weights * hidden).sum(0) / total, combine(outs, lses)[1]

    return model


def with_pivot(pivot_of: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A model that subtracts something else than each row's largest lse."""

    def model(outs, lses):
        pivot = pivot_of(lses)
        weights = torch.exp(lses - pivot)
        total = weights.sum(0)
        outs = outs.masked_fill((lses == -torch.inf)[..., None], 0.0)
        return (weights[..., None] * outs).sum(0) / nonzero(total)[..., None], pivot + total.log()

    return model


def with_piece_lse(lse_of: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A model with the right output and another lse."""
    return lambda outs, lses: (combine(outs, lses)[0], lse_of(lses))


PIECE_LSE_SAYS = "lse says how many keys, weighted by exp(score), lie in the two pieces together."
PIECE_LSE_HINT = "lse = log(exp(lse_a) + exp(lse_b)), with the larger one taken out of the exponents."
PIECE_MISTAKES = (
    Misconception(
        "pieces-averaged",
        "The outputs were averaged. A piece counts by the sum of its exponentials, not once.",
        "Say piece a holds 99 keys and piece b one, all with the same score. How heavy should a be?",
        weighted(torch.ones_like),
    ),
    Misconception(
        "pieces-added",
        "The outputs were added. Each was already divided by the sum of its own weights.",
        "What would a piece's output have to be multiplied by to undo its division?",
        weighted(torch.ones_like, normalized=False),
    ),
    Misconception(
        "empty-piece-read",
        "A piece without keys was multiplied by its weight 0. Its out may hold NaN, and 0 * NaN is NaN.",
        "How can a value be kept out of a sum without multiplying it?",
        weighted(from_largest, hides=False),
    ),
    Misconception(
        "empty-pieces-nan",
        "Two pieces without keys gave NaN: -inf - -inf is NaN. Together they still have no keys: 0 and -inf.",
        "What is the larger of two lse of -inf? What could be subtracted in its place?",
        with_pivot(lambda lses: lses.amax(0)),
    ),
    Misconception(
        "empty-pieces-nan",
        "Two pieces without keys gave NaN: 0 / 0 is NaN. Together they still have no keys: 0 and -inf.",
        "What do the two weights sum to, if both pieces are empty?",
        lambda outs, lses: (
            combine(outs, lses)[0].masked_fill((lses == -torch.inf).all(0)[..., None], torch.nan),
            combine(outs, lses)[1],
        ),
    ),
    Misconception(
        "weighted-by-lse",
        "The pieces were weighted by their lse itself. It is a logarithm: the weight is its exponential.",
        "What is lse the logarithm of?",
        weighted(lambda lses: lses),
    ),
    Misconception(
        "weights-swapped",
        "Each output got the weight of the other piece.",
        "Let lse_a be far larger than lse_b. Which output should survive?",
        weighted(lambda lses: from_largest(lses).flip(0)),
    ),
    Misconception(
        "weights-not-normalized",
        "The weights exp(lse - max) were not divided by their sum.",
        "Two pieces with the same lse: what do your two weights sum to?",
        weighted(from_largest, normalized=False),
    ),
    Misconception(
        "pivot-from-one-side",
        "One piece's lse was subtracted, whichever is larger. If the other is far larger, its exp overflows.",
        "Which of the two must be subtracted, so that no exponent is above 0?",
        with_pivot(lambda lses: finite(lses[0])),
    ),
    Misconception(
        "pivot-from-one-side",
        "One piece's lse was subtracted, whichever is larger. If the other is far larger, its exp overflows.",
        "Which of the two must be subtracted, so that no exponent is above 0?",
        with_pivot(lambda lses: finite(lses[-1])),
    ),
    Misconception(
        "no-max-subtraction",
        "exp was taken of lse itself. exp(89) is already infinite in float32, and exp(-104) is 0.",
        "Weights are ratios. What may be subtracted from both exponents without changing their ratio?",
        with_pivot(lambda lses: torch.zeros_like(lses[0])),
    ),
    Misconception(
        "max-over-whole-tensor",
        "One maximum was subtracted from all rows. The weights of a row far below it are all 0.",
        "Each row has its own weights. Which axis do the pieces lie along?",
        with_pivot(lambda lses: finite(lses.max()).expand(lses.shape[1:])),
    ),
    Misconception(
        "lse-is-maximum",
        f"lse is the larger of the two. {PIECE_LSE_SAYS}",
        PIECE_LSE_HINT,
        with_piece_lse(lambda x: x.amax(0)),
    ),
    Misconception(
        "lse-added", f"The two lse were added. {PIECE_LSE_SAYS}", PIECE_LSE_HINT, with_piece_lse(lambda x: x.sum(0))
    ),
    Misconception(
        "lse-without-maximum",
        f"The number taken out of the exponents was not added back to lse. {PIECE_LSE_SAYS}",
        PIECE_LSE_HINT,
        with_piece_lse(lambda x: from_largest(x).sum(0).log()),
    ),
    Misconception(
        "lse-base-2",
        f"The logarithm in lse has base 2. {PIECE_LSE_SAYS}",
        PIECE_LSE_HINT,
        with_piece_lse(lambda x: finite(x.amax(0)) + from_largest(x).sum(0).log2()),
    ),
)
NO_PIECES = Misconception(
    "no-pieces",
    "There may be no piece at all. Attention over no keys is 0, with an lse of -inf.",
    "Which piece changes nothing when it is merged? outs.shape[1:] is the shape of the answer, however many pieces there are.",
)


def one_after_the_other(mistake: Misconception, *, identity_first: bool) -> Misconception:
    """A mistake in merging two, repeated over all pieces."""

    def model(outs, lses):
        start = [(torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf))] if identity_first else []
        return reduce(
            lambda x, y: mistake.model(*map(torch.stack, zip(x, y, strict=True))),
            [*start, *zip(outs, lses, strict=True)],
        )

    return replace(mistake, model=model)


FOLD_MISTAKES = (
    *PIECE_MISTAKES,
    *(one_after_the_other(mistake, identity_first=True) for mistake in PIECE_MISTAKES),
    *(one_after_the_other(mistake, identity_first=False) for mistake in PIECE_MISTAKES),
    Misconception(
        "only-last-pieces",
        "Only the last piece counts, or the last two.",
        "Which result must live on from one piece to the next?",
        lambda outs, lses: combine(outs[-1:], lses[-1:]),
    ),
    Misconception(
        "only-last-pieces",
        "Only the last piece counts, or the last two.",
        "Which result must live on from one piece to the next?",
        lambda outs, lses: combine(outs[-2:], lses[-2:]),
    ),
    Misconception(
        "only-first-pieces",
        "Only the first two pieces count.",
        "How often does your loop run? Where does the return stand?",
        lambda outs, lses: combine(outs[:2], lses[:2]),
    ),
)
