"""Mistakes in attention's formula, for every exercise that computes it, however it is cut into tiles, splits, pages or chunks.

An exercise says how a call of its function reads as one dense problem (`Dense`), and how its answer is made of out
``[B, H, Sq, Dv]`` and lse ``[B, H, Sq]``. All mistakes are then models of that function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashlib.course.exercises.mistakes import CAUSAL_SEES_THE_NEXT, EXP2_FOR_EXP, MISSING_SCALE, SCALED_TWICE
from flashlib.course.exercises.online_softmax import State, attention64, finish, run, step
from flashlib.course.grader.exercise import Misconception


@dataclass(frozen=True)
class Dense:
    """One call, as the formula sees it.

    Attributes:
        q: ``[B, H, Sq, D]``. k: ``[B, H, Sk, D]``, v: ``[B, H, Sk, Dv]``, a head of them for each head of q. In any dtype.
        default: whether the caller gave no scale.
        scale: on the scores.
        sizes: others than D, whose root might be taken for the scale.
        absent: bool, broadcast to ``[B, H, Sq, Sk]``: keys that are not the request's, such as padding.
        hidden: bool, likewise: keys that the mask hides. None: there is no mask.
        block: keys of a tile, which the running sums are rounded after.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    default: bool = True
    sizes: tuple[int, ...] = ()
    absent: Tensor | None = None
    hidden: Tensor | None = None
    block: int | None = None

    def scores(self, scale: float | None = None, *, masked: bool = True, hidden: Tensor | None = None) -> Tensor:
        """``[B, H, Sq, Sk]`` in float64, -inf where a key is absent or hidden."""
        scores = self.q.double() @ self.k.double().mT * (self.scale if scale is None else scale)
        hidden = self.hidden if hidden is None else hidden
        for mask in (self.absent, hidden if masked else None):
            scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
        return scores

    def values(self) -> Tensor:
        """``[B, H, Sk, Dv]`` in float64, 0 where a key is absent: there may be anything."""
        if self.absent is None:
            return self.v.double()
        gone = self.absent.expand(*self.q.shape[:2], 1, self.k.shape[2])[:, :, 0, :, None]
        return self.v.double().masked_fill(gone, 0.0)


Out = tuple[Tensor, Tensor | None]  # out and lse; None where the mistake says nothing of it


def with_scale(scale_of: Callable[[Dense], float]) -> Callable[[Dense], Out]:
    return lambda dense: attention64(dense.scores(scale_of(dense)), dense.values())


def scaled_by_size(number: int) -> Callable[[Dense], Out]:
    """1 / sqrt of one of the other sizes, where the caller gave no scale."""

    def model(dense: Dense) -> Out:
        by = dense.default and number < len(dense.sizes) and dense.sizes[number] > 1
        return attention64(dense.scores(dense.sizes[number] ** -0.5 if by else None), dense.values())

    return model


def in_base_2(dense: Dense) -> Out:
    return attention64(dense.scores(dense.scale * math.log(2)), dense.values())[0], None


def over_queries(dense: Dense) -> Out:
    """Each key's weights over the queries sum to 1."""
    return torch.softmax(dense.scores(), -2).nan_to_num(nan=0.0) @ dense.values(), None


def masked_afterwards(dense: Dense) -> Out:
    """A softmax over all keys, whose weights are then set to 0 where a key is hidden."""
    weights = torch.softmax(dense.scores(masked=False), -1).nan_to_num(nan=0.0)
    weights = weights if dense.hidden is None else weights.masked_fill(dense.hidden, 0.0)
    return weights @ dense.values(), None


def without_newest(dense: Dense) -> Out:
    """The last key that each query sees is hidden from it, too."""
    scores = dense.scores()
    seen = scores > -torch.inf
    last = seen.shape[-1] - 1 - seen.flip(-1).int().argmax(-1, keepdim=True)
    return attention64(scores.scatter(-1, last, -torch.inf), dense.values())


def seeing_the_next(dense: Dense) -> Out:
    """Each query sees one key more than the mask lets it."""
    if dense.hidden is None:
        return attention64(dense.scores(), dense.values())
    one_later = torch.cat([torch.zeros_like(dense.hidden[..., :1]), dense.hidden[..., :-1]], -1)
    return attention64(dense.scores(hidden=one_later), dense.values())


def rounding_sums(*, l_too: bool, acc_too: bool, dtype: torch.dtype | None) -> Callable[[Dense], Out]:
    """l, acc or both rounded after every tile: to `dtype`, or to the inputs' own."""

    def model(dense: Dense) -> Out:
        def rounding_step(*args: Tensor) -> State:
            m, l, acc = step(*args)
            kept = dtype or dense.q.dtype
            return m, l.to(kept).float() if l_too else l, acc.to(kept).float() if acc_too else acc

        scores = dense.scores().float()
        return finish(*run(scores, dense.values().float(), dense.block or scores.shape[-1], one_step=rounding_step))

    return model


_SUMS = ((True, True), (True, False), (False, True))
_MISTAKES: tuple[tuple[Misconception, tuple[Callable[[Dense], Out], ...]], ...] = (
    (MISSING_SCALE, (with_scale(lambda dense: 1.0),)),
    (SCALED_TWICE, (with_scale(lambda dense: dense.scale**2),)),
    (
        Misconception(
            "scale-ignored",
            "The scale that the caller gave was not used: the answer is the one for 1 / sqrt(D).",
            "When is the default taken? Only when the caller gave none.",
        ),
        (with_scale(lambda dense: dense.q.shape[-1] ** -0.5),),
    ),
    (
        EXP2_FOR_EXP,
        (in_base_2,),
    ),
    (
        Misconception(
            "wrong-axis",
            "The softmax ran over the queries, not over the keys.",
            "The weights of one query over all keys sum to 1. Which axis of the scores holds the keys?",
        ),
        (over_queries,),
    ),
    (
        Misconception(
            "masked-after-softmax",
            "The mask was applied to the weights after the softmax. They were divided by a sum that counts hidden keys, too.",
            "What do the weights of a query sum to, once its hidden keys are set to 0?",
        ),
        (masked_afterwards,),
    ),
    (
        Misconception(
            "newest-key-missed",
            "The last key that a query sees was left out. A token sees itself.",
            "How many keys does the first token of a text see?",
        ),
        (without_newest,),
    ),
    (CAUSAL_SEES_THE_NEXT, (seeing_the_next,)),
    (
        Misconception(
            "accumulated-in-half",
            "l or acc was kept in 16 bits. float16 ends at 65504 and has eleven bits: a sum of many weights does not fit.",
            "With which dtype do your running sums start, and with which do they come out of the loop?",
        ),
        tuple(rounding_sums(l_too=l_too, acc_too=acc_too, dtype=None) for l_too, acc_too in _SUMS),
    ),
    (
        Misconception(
            "scaled-by-another-size",
            "The scores were scaled by one over the root of another size than the head dimension of q and k.",
            "Write the shapes of q, k and v down, and find D among the axes. Which one does your scale take?",
        ),
        tuple(scaled_by_size(number) for number in range(5)),
    ),
    (
        Misconception(
            "summed-in-half",
            "l or acc was kept in float16 even for float32 inputs: eleven bits of a sum are too few.",
            "Which dtype do your running sums have after the first tile, if q is float32?",
        ),
        tuple(rounding_sums(l_too=l_too, acc_too=acc_too, dtype=torch.float16) for l_too, acc_too in _SUMS),
    ),
)


def formula_mistakes(
    view: Callable[..., Dense],
    answer: Callable[..., Any] = lambda out, lse: (out, lse),
    *,
    leave: Collection[str] = (),
) -> tuple[Misconception, ...]:
    """The mistakes as models of an exercise's function.

    Args:
        view: its arguments, as one dense problem.
        answer: what the function returns, of out ``[B, H, Sq, Dv]`` and lse ``[B, H, Sq]`` (None if a mistake says nothing of it).
        leave: slugs that are not wanted: the exercise has its own, or they cannot be made there.
    """

    def of(model: Callable[[Dense], Out]) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(*model(view(*args, **kwargs)))

    return tuple(
        replace(mistake, model=of(model))
        for mistake, models in _MISTAKES
        if mistake.slug not in leave
        for model in models
    )
