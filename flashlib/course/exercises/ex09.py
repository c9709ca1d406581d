"""Checks of ex09: the backward pass as three Triton kernels, in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashlib import reference
from flashlib.course.exercises.compiled import expect_compiled
from flashlib.course.exercises.drawing import draw
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target, budget_of
from flashlib.course.grader.inputs import ramp, with_scores_along
from flashlib.course.grader.trial import Trial

PRODUCTS = {
    "matmul-called": (
        *("mm", "bmm", "addmm", "_addmm_activation", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear"),
        *("matmul", "einsum", "tensordot", "inner", "bilinear", "_trilinear", "convolution", "_convolution"),
    )
}

exercise = Exercise(
    name="ex09",
    file="ex09_triton_backward.py",
    title="The backward pass in Triton",
    chapter="09_backward",
    difficulty=5,
    importance=4,
    minutes=150,
    forbidden=SDPA | PRODUCTS,
    preload=("triton",),
    environment={"TRITON_INTERPRET": "1"},
)

# ------------------------------------------------------------------------------------------------- the backward, densely


@dataclass(frozen=True, eq=False)
class Backward:
    """The arguments of the student's functions, and every step of the formula, dense, in float32. Mistakes change a step.

    K and V are repeated for the query heads that share them. Shapes: s, seen, p, dp, ds ``[B, Hq, Sq, Sk]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    delta: Tensor
    grad_out: Tensor
    causal: bool
    scale: float
    block_q: int
    block_k: int
    group_size: int
    dtype: torch.dtype

    @cached_property
    def s(self) -> Tensor:
        return (self.q @ self.k.mT) * self.scale

    @cached_property
    def seen(self) -> Tensor:
        return self.below_diagonal(self.k.shape[2] - self.q.shape[2]) if self.causal else self.all_pairs

    @cached_property
    def p(self) -> Tensor:
        return self.hide(torch.exp(self.s - self.lse[..., None]))

    @cached_property
    def dp(self) -> Tensor:
        return self.grad_out @ self.v.mT

    @cached_property
    def ds(self) -> Tensor:
        return self.p * (self.dp - self.delta[..., None])

    @property
    def all_pairs(self) -> Tensor:
        return torch.ones(self.q.shape[2], self.k.shape[2], dtype=torch.bool)

    def below_diagonal(self, offset: int) -> Tensor:
        return self.all_pairs.tril(offset)

    def hide(self, x: Tensor) -> Tensor:
        return torch.where(self.seen, x, 0.0)

    def in_tiles(self, x: Tensor) -> Tensor:
        """``[B, Hq, Sq, Sk]`` filled up with zeros and cut: ``[B, Hq, row tiles, key tiles, block_q, block_k]``."""
        x = pad(x, (0, -x.shape[-1] % self.block_k, 0, -x.shape[-2] % self.block_q))
        return x.unflatten(-1, (-1, self.block_k)).unflatten(-3, (-1, self.block_q)).transpose(-2, -3)

    def from_tiles(self, x: Tensor) -> Tensor:
        whole = x.transpose(-2, -3).flatten(-4, -3).flatten(-2)
        return whole[..., : self.q.shape[2], : self.k.shape[2]]

    def over_group(self, x: Tensor) -> Tensor:
        """The sum over the query heads of each KV head."""
        return x.unflatten(1, (-1, self.group_size)).sum(2)


def prepared(q, k, v, lse, delta, grad_out, causal=False, scale=None, block_q=32, block_k=32) -> Backward:
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group_size, 1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return Backward(
        q.float(), k, v, lse, delta, grad_out.float(), causal, scale, block_q, block_k, group_size, q.dtype
    )  # fmt: skip


def right_dq(b: Backward) -> Tensor:
    return b.scale * (b.ds @ b.k)


def right_dk(b: Backward) -> Tensor:
    return b.over_group(b.scale * (b.ds.mT @ b.q))


def right_dv(b: Backward) -> Tensor:
    return b.over_group(b.p.mT @ b.grad_out)


@dataclass(frozen=True)
class Slip:
    """A mistake: which step of `Backward` it changes (`p`, `ds`, ...), or how a gradient is made of the steps.

    Attributes:
        slug, says, hint: as in `Misconception`.
        steps: name of a step to what is computed instead.
        dq, dk, dv: the last step of each gradient. None: this slip cannot be made there.
    """

    slug: str
    says: str
    hint: str
    steps: dict[str, Callable[[Backward], object]] = field(default_factory=dict)
    dq: Callable[[Backward], Tensor] | None = right_dq
    dk: Callable[[Backward], Tensor] | None = right_dk
    dv: Callable[[Backward], Tensor] | None = right_dv

    def slipped(self, *args, **kwargs) -> Backward:
        b = prepared(*args, **kwargs)
        for name, step in self.steps.items():
            b.__dict__[name] = step(b)  # in place of what the cached property would compute
        return b

    def seen_in_dq(self) -> Misconception | None:
        if self.dq is None:
            return None

        def model(*args, **kwargs):
            b = self.slipped(*args, **kwargs)
            return self.dq(b).to(b.dtype)

        return Misconception(self.slug, self.says, self.hint, model)

    def seen_in_dkdv(self) -> Misconception | None:
        if self.dk is None:
            return None

        def model(*args, **kwargs):
            b = self.slipped(*args, **kwargs)
            return self.dk(b).to(b.dtype), self.dv(b).to(b.dtype)

        return Misconception(self.slug, self.says, self.hint, model)


def with_p(change: Callable[[Backward], Tensor]) -> dict:
    return {"p": change}


def with_ds(change: Callable[[Backward], Tensor]) -> dict:
    return {"ds": change}


def with_seen(change: Callable[[Backward], Tensor]) -> dict:
    """Another mask, where there is one."""
    return {"seen": lambda b: change(b) if b.causal else b.all_pairs}


def only_dq(change: Callable[[Backward], Tensor]) -> dict:
    return {"dq": change, "dk": None, "dv": None}


def only_dkdv(*, dk: Callable[[Backward], Tensor] = right_dk, dv: Callable[[Backward], Tensor] = right_dv) -> dict:
    return {"dq": None, "dk": dk, "dv": dv}


# ------------------------------------------------------------------------------------------------------------- mistakes


def base_mixed(score_unit: float, lse_unit: float) -> dict:
    return with_p(lambda b: b.hide(torch.exp2(b.s * score_unit - b.lse[..., None] * lse_unit)))


LOG2_E = math.log2(math.e)
LSE_BASE = Slip(
    "lse-base",
    "Scores and LSE are not in the same base. The LSE is a natural logarithm; 2^x wants both times log2(e).",
    "e^(s - lse) = 2^(what?). To which of the two did your code apply it?",
)


def delta_of_each_tile(b: Backward) -> Tensor:
    tiles = b.in_tiles(b.p * b.dp)
    return b.p * (b.dp - b.from_tiles(tiles.sum(-1, keepdim=True).expand_as(tiles)))


def tiles_not_transposed(b: Backward) -> Tensor:
    """P with each tile turned about its diagonal, which only square tiles allow."""
    return b.from_tiles(b.in_tiles(b.p).mT) if b.block_q == b.block_k else b.p


def tiles_reshaped(x: Callable[[Backward], Tensor]) -> Callable[[Backward], Tensor]:
    def reshaped(b: Backward) -> Tensor:
        tiles = b.in_tiles(x(b))
        return b.from_tiles(tiles.reshape(*tiles.shape[:-2], b.block_k, b.block_q).mT)

    return reshaped


def last_rows(b: Backward, x: Tensor, per_group: Callable[[Tensor], Tensor]) -> Tensor:
    """Only what the last tile of rows gives, of the heads that `per_group` leaves."""
    first = (b.q.shape[2] - 1) // b.block_q * b.block_q
    return per_group(torch.where(torch.arange(b.q.shape[2])[:, None] >= first, x, 0.0))


def one_head(b: Backward, x: Tensor, which: int) -> Tensor:
    """``[B, Hq, ...]`` with all heads but one of each group blank."""
    kept = torch.zeros(b.group_size, dtype=torch.bool)
    kept[which] = True
    return torch.where(kept.repeat(x.shape[1] // b.group_size)[:, None, None], x, 0.0)


def from_last_rows(b: Backward, *, and_head: int | None) -> tuple[Tensor, Tensor]:
    heads = (lambda x: x) if and_head is None else (lambda x: one_head(b, x, and_head))
    ds, p = last_rows(b, b.ds, heads), last_rows(b, b.p, heads)
    return b.over_group(b.scale * (ds.mT @ b.q)), b.over_group(p.mT @ b.grad_out)


def from_one_head(b: Backward, which: int) -> tuple[Tensor, Tensor]:
    ds, p = one_head(b, b.ds, which), one_head(b, b.p, which)
    return b.over_group(b.scale * (ds.mT @ b.q)), b.over_group(p.mT @ b.grad_out)


def from_last_keys(b: Backward) -> Tensor:
    first = (b.k.shape[2] - 1) // b.block_k * b.block_k
    return b.scale * (b.ds[..., first:] @ b.k[..., first:, :])


def with_padded_keys(b: Backward) -> Tensor:
    """The keys beyond the last are counted as zeros: 0 * exp(0 - lse), which is NaN once exp overflows."""
    padding = -b.k.shape[2] % b.block_k
    k, v, seen = (pad(x, (0, 0, 0, padding)) for x in (b.k, b.v, b.seen.mT))
    beyond = torch.arange(k.shape[2]) >= b.k.shape[2]
    p = torch.where(seen.mT | beyond, torch.exp((b.q @ k.mT) * b.scale - b.lse[..., None]), 0.0)
    return b.scale * (p * (b.grad_out @ v.mT - b.delta[..., None]) @ k)


def summed_in_half(b: Backward, of_tile: Callable[[slice], Tensor], length: int, block: int) -> Tensor:
    total = 0.0
    for first in range(0, length, block):
        total = (total + of_tile(slice(first, first + block))).to(b.dtype).float()
    return total


def dv_in_half(b: Backward) -> Tensor:
    total = summed_in_half(b, lambda r: b.p[:, :, r].mT @ b.grad_out[:, :, r], b.q.shape[2], b.block_q)
    return b.over_group(total)


def dk_in_half(b: Backward) -> Tensor:
    total = summed_in_half(b, lambda r: b.ds[:, :, r].mT @ b.q[:, :, r], b.q.shape[2], b.block_q)
    return b.over_group(b.scale * total)


def dq_in_half(b: Backward) -> Tensor:
    return b.scale * summed_in_half(b, lambda c: b.ds[..., c] @ b.k[:, :, c], b.k.shape[2], b.block_k)


def rows_skipped(b: Backward) -> Tensor:
    """Tiles above the diagonal are skipped, but above the diagonal of a square."""
    tile_row = torch.arange(b.q.shape[2])[:, None] // b.block_q * b.block_q + b.block_q - 1
    tile_key = torch.arange(b.k.shape[2]) // b.block_k * b.block_k
    return b.below_diagonal(b.k.shape[2] - b.q.shape[2]) & (tile_row >= tile_key)


DELTA_SAYS = "dS = P * (dP - delta)"
SLIPS = (
    Slip(
        "delta-forgotten",
        f"delta was not subtracted: {DELTA_SAYS}. Without it the gradient forgets that the weights of a row sum to 1.",
        "If one score of a row rises, what happens to all other weights of that row?",
        with_ds(lambda b: b.p * b.dp),
        dv=right_dv,
    ),
    Slip(
        "delta-of-the-tile",
        "delta was summed over the keys of one tile. It is a number of the whole row, the same in every tile.",
        "Over how many keys does the sum of P * dP run? How many of them does a tile hold?",
        with_ds(delta_of_each_tile),
    ),
    Slip(
        "delta-added",
        f"delta was added where it is subtracted: {DELTA_SAYS}.",
        "Let all values of a row be equal. Which gradient must its scores get, and which sign gives that?",
        with_ds(lambda b: b.p * (b.dp + b.delta[..., None])),
    ),
    Slip(
        "delta-outside",
        f"delta was subtracted from P * dP, not from dP: {DELTA_SAYS}.",
        "Write out one entry of dS. What does P_ij multiply?",
        with_ds(lambda b: b.p * b.dp - b.delta[..., None]),
    ),
    Slip(
        "p-forgotten",
        f"dS was taken for dP - delta; the factor P is missing: {DELTA_SAYS}.",
        "How strongly can a score move the output, if its weight is 0?",
        with_ds(lambda b: b.hide(b.dp - b.delta[..., None])),
    ),
    replace(LSE_BASE, steps=base_mixed(LOG2_E, 1.0)),
    replace(LSE_BASE, steps=base_mixed(1.0, 1.0)),
    replace(LSE_BASE, steps=base_mixed(1.0, LOG2_E)),
    replace(LSE_BASE, steps=base_mixed(LOG2_E, LOG2_E**2)),
    Slip(
        "lse-forgotten",
        "P is exp(score), not divided by the sum of its row. The LSE holds that sum.",
        "Which number turns exp(score) into a weight? In which form was it saved?",
        with_p(lambda b: b.hide(torch.exp(b.s))),
    ),
    Slip(
        "unscaled-scores",
        "The scores were recomputed without scale. P then is not the P of the forward.",
        "Which scores went into the LSE?",
        {"s": lambda b: b.q @ b.k.mT},
    ),
    Slip(
        "scale-missing",
        "The last factor, scale, is missing: S = scale * Q K^T, and the chain rule passes it on to Q and to K.",
        "dS is the gradient of the scaled scores. What is the gradient of Q K^T?",
        dq=lambda b: b.ds @ b.k,
        dk=lambda b: b.over_group(b.ds.mT @ b.q),
    ),
    Slip(
        "scaled-twice",
        "scale was multiplied in twice on the way from dS to the gradient.",
        "Follow scale from dS to what is stored. How often is it multiplied in?",
        dq=lambda b: b.scale**2 * (b.ds @ b.k),
        dk=lambda b: b.over_group(b.scale**2 * (b.ds.mT @ b.q)),
    ),
    Slip(
        "log2e-in-the-gradient",
        "The gradient is too large by log2(e): a tile that had been prepared for exp2 was used as q or k.",
        "Is the tile in your last product the q (or k) that was given, or one with scale * log2(e) in it?",
        dq=lambda b: LOG2_E * right_dq(b),
        dk=lambda b: LOG2_E * right_dk(b),
    ),
    Slip(
        "dv-from-dp",
        "dV was made of dP. The output is P V, so dV = P^T dO.",
        "Which matrix multiplies V in the forward?",
        **only_dkdv(dv=lambda b: b.over_group(b.hide(b.dp).mT @ b.grad_out)),
    ),
    Slip(
        "dv-from-ds",
        "dV was made of dS. The output is P V, so dV = P^T dO.",
        "Which matrix multiplies V in the forward?",
        **only_dkdv(dv=lambda b: b.over_group(b.ds.mT @ b.grad_out)),
    ),
    Slip(
        "dk-from-p",
        "dK was made of P. The scores are Q K^T, so dK = scale * dS^T Q.",
        "Which gradient arrives at the scores?",
        **only_dkdv(dk=lambda b: b.over_group(b.scale * (b.p.mT @ b.q))),
    ),
    Slip(
        "dq-from-p",
        "dQ was made of P. The scores are Q K^T, so dQ = scale * dS K.",
        "Which gradient arrives at the scores?",
        **only_dq(lambda b: b.scale * (b.p @ b.k)),
    ),
    *(
        Slip(
            "tile-not-transposed",
            f"In {name} a tile of {name_of_tile} was used as it is, rows by keys, or reshaped. Each key gathers over the rows.",
            "Which axis does the product sum over, and which axis of your tile holds the rows? reshape moves no axis.",
            **only_dkdv(**{name: lambda b, wrong=wrong, by=by: b.over_group(by(b, wrong(b)))}),
        )
        for name, name_of_tile, wrong, by in (
            ("dv", "P", tiles_not_transposed, lambda b, p: p.mT @ b.grad_out),
            ("dv", "P", tiles_reshaped(lambda b: b.p), lambda b, p: p.mT @ b.grad_out),
            ("dk", "dS", tiles_reshaped(lambda b: b.ds), lambda b, ds: b.scale * (ds.mT @ b.q)),
        )
    ),
    Slip(
        "only-last-tile",
        "Only the last tile counts: what earlier tiles gave is overwritten.",
        "What does your sum hold after the second tile?",
        **only_dq(from_last_keys),
    ),
    *(
        Slip(
            "only-last-tile",
            "Only the last tile of rows counts: what earlier tiles gave is overwritten.",
            "What does your sum hold after the second tile?",
            **only_dkdv(
                dk=lambda b, head=head: from_last_rows(b, and_head=head)[0],
                dv=lambda b, head=head: from_last_rows(b, and_head=head)[1],
            ),
        )
        for head in (None, -1)
    ),
    *(
        Slip(
            "group-sum-missing",
            "Only one query head of a group has given to dK and dV. All that share the KV head must.",
            "How many query heads read this key in the forward? Each sends a gradient back.",
            **only_dkdv(
                dk=lambda b, head=head: from_one_head(b, head)[0], dv=lambda b, head=head: from_one_head(b, head)[1]
            ),
        )
        for head in (0, -1)
    ),
    Slip(
        "causal-ignored",
        "The causal mask is missing where P is recomputed: hidden keys get gradients.",
        "P of a hidden pair was 0 in the forward. Does exp(score - lse) know that?",
        with_seen(lambda b: b.all_pairs),
    ),
    Slip(
        "causal-top-left",
        "The mask is aligned at the first row and key, not at the last ones: with Sq != Sk another triangle.",
        "Which keys does the last row see? Which offset follows from that?",
        with_seen(lambda b: b.below_diagonal(0)),
    ),
    Slip(
        "causal-off-by-one",
        "The mask hides the diagonal too: a row does not see its own key.",
        "Is the last key that a row sees in or out?",
        with_seen(lambda b: b.below_diagonal(b.k.shape[2] - b.q.shape[2] - 1)),
    ),
    Slip(
        "causal-reversed",
        "The mask shows what it should hide: rows see the keys after them.",
        "In a tile with the keys first, which index is the row's?",
        with_seen(lambda b: ~b.below_diagonal(b.k.shape[2] - b.q.shape[2] - 1)),
    ),
    Slip(
        "visible-tiles-skipped",
        "Tiles were skipped that the mask shows: where to begin, or to end, was computed as if Sq were Sk.",
        "Row i sees the keys up to i + Sk - Sq. Which is the first row that sees key n?",
        with_seen(rows_skipped),
    ),
    Slip(
        "empty-row-nan",
        "A row that sees nothing gave NaN: its LSE is -inf, and -inf - -inf is NaN.",
        "What is P in a row without keys? Can it be had without subtracting its LSE?",
        with_p(lambda b: torch.exp(b.s.masked_fill(~b.seen, -torch.inf) - b.lse[..., None])),
    ),
    Slip(
        "masked-after-exp",
        "exp was taken of hidden scores and then multiplied by 0. A hidden score may be large: inf * 0 is NaN.",
        "Which operation picks 0 without looking at the other number?",
        with_p(lambda b: torch.exp(b.s - b.lse[..., None]) * b.seen),
    ),
    Slip(
        "tail-counted",
        "Keys beyond the last one got a P: their score is 0, and exp(0 - lse) overflows where lse is very negative.",
        "Which keys does the last tile hold that are not there? What should their P be?",
        **only_dq(with_padded_keys),
    ),
    *(
        Slip(
            "accumulated-in-half",
            "The sum over the tiles was kept in 16 bits. float16 ends at 65504, and partial sums may be larger than the whole.",
            "Which dtype does your sum have after the first tile?",
            dq=dq_in_half,
            dk=dk,
            dv=dv,
        )
        for dk, dv in ((dk_in_half, dv_in_half), (dk_in_half, right_dv), (right_dk, dv_in_half))
    ),
    Slip(
        "added-to-unwritten-memory",
        "Everything is NaN: the gradient's memory was read, or added to, before anything was written there.",
        "What does memory hold that torch.empty gave? Can one program sum in registers and write once?",
        dq=lambda b: torch.full_like(right_dq(b), torch.nan),
        dk=lambda b: torch.full_like(right_dk(b), torch.nan),
        dv=lambda b: torch.full_like(right_dv(b), torch.nan),
    ),
)
DQ_MISTAKES = tuple(filter(None, (slip.seen_in_dq() for slip in SLIPS)))
DKDV_MISTAKES = tuple(filter(None, (slip.seen_in_dkdv() for slip in SLIPS)))


DELTA_MISTAKES = (
    Misconception(
        "delta-without-out",
        "delta is the sum of dO alone. It weighs dO with what the row gave out: rowsum(dO * O).",
        "delta is the sum of P * dP over the keys, and dP = dO V^T. Pull the sum over the keys through.",
        lambda out, grad_out: grad_out.float().sum(-1),
    ),
    Misconception(
        "delta-averaged",
        "delta is a mean over the channels. It is their sum.",
        "Does the gradient of a sum over channels know how many there are?",
        lambda out, grad_out: (out.float() * grad_out.float()).mean(-1),
    ),
    Misconception(
        "delta-in-half",
        "delta was multiplied or summed in 16 bits. float16 ends at 65504.",
        "Which dtype do the tiles have that you multiply? And their product?",
        lambda out, grad_out: (out * grad_out).sum(-1).float(),
    ),
)

# -------------------------------------------------------------------------------------------------------------- targets


def exact_delta(out: Tensor, grad_out: Tensor) -> Tensor:
    return (out.double() * grad_out.double()).sum(-1)


@lru_cache(maxsize=2)  # three kernels are asked about one problem after the other
def exact_and_allowed(q, k, v, grad_out, causal, scale) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """dQ, dK and dV in float64, and how far from them an answer may be."""
    options = {"causal": causal, "scale": scale}
    gradients = reference.oracle_gradients(q, k, v, grad_out, **options)
    allowed = reference.check_gradients(gradients, q, k, v, grad_out, **options).budget
    return gradients, (allowed["dq"], allowed["dk"], allowed["dv"])


def exact(q, k, v, lse, delta, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return exact_and_allowed(q, k, v, grad_out, causal, scale)[0]


def budget(q, k, v, lse, delta, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return exact_and_allowed(q, k, v, grad_out, causal, scale)[1]


def from_forward(function: Callable) -> Callable:
    """The same function of `attention_backward`'s arguments: out in place of delta."""

    def of_out(q, k, v, out, lse, grad_out, *rest, **options):
        return function(q, k, v, lse, exact_delta(out, grad_out).float(), grad_out, *rest, **options)

    return of_out


def in_all_three(mistake: Misconception, *, in_dq: bool) -> Misconception:
    """A mistake in one kernel, as the whole backward shows it: the other kernel may do as it likes."""
    model = from_forward(mistake.model)
    if in_dq:
        return replace(mistake, model=lambda *args, **options: (model(*args, **options), None, None))
    return replace(mistake, model=lambda *args, **options: (None, *model(*args, **options)))


def in_delta(mistake: Misconception) -> Misconception:
    def model(q, k, v, out, lse, grad_out, *rest, **options):
        b = prepared(q, k, v, lse, mistake.model(out, grad_out), grad_out, *rest, **options)
        return right_dq(b), right_dk(b), None

    return replace(mistake, model=model)


row_delta = Target(
    "row_delta",
    exact_delta,
    budget_of(
        lambda out, grad_out: (out.float() * grad_out.float()).sum(-1),
        exact_delta,
        lambda out, grad_out: (out * grad_out).abs().sum(-1),
    ),
    outputs={"delta": torch.float32},
    misconceptions=DELTA_MISTAKES,
)
query_gradient = Target(
    "query_gradient",
    lambda *args, **options: exact(*args, **options)[0],
    lambda *args, **options: budget(*args, **options)[0],
    outputs={"dq": None},
    misconceptions=DQ_MISTAKES,
)
key_value_gradients = Target(
    "key_value_gradients",
    lambda *args, **options: exact(*args, **options)[1:],
    lambda *args, **options: budget(*args, **options)[1:],
    outputs={"dk": None, "dv": None},
    misconceptions=DKDV_MISTAKES,
)
attention_backward = Target(
    "attention_backward",
    from_forward(exact),
    from_forward(budget),
    outputs={"dq": None, "dk": None, "dv": None},
    misconceptions=(
        *(in_delta(mistake) for mistake in DELTA_MISTAKES),
        *(in_all_three(mistake, in_dq=True) for mistake in DQ_MISTAKES),
        *(in_all_three(mistake, in_dq=False) for mistake in DKDV_MISTAKES),
    ),
)

# ---------------------------------------------------------------------------------------------------------- properties


@dataclass(frozen=True)
class Problem:
    """Inputs of a backward, and what the forward saved: rounded as a forward rounds it."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    causal: bool = False
    scale: float | None = None

    @cached_property
    def saved(self) -> tuple[Tensor, Tensor]:
        out, lse = reference.oracle(self.q, self.k, self.v, causal=self.causal, scale=self.scale)
        return out.to(self.q.dtype), lse.float()

    def for_one_kernel(self, *blocks: int) -> tuple:
        out, lse = self.saved
        delta = exact_delta(out, self.grad_out).float()
        return (self.q, self.k, self.v, lse, delta, self.grad_out, self.causal, self.scale, *blocks)

    def for_all(self, *blocks: int) -> tuple:
        return (self.q, self.k, self.v, *self.saved, self.grad_out, self.causal, self.scale, *blocks)


NO_KERNEL = Misconception(
    "no-kernel",
    "No Triton kernel was launched; this exercise is to write three.",
    "The launchers at the end of the file are given. What do they call?",
)


def draw_problem(
    t: Trial, rows: int, keys: int, *, causal: bool = False, scale: float | None = None, **sizes: Any
) -> Problem:
    """q, k and v as `draw` gives them, and a grad_out like the output."""
    q, k, v = draw(t, rows, keys, **{"kv_heads": 1, "dim": 8, "v_dim": 20, **sizes})
    return Problem(q, k, v, t.randn(*q.shape[:3], v.shape[3], dtype=q.dtype), causal, scale)


def check_kernels(t: Trial, problem: Problem, *blocks: int) -> None:
    t.check(query_gradient, *problem.for_one_kernel(*blocks))
    t.check(key_value_gradients, *problem.for_one_kernel(*blocks))


@exercise.property(
    points=2,
    hints=[
        "Write the sum of P_ij * dP_ij over j, put dP_ij = sum over channels of dO * V in it, and exchange the two sums.",
        "One number for each row: a product of two tiles, element by element, summed over its channels.",
    ],
)
def delta_of_rows(t: Trial) -> None:
    """delta is the sum of P * dP over each row, in float32"""
    t.check(row_delta, t.randn(2, 1, 37, 20), t.randn(2, 1, 37, 20))
    large = t.uniform(100, 200, 1, 2, 5, 16, dtype=torch.float16), t.uniform(400, 500, 1, 2, 5, 16, dtype=torch.float16)
    t.check(row_delta, *large)


@exercise.property(
    points=3,
    hints=[
        "P = exp(scale * Q K^T - lse) needs no maximum and no sum: the LSE holds both. Then dP = dO V^T and dS = P * (dP - delta).",
        "dQ = scale * dS K: one product for each tile of keys, added up in float32, stored once behind the loop.",
    ],
)
def gradient_of_q(t: Trial) -> None:
    """dQ agrees with float64 where tiles divide the lengths"""
    t.check(query_gradient, *draw_problem(t, 32, 32, dim=16, v_dim=32, scale=0.4).for_one_kernel(16, 16))


@exercise.property(
    points=3,
    hints=[
        "The program owns keys, so the loop runs over tiles of rows: each brings its q, dO, lse and delta.",
        "dV = P^T dO and dK = scale * dS^T Q. Compute the tile with the keys first, K Q^T, and nothing need be transposed later.",
    ],
)
def gradients_of_k_and_v(t: Trial) -> None:
    """dK and dV agree with float64 where tiles divide the lengths"""
    t.check(key_value_gradients, *draw_problem(t, 32, 32, dim=16, v_dim=32, scale=0.4).for_one_kernel(16, 16))


@exercise.property(
    points=2,
    hints=[
        "How many of 21 rows does the last tile hold, if tiles have 16? How many of 37 keys does a tile of 64 hold?",
        "What lies beyond the lengths must give nothing: neither a weight nor a number that was never yours to load.",
    ],
)
def ragged_lengths(t: Trial) -> None:
    """rows and keys that do not fill their last tile count too, and nothing beyond them does"""
    check_kernels(t, draw_problem(t, 21, 37), 16, 64)


@exercise.property(
    points=3,
    hints=[
        "exp(score - lse) of a hidden pair is not 0. What makes it 0 in the forward must do so here.",
        "Row i sees the keys j <= i + Sk - Sq. The same comparison stands in both kernels, with rows and keys on other axes.",
    ],
)
def causal(t: Trial) -> None:
    """under a causal mask hidden pairs give nothing, also with more keys than rows"""
    check_kernels(t, draw_problem(t, 20, 45, causal=True), 16, 32)


@exercise.property(
    points=2,
    hints=[
        "With 29 rows and 16 keys, what do rows 0 to 12 see? Their LSE is -inf.",
        "Decide what P is by the mask alone, and let tl.where pick it: then no arithmetic with -inf is ever looked at.",
    ],
)
def rows_that_see_nothing(t: Trial) -> None:
    """a row that sees no key gets a gradient of 0 and gives none"""
    check_kernels(t, draw_problem(t, 29, 16, causal=True), 16, 16)


@exercise.property(
    points=2,
    hints=[
        "exp(89) is infinite in float32. Which pairs of your tiles can have such a score - lse, though no row sees them?",
        "Pairs that are hidden and keys that are not there: their score may be far above the row's LSE.",
    ],
)
def extreme_scores(t: Trial) -> None:
    """scores of -200, and hidden ones of +200, do no harm"""
    hidden = draw_problem(t, 16, 32, causal=True)
    q, k = with_scores_along(hidden.q, hidden.k, torch.tensor([0.0] * 24 + [200.0] * 8))
    q[:, :, 8:, -1] = 0.0  # rows 8 to 15, which see those last keys, have common scores
    check_kernels(t, replace(hidden, q=q, k=k), 16, 32)
    low = draw_problem(t, 16, 21)
    q, k = with_scores_along(low.q, low.k, ramp(21, -200, -195))
    q[:, :, ::2, -1] = 0.0  # every other row has common scores
    check_kernels(t, replace(low, q=q, k=k), 16, 32)


@exercise.property(
    points=2,
    hints=[
        "A KV head is read by group_size query heads. From how many of them does a gradient come back?",
        "Two loops: over the query heads of the group, and over the tiles of their rows. One sum for all.",
    ],
)
def grouped_heads(t: Trial) -> None:
    """dK and dV gather from all query heads that share a KV head"""
    check_kernels(t, draw_problem(t, 13, 12, heads=4, kv_heads=2), 16, 16)


@exercise.property(
    points=2,
    hints=[
        "Which of your tiles are float32, and which have the inputs' dtype? Print them.",
        "Round P and dS for the product, if you must; never the sum over the tiles.",
    ],
)
def half_precision(t: Trial) -> None:
    """float16 inputs: float16 gradients, summed in float32"""
    check_kernels(t, draw_problem(t, 20, 20, dtype=torch.float16, causal=True), 32, 32)
    large = sums_that_rise_and_fall(t)
    t.check(query_gradient, *large.for_one_kernel(64, 32))
    t.check(key_value_gradients, *large.for_one_kernel(32, 64))
    t.check(key_value_gradients, *values_that_rise_and_fall(t).for_one_kernel(32, 16))


def sums_that_rise_and_fall(t: Trial) -> Problem:
    """Partial sums of dQ and dK reach 240,000, and are taken back: the second half of the keys, and of the rows, is opposite."""
    problem = draw_problem(t, 64, 64, dim=4, v_dim=16, dtype=torch.float16)
    sign = ramp(64, -1, 1).sign()
    for x in (problem.q, problem.k):  # all scores are about equal, all weights about 1 / 64
        x *= 0.1
        x[..., 0] = 16.0
    problem.v[..., 0], problem.grad_out[..., 0] = 100.0 * sign, 300.0 * sign
    return problem


def values_that_rise_and_fall(t: Trial) -> Problem:
    """The same for dV: with a single key P is 1, and 32 rows of dO are 96,000."""
    problem = draw_problem(t, 64, 1, v_dim=16, dtype=torch.float16)
    problem.grad_out[...] += 3000 * ramp(64, -1, 1).sign()[:, None].half()
    return problem


@exercise.property(
    points=3,
    hints=[
        "delta first: the other two kernels read it.",
        "If each kernel passes by itself and this fails, look at what the launchers hand from one to the next.",
    ],
)
def all_together(t: Trial) -> None:
    """the three kernels together give the gradients of the forward, and change none of its tensors"""
    problem = draw_problem(t, 40, 32, batch=2, causal=True, scale=0.3)
    t.check_inputs_untouched(attention_backward, *problem.for_all(64, 32))


@exercise.property(
    points=2,
    hints=[
        "Is a tile as large as block_q by block_k, and not as the whole row?",
        "What is made in PyTorch, outside of the kernels, must not grow with Sq * Sk.",
    ],
)
def memory(t: Trial) -> None:
    """no tensor and no tile grows with Sq * Sk"""
    rows, keys, block_q, block_k, dim = 64, 260, 64, 128, 32
    problem = draw_problem(t, rows, keys, dim=dim, v_dim=dim)
    meter = t.check_tiled(attention_backward, *problem.for_all(block_q, block_k), largest=(rows + keys) * dim).meter
    largest_block = meter.get("largest_block")
    if not meter.get("launches"):
        t.fail_as(NO_KERNEL, got="no kernel was launched", expected="three launches")
    if not isinstance(largest_block, int) or largest_block > block_q * block_k:
        t.fail(
            "untiled",
            "A kernel loads a tile that is larger than its block: block_q rows, or block_k keys.",
            got=f"a tile of {largest_block} elements",
            expected=f"at most {block_q * block_k}",
            hint="Do you use block_q and block_k as they are given?",
        )


@exercise.property(
    points=1,
    hints=[
        "The interpreter runs any Python. A GPU's kernel has numbers, blocks, tl's functions and constexprs, and no more.",
        "What do the products of your tiles round to, if their inputs are float32?",
    ],
)
def compiles_for_gpus(t: Trial) -> None:
    """the kernels compile for GPUs, sm_80 and sm_90, and multiply float32 in float32"""
    problem = draw_problem(t, 21, 37, v_dim=16, causal=True, scale=0.3)
    t.check(attention_backward, *problem.for_all(16, 16))  # who fails anyway is told so at less expense
    expect_compiled(t, NO_KERNEL, "attention_backward", *problem.for_all(16, 16))
