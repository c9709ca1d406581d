"""The running softmax that ex02 writes and ex03 cuts into tiles, and the mistakes that people make in it.

Shapes: m, l and lse ``[..., rows]``, acc and out ``[..., rows, Dv]``, scores ``[..., rows, keys]``, v ``[..., keys, Dv]``.
A mistake in one step is a function of m, l, acc, scores and v, which answers with the new m, l, acc. A mistake in the whole
is a function of scores, v and the number of keys in a block, which answers with out and lse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flashlib.course.exercises.mistakes import EXP2_FOR_EXP
from flashlib.course.grader.exercise import Misconception

State = tuple[Tensor, Tensor, Tensor]  # m, l, acc


def finite(x: Tensor) -> Tensor:
    """0 in place of -inf: what may be subtracted from -inf."""
    return x.masked_fill(x == -torch.inf, 0.0)


def nonzero(x: Tensor) -> Tensor:
    """1 in place of 0: what 0 may be divided by."""
    return x.masked_fill(x == 0, 1.0)


def running_maximum(m: Tensor, scores: Tensor) -> Tensor:
    return torch.maximum(m, scores.amax(-1))


def step(
    m: Tensor,
    l: Tensor,
    acc: Tensor,
    scores: Tensor,
    v: Tensor,
    *,
    maximum: Callable[[Tensor, Tensor], Tensor] = running_maximum,
    rescale_l: Callable[[Tensor], Tensor] = torch.exp,
    rescale_acc: Callable[[Tensor], Tensor] = torch.exp,
    pivot_of: Callable[[Tensor, Tensor], Tensor] = lambda m_new, scores: finite(m_new),
) -> State:
    """What `update` should compute, in the dtype of its arguments. Each option is a place for a mistake."""
    m_new = maximum(m, scores)
    shift = m - finite(m_new)
    weights = torch.exp(scores - pivot_of(m_new, scores)[..., None])
    return m_new, l * rescale_l(shift) + weights.sum(-1), acc * rescale_acc(shift)[..., None] + weights @ v


def step64(*args: Tensor) -> State:
    return step(*(x.double() for x in args))


def run(
    scores: Tensor, v: Tensor, block: int, *, one_step: Callable[..., State] = step, start: float = -torch.inf
) -> State:
    """The state after a loop over the blocks of keys, in the dtype of the scores."""
    m = scores.new_full(scores.shape[:-1], start)
    state = m, torch.zeros_like(m), m.new_zeros(*m.shape, v.shape[-1])
    for scores_block, v_block in zip(scores.split(block, -1), v.split(block, -2), strict=True):
        state = one_step(*state, scores_block, v_block)
    return state


def finish(m: Tensor, l: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
    return acc / nonzero(l)[..., None], m + l.log()


def finish_without_care(m: Tensor, l: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
    return acc / l[..., None], m + l.log()


def undivided(m: Tensor, l: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
    return acc, m + l.log()


def attention64(scores: Tensor, v: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """out and lse in float64. The block changes nothing."""
    return finish(*run(scores.double(), v.double(), scores.shape[-1]))


# ------------------------------------------------------------------------------------------------ mistakes in one step


def divided_each_time(m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor) -> State:
    m_new, l_new, acc_new = step(m, l, acc, scores, v)
    return m_new, l_new, acc_new / nonzero(l_new)[..., None]


def kept_normalized(m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor) -> State:
    return divided_each_time(m, l, acc * l[..., None], scores, v)


def block_divided(m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor) -> State:
    m_new, l_new, _ = step(m, l, acc, scores, v)
    divided = scores - nonzero(l_new).log()[..., None]
    return m_new, l_new, step(m, l, acc, divided, v, maximum=lambda m, scores: m_new)[2]


def careless_of_hidden_rows(m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor) -> State:
    m_new = running_maximum(m, scores)
    rescale, weights = torch.exp(m - m_new), torch.exp(scores - m_new[..., None])
    return m_new, l * rescale + weights.sum(-1), acc * rescale[..., None] + weights @ v


DIVIDED_INSIDE = Misconception(
    "divided-inside",
    "acc is divided by l in every step. It is a plain sum of exp(s - m) * v, and the next step takes it for that.",
    "Where must the one division stand, if every step is to add to a sum?",
)

STEP_MISTAKES = (
    Misconception(
        "no-rescale",
        "When the maximum rose, l and acc stayed as they were: they still count in units of exp(-old maximum).",
        "Write exp(s - m_new) as exp(s - m_old) times something. Does that something depend on s?",
        partial(step, rescale_l=torch.ones_like, rescale_acc=torch.ones_like),
    ),
    Misconception(
        "l-not-rescaled",
        "When the maximum rose, acc was rescaled but l was not: the row is divided by too large a sum.",
        "l and acc are sums over the same weights. What is done to one must be done to the other.",
        partial(step, rescale_l=torch.ones_like),
    ),
    Misconception(
        "acc-not-rescaled",
        "When the maximum rose, l was rescaled but acc was not: the values seen early count too much.",
        "l and acc are sums over the same weights. What is done to one must be done to the other.",
        partial(step, rescale_acc=torch.ones_like),
    ),
    Misconception(
        "rescale-inverted",
        "The old sums were multiplied by exp(m_new - m_old). They must shrink when the maximum rises.",
        "The maximum never falls. Should the factor be above 1 or below?",
        partial(step, rescale_l=lambda x: torch.exp(-finite(x)), rescale_acc=lambda x: torch.exp(-finite(x))),
    ),
    Misconception(
        "old-maximum-forgotten",
        "m is the maximum of the last block alone. If an earlier score was far larger, exp overflows.",
        "m is the largest score of the row so far. Which two numbers must be compared?",
        partial(step, maximum=lambda m, scores: scores.amax(-1)),
    ),
    Misconception(
        "weights-from-block-maximum",
        "From the new scores the block's own maximum was subtracted, not the running one: two sums in different units.",
        "Before you add two sums of exponentials: was the same number subtracted in both?",
        partial(step, pivot_of=lambda m_new, scores: finite(scores.amax(-1))),
    ),
    Misconception(
        "no-max-subtraction",
        "exp was taken of the raw scores. exp(89) is already infinite in float32.",
        "Softmax does not change when the same number is subtracted from a whole row. Which one keeps exp in range?",
        partial(
            step,
            rescale_l=torch.ones_like,
            rescale_acc=torch.ones_like,
            pivot_of=lambda m_new, scores: torch.zeros_like(m_new),
        ),
    ),
    Misconception(
        "max-over-whole-block",
        "One maximum was taken for all rows of the block. A row far below the others then loses everything.",
        "Each row has its own softmax. Along which axis must the maximum be taken?",
        partial(step, maximum=lambda m, scores: torch.maximum(m, scores.max())),
    ),
    Misconception(
        "hidden-row-nan",
        "A row that had seen only -inf gave NaN: -inf - -inf is NaN.",
        "What is m after a block of nothing but hidden scores? What could be subtracted in its place?",
        careless_of_hidden_rows,
    ),
    replace(DIVIDED_INSIDE, model=kept_normalized),
    replace(DIVIDED_INSIDE, model=divided_each_time),
    replace(DIVIDED_INSIDE, model=block_divided),
)

# ----------------------------------------------------------------------------------------------- mistakes in the whole


def in_a_loop(mistake: Misconception, end: Callable[..., tuple[Tensor, Tensor]]) -> Misconception:
    """A mistake in the step, seen through the loop and its `end`."""
    return replace(
        mistake,
        says=f"{mistake.says} (In the step that your loop repeats.)",
        model=lambda scores, v, block: end(*run(scores, v, block, one_step=mistake.model)),
    )


def with_lse(lse_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right output, with an lse made from m and l in another way."""

    def model(scores, v, block):
        m, l, acc = run(scores.double(), v.double(), scores.shape[-1])
        return finish(m, l, acc)[0], lse_of(m, l)

    return model


def with_keys(visible: Callable[[int, int], slice]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention over some of the keys, chosen by their number and the block; over all of them if that leaves none."""

    def model(scores, v, block):
        keys = visible(scores.shape[-1], block)
        keys = keys if scores[..., keys].numel() else slice(None)
        return attention64(scores[..., keys], v[..., keys, :])

    return model


def started_at_zero(scores: Tensor, v: Tensor, block: int, *, end: Callable[..., tuple[Tensor, Tensor]]):
    return end(*run(scores, v, block, start=0.0))


def padded_with_zeros(scores: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    padding = -scores.shape[-1] % block
    pad = torch.nn.functional.pad
    return attention64(pad(scores, (0, padding)), pad(v, (0, 0, 0, padding)))


def blocks_averaged(scores: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = zip(scores.split(block, -1), v.split(block, -2), strict=True)
    return torch.stack([attention64(*each)[0] for each in blocks]).mean(0), attention64(scores, v)[1]


LSE_SAYS = "lse is the natural logarithm of the sum of exp(score) over the row."
LSE_HINT = "sum exp(s) = exp(m) * sum exp(s - m). Take the natural logarithm of both sides."
LSE_MISTAKES = tuple(
    Misconception(slug, f"{says} {LSE_SAYS}", LSE_HINT, with_lse(lse_of))
    for slug, says, lse_of in (
        ("lse-without-log", "lse is m + l: the logarithm of l is missing.", lambda m, l: m + l),
        ("lse-without-log", "lse is l, without any logarithm.", lambda m, l: l),
        ("lse-without-maximum", "lse is log l: m is missing.", lambda m, l: l.log()),
        ("lse-without-sum", "lse is m: log l is missing.", lambda m, l: m),
        ("lse-base-2", "The logarithm of l has base 2.", lambda m, l: m + l.log2()),
        ("lse-base-2", "All of lse is in base 2.", lambda m, l: (m + l.log()) / math.log(2)),
        ("lse-negated", "log l is subtracted from m, not added.", lambda m, l: m - l.log()),
    )
)


def in_base_2(scores: Tensor, v: Tensor, block: int, *, lse_of: Callable[[Tensor, Tensor], Tensor]):
    """2 to the power of the scores in place of e, with an lse made from the maxima and sums of the rows."""
    scores = scores.double()
    m = scores.amax(-1)
    weights = torch.exp2(scores - finite(m)[..., None])
    l = weights.sum(-1)
    return weights @ v.double() / nonzero(l)[..., None], lse_of(m, l)


LOOP_MISTAKES = (
    Misconception(
        "masked-row-nan",
        "A row of nothing but hidden scores gave NaN: its l is 0, and 0 / 0 is NaN. It should get zeros.",
        "Which rows have l = 0 at the end? What may they be divided by?",
        lambda scores, v, block: finish_without_care(*run(scores, v, block)),
    ),
    *(
        Misconception(
            "max-starts-at-zero",
            "The running maximum started at 0. In a row of very negative scores every exp is then 0, and l is 0.",
            "From which value must a running maximum start, so that any first score replaces it?",
            partial(started_at_zero, end=end),
        )
        for end in (finish, finish_without_care)
    ),
    Misconception(
        "dropped-key-tail",
        "The last keys were left out: block does not divide their number, and the shorter last block counts too.",
        "How many blocks does your loop visit for 10 keys in blocks of 4? How many are there?",
        with_keys(lambda count, block: slice(0, count // block * block)),
    ),
    Misconception(
        "padding-counted",
        "The last block was filled up with zeros, and the zeros were counted. exp(0) is 1: a padded key gets a weight.",
        "Which score has the weight 0 under exp?",
        padded_with_zeros,
    ),
    Misconception(
        "only-last-block",
        "Only the last block counts. The state before it is lost.",
        "Which variables must live on from one block to the next? Where are they set?",
        with_keys(lambda count, block: slice((count - 1) // block * block, None)),
    ),
    Misconception(
        "only-first-block",
        "Only the first block counts.",
        "Does your loop come to its second round? Does the return stand inside it?",
        with_keys(lambda count, block: slice(0, block)),
    ),
    Misconception(
        "blocks-averaged",
        "Each block got a softmax of its own, and their outputs were averaged. Blocks do not weigh the same.",
        "How heavy should a block be whose scores are all far below those of another?",
        blocks_averaged,
    ),
    Misconception(
        "not-normalized",
        "out was never divided by l: its weights do not sum to 1.",
        "acc is the numerator. What is the denominator?",
        lambda scores, v, block: undivided(*run(scores, v, block)),
    ),
    Misconception(
        "last-block-dropped",
        "The last block was left out, though it is a whole one.",
        "What is the last start that your loop over the blocks takes? range ends before its end.",
        with_keys(lambda count, block: slice(0, (count - 1) // block * block)),
    ),
    *(
        replace(EXP2_FOR_EXP, model=partial(in_base_2, lse_of=lse_of))
        for lse_of in (lambda m, l: m + l.log(), lambda m, l: m + l.log2())
    ),
)

ONLINE_MISTAKES = (
    *LSE_MISTAKES,
    *LOOP_MISTAKES,
    *(in_a_loop(mistake, end) for mistake in STEP_MISTAKES for end in (finish, finish_without_care)),
    *(in_a_loop(mistake, undivided) for mistake in STEP_MISTAKES if mistake.slug == DIVIDED_INSIDE.slug),
)
