"""Checks of ex05: rotary positions, grouped heads, and a cache with which decoding gives what the whole text gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

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
    HEADS_MODULO,
    KV_REPEATED,
)
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target, budget_of
from flashlib.course.grader.findings import Failure
from flashlib.course.grader.inputs import transposed_in_poison
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.trial import Remote, Trial, contrast, recognize

exercise = Exercise(
    name="ex05",
    file="ex05_heads_cache.py",
    title="Grouped heads, RoPE and cached decoding",
    chapter="05_heads_positions_cache",
    difficulty=3,
    importance=5,
    minutes=75,
    forbidden=SDPA,
)

# ---------------------------------------------------------------------------------------------------------------- rope


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """The pairs (i, i + D / 2) of x ``[..., S, D]``, turned by angles ``[S, D / 2]``, in the angles' dtype."""
    first, second = x.to(angles.dtype).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def angles_of(x: Tensor, positions: Tensor, base: float, dtype: torch.dtype = torch.float64) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=dtype) / half)
    return positions[:, None].to(dtype) * frequencies


def rope64(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    return turn(x, angles_of(x, positions, base))


def rope_naive(x: Tensor, positions: Tensor, base: float = 10000.0) -> list[Tensor]:
    """Ways to round that count as right: exact angles, angles of float32, and a table of cos and sin in x's dtype."""
    exact = angles_of(x, positions, base)
    # A float32 angle comes of a power, a division and a product: it may be off by a few roundings, up or down.
    off = 4 * torch.finfo(torch.float32).eps * (-1) ** torch.arange(exact.shape[-1])
    first, second = x.chunk(2, dim=-1)
    cos, sin = exact.cos().to(x.dtype), exact.sin().to(x.dtype)
    table = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return [turn(x, exact).to(x.dtype), turn(x, exact * (1 + off)).to(x.dtype), table]


def interleaved(x: Tensor) -> Tensor:
    """The channels 0, D/2, 1, D/2 + 1, ...: each pair side by side."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def side_by_side(x: Tensor) -> Tensor:
    """What `interleaved` undoes: even channels first, then the odd ones."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def _sign_missing(x, positions, base=10000.0):
    first, second = x.double().chunk(2, dim=-1)
    angles = angles_of(x, positions, base)
    return torch.cat(
        [first * angles.cos() + second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def _angles_in_half(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    frequencies = (base ** (-torch.arange(half, dtype=torch.float32) / half)).to(x.dtype)
    return turn(x, (positions[:, None].to(x.dtype) * frequencies).double())


def _position_in_half(x, positions, base=10000.0):
    return rope64(x, positions.to(x.dtype), base)


def _angles_rounded(x, positions, base=10000.0):
    return turn(x, angles_of(x, positions, base, torch.float32).to(x.dtype).double())


_IN_HALF = (
    "angles-in-half",
    "The angles were computed in the dtype of x. Near 3000 float16 has every second integer, bfloat16 every sixteenth, and a "
    "radian more or less is another direction.",
    "Which dtype do positions, frequencies and their product have in your code?",
)
ROPE_MISTAKES = (
    Misconception(
        "pairs-interleaved",
        "Channels 2i and 2i + 1 were paired, as in the paper. Here i and i + D / 2 make a pair, as in Llama.",
        "Which channel is the partner of channel 0?",
        lambda x, positions, base=10000.0: interleaved(rope64(side_by_side(x), positions, base)),
    ),
    Misconception(
        "pairs-mixed",
        "The pairs are (i, i + D / 2), but the angles lie in the order of pairs (2i, 2i + 1), each repeated beside itself.",
        "The two channels of a pair are turned by one angle. Which angle has channel 0 in your code, and which channel D / 2?",
        lambda x, positions, base=10000.0: _angles_beside_each_other(x, positions, base),
    ),
    Misconception(
        "turned-backwards",
        "The pairs are turned clockwise: the sign of the sine is the other way round.",
        "Where does (1, 0) go when it is turned by a? The docstring says it.",
        lambda x, positions, base=10000.0: rope64(x, -positions, base),
    ),
    Misconception(
        "sign-missing",
        "Both channels of a pair got the sine with the same sign. That is no rotation: lengths change.",
        "Write down the matrix of a rotation by a. Which of its four entries is negative?",
        _sign_missing,
    ),
    Misconception(
        "positions-ignored",
        "The tokens were numbered 0, 1, 2, ..., whatever positions said.",
        "Where do you use the argument positions?",
        lambda x, positions, base=10000.0: rope64(x, torch.arange(x.shape[2]), base),
    ),
    Misconception(
        "positions-off-by-one",
        "Every token was turned as if it stood one position further on.",
        "By which angle is the token at position 0 turned?",
        lambda x, positions, base=10000.0: rope64(x, positions + 1, base),
    ),
    Misconception(
        "exponent-halved",
        "The frequencies fall too slowly: the exponent is -2i / D, with i counting pairs.",
        "What is the frequency of the last pair, i = D / 2 - 1? It should be close to 1 / base.",
        lambda x, positions, base=10000.0: rope64(x, positions, math.sqrt(base)),
    ),
    Misconception(
        "exponent-doubled",
        "The frequencies fall too fast: the exponent is -2i / D, with i counting pairs.",
        "What is the frequency of the last pair, i = D / 2 - 1? It should be close to 1 / base.",
        lambda x, positions, base=10000.0: rope64(x, positions, base**2),
    ),
    Misconception(
        "base-ignored",
        "The base was taken to be 10000, whatever the caller gave.",
        "Llama 3 uses 500000, SmolLM2 100000. Where do you use the argument base?",
        lambda x, positions, base=10000.0: rope64(x, positions),
    ),
    Misconception(*_IN_HALF, _angles_in_half),
    Misconception(*_IN_HALF, _position_in_half),
    Misconception(*_IN_HALF, _angles_rounded),
)


def _angles_beside_each_other(x: Tensor, positions: Tensor, base: float) -> Tensor:
    angles = angles_of(x, positions, base).repeat_interleave(2, dim=-1)
    first, second = x.double().chunk(2, dim=-1)
    return x.double() * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


apply_rope = Target(
    "apply_rope", oracle=rope64, budget=budget_of(rope_naive, rope64), misconceptions=ROPE_MISTAKES, outputs={"x": None}
)


@exercise.property(
    points=2,
    hints=[
        "Take D = 2 first: one pair, and one angle that equals the position.",
        "Split x into halves along the last axis. Both halves are turned by the same D / 2 angles.",
        "cat([first * cos - second * sin, first * sin + second * cos]), cos and sin of shape [S, D / 2].",
    ],
)
def rope_turns_pairs(t: Trial) -> None:
    """apply_rope agrees with float64"""
    t.check(apply_rope, t.randn(2, 3, 7, 8), 5 + t.permutation(20)[:7])
    t.check(apply_rope, t.randn(1, 2, 5, 16, dtype=torch.float64), 3 + torch.arange(5))
    t.check(apply_rope, t.randn(1, 2, 1, 2), torch.tensor([t.integer(1, 3)]))


@exercise.property(
    points=1, hints=["The frequency of pair i is base ** (-2i / D). The default holds only if nothing is given."]
)
def rope_uses_its_base(t: Trial) -> None:
    """apply_rope uses the base it is given"""
    t.check(apply_rope, t.randn(1, 2, 6, 16), 40 + t.permutation(60)[:6], 500000.0)
    t.check(apply_rope, t.randn(1, 2, 6, 8), 10 + t.permutation(60)[:6], base=100.0)


@exercise.property(
    points=1,
    hints=["Print the angles for x in float16 and in float32.", "Compute angles in float32, whatever the dtype of x."],
)
def rope_in_half_precision(t: Trial) -> None:
    """apply_rope of float16 and bfloat16 keeps far positions apart"""
    positions = 2049 + 2 * t.permutation(500)[:40]
    for dtype in (torch.float16, torch.bfloat16):
        t.check(apply_rope, t.randn(1, 2, 40, 32, dtype=dtype), positions)


@exercise.property(points=1, hints=["x[...] = and names that end in _ write into the caller's memory."])
def rope_leaves_its_input_alone(t: Trial) -> None:
    """apply_rope does not change x or positions, and reads strided inputs right"""
    t.check_inputs_untouched(apply_rope, t.randn(2, 2, 5, 8), torch.arange(1, 6))
    t.check(apply_rope, transposed_in_poison(t.randn(2, 3, 5, 8)), torch.arange(2, 7))


# ------------------------------------------------------------------------------------------------------- grouped heads


class Sizes(NamedTuple):
    """Hq, Hkv, Sq and Sk of a call of `gqa_attention`."""

    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class GroupedMistake:
    """Grouped attention in float64 with one mistake.

    Attributes:
        kv_head: which KV head query head h looks at.
        position: where query i of head h stands; it sees the keys up to there.
        causal: False if the mask is forgotten.
    """

    kv_head: Callable[[Tensor, Sizes], Tensor] = lambda h, sizes: h // sizes.group
    position: Callable[[Tensor, Tensor, Sizes], Tensor] = lambda h, i, sizes: i + sizes.kv_len - sizes.q_len
    causal: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        sizes = Sizes(q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        head, i = torch.arange(sizes.q_heads), torch.arange(sizes.q_len)
        q, k, v = q.double(), k.double(), v.double()
        pairs = list(enumerate(self.kv_head(head, sizes).tolist()))
        scores = torch.stack([q[:, h] @ k[:, kv_h].mT for h, kv_h in pairs], dim=1) * q.shape[3] ** -0.5
        if causal and self.causal:
            position = self.position(head[:, None], i, sizes).expand(sizes.q_heads, sizes.q_len)
            scores = scores.masked_fill(torch.arange(sizes.kv_len) > position[..., None], -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        return torch.stack([weights[:, h] @ v[:, kv_h] for h, kv_h in pairs], dim=1)


def stacked_row(head: Tensor, i: Tensor, sizes: Sizes) -> Tensor:
    """Which row query i of that head is, when the heads of a group lie one after another."""
    return head % sizes.group * sizes.q_len + i


_STACKED = (
    "causal-by-stacked-row",
    "The rows of a group's heads were stacked, and the causal mask took the row's number in the stack for its position. Each "
    "head begins again at the same position.",
    "Row g * Sq + i is query i of head g of the group. At which position does it stand?",
)
GROUPED_MISTAKES = (
    replace(HEADS_MODULO, model=GroupedMistake(kv_head=lambda h, sizes: h % sizes.kv_heads)),
    Misconception(
        "first-kv-head-only",
        "All query heads looked at the first KV head.",
        "Which KV heads have no influence on your answer?",
        GroupedMistake(kv_head=lambda h, sizes: torch.zeros_like(h)),
    ),
    replace(CAUSAL_IGNORED, model=GroupedMistake(causal=False)),
    replace(CAUSAL_TOP_LEFT, model=GroupedMistake(position=lambda h, i, sizes: i)),
    replace(
        CAUSAL_MISSES_ITSELF, model=GroupedMistake(position=lambda h, i, sizes: i + sizes.kv_len - sizes.q_len - 1)
    ),
    replace(
        CAUSAL_SEES_THE_NEXT, model=GroupedMistake(position=lambda h, i, sizes: i + sizes.kv_len - sizes.q_len + 1)
    ),
    Misconception(
        *_STACKED,
        GroupedMistake(
            position=lambda h, i, sizes: stacked_row(h, i, sizes) + sizes.kv_len - sizes.group * sizes.q_len
        ),
    ),
    Misconception(
        *_STACKED,
        GroupedMistake(position=lambda h, i, sizes: stacked_row(h, i, sizes) + sizes.kv_len - sizes.q_len),
    ),
    Misconception(
        *_STACKED,
        GroupedMistake(
            position=lambda h, i, sizes: stacked_row(h, i, sizes) // sizes.group + sizes.kv_len - sizes.q_len
        ),
    ),
)


def as_dense(q, k, v, causal=False) -> Dense:
    shared = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    sizes = (k.shape[-2], q.shape[-2], q.shape[1], k.shape[1], q.shape[1] // k.shape[1])
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1 + k.shape[-2] - q.shape[-2])
    return Dense(q, *shared, q.shape[-1] ** -0.5, sizes=sizes, hidden=hidden if causal else None)


# The causal ones are among those of grouped heads.
FORMULA_MISTAKES = formula_mistakes(
    as_dense,
    lambda out, lse: out,
    leave=("scale-ignored", "newest-key-missed", "causal-sees-the-next", "accumulated-in-half"),
)
gqa_attention = Target(
    "gqa_attention",
    oracle=lambda q, k, v, causal=False: reference.oracle(q, k, v, causal=causal)[0],
    budget=lambda q, k, v, causal=False: reference.error_budget(q, k, v, causal=causal).out,
    misconceptions=(*GROUPED_MISTAKES, *FORMULA_MISTAKES),
)


def stacked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same problem without groups: the queries of a group as the rows of one head. Not for causal attention."""
    return q.reshape(*k.shape[:2], -1, q.shape[3]), k, v


# For a long cache: the oracle's own copies of K and V, one for each query head in float64, would take seconds.
gqa_over_long_cache = replace(
    gqa_attention,
    oracle=lambda q, k, v: reference.oracle(*stacked(q, k, v))[0].reshape(q.shape),
    budget=lambda q, k, v: reference.error_budget(*stacked(q, k, v)).out,
)


draw = partial(drawing.draw, batch=2, dim=8)


@exercise.property(
    points=2,
    hints=[
        "Query head h belongs to KV head h // G. Which query heads form group 0?",
        "Seen as [B, Hkv, G, Sq, D], q has its group on an axis of its own.",
    ],
)
def gqa_maps_heads(t: Trial) -> None:
    """gqa_attention agrees with float64 for one, some and as many KV heads as query heads"""
    t.check(gqa_attention, *draw(t, 5, 9, heads=6, kv_heads=2))
    t.check(gqa_attention, *draw(t, 4, 7, heads=6, kv_heads=3, dim=16))
    t.check(gqa_attention, *draw(t, 3, 8, heads=4, kv_heads=1))
    t.check(gqa_attention, *draw(t, 5, 5, heads=3, kv_heads=3))


@exercise.property(
    points=2,
    hints=[
        "Query i stands at position i + Sk - Sq, in every head.",
        "If the heads of a group are stacked into rows, the mask [Sq, Sk] is needed once for each of them.",
    ],
)
def gqa_is_causal(t: Trial) -> None:
    """gqa_attention with causal=True, for as many keys as queries and for more"""
    t.check(gqa_attention, *draw(t, 7, 7, heads=6, kv_heads=2), causal=True)
    t.check(gqa_attention, *draw(t, 4, 11, heads=6, kv_heads=2), causal=True)
    t.check(gqa_attention, *draw(t, 1, 6, heads=6, kv_heads=3), causal=True)


@exercise.property(
    points=3,
    hints=[
        "expand is free, but matmul has to copy an expanded operand before it can multiply.",
        "The query heads of a group all multiply the same matrix K: they can be rows of one matrix.",
        "q.reshape(B, Hkv, G * Sq, D) @ k.mT",
    ],
)
def gqa_does_not_repeat_keys_and_values(t: Trial) -> None:
    """gqa_attention holds K and V once, not once for each query head"""
    q, k, v = draw(t, 1, 4000, heads=32, kv_heads=2, batch=1, dim=64)
    try:
        few = q[:, :, :1], k[:, :, :9], v[:, :, :9]
        t.check_tiled(gqa_over_long_cache, q, k, v, largest=3 * k.numel() // 2, memory=16 * MIB, first=few)
    except Failure as failure:
        if failure.finding.diagnosis != "untiled":
            raise
        t.fail_as(KV_REPEATED, got=failure.finding.got, expected=failure.finding.expected)


@exercise.property(
    points=1, hints=["Do not rely on where the numbers lie in memory: view works on contiguous memory only."]
)
def gqa_leaves_its_inputs_alone(t: Trial) -> None:
    """gqa_attention does not change q, k or v, and reads strided inputs right"""
    t.check_inputs_untouched(gqa_attention, *draw(t, 3, 5, heads=4, kv_heads=2), causal=True)
    plain = draw(t, 3, 5, heads=4, kv_heads=2)
    strided = [transposed_in_poison(x) for x in plain]
    t.check(gqa_attention, *strided, causal=True, if_it_raises=ASSUMES_CONTIGUOUS, but_not_on=plain)


# --------------------------------------------------------------------------------------------------------------- cache

APPEND_OVERWRITES = Misconception(
    "append-overwrites",
    "An append wrote over what was there: the newest tokens lie where the oldest should be.",
    "At which index must the next token be written, when the cache holds 3?",
)
WHOLE_CAPACITY = Misconception(
    "whole-capacity",
    "keys or values gave the whole memory of the cache, with what nobody has written yet.",
    "How many of the reserved places are filled?",
)
NEWEST_FIRST = Misconception(
    "newest-first",
    "New tokens were put before the old ones.",
    "In which order do the keys lie when three tokens are appended one after another?",
)
KEYS_AND_VALUES_SWAPPED = Misconception(
    "keys-values-swapped", "keys gives the values, or values the keys.", "Follow one number from append to keys."
)
APPEND_COPIES = Misconception(
    "append-copies-cache",
    "To append one token, the whole cache was copied. Writing n tokens then costs n * n / 2 copies.",
    "torch.cat makes a new tensor each time. What would a write into memory that is there already cost?",
)
NOT_RESERVED = Misconception(
    "memory-not-reserved",
    "keys or values were put together from their pieces to be looked at, which decoding does for every token.",
    "Memory for `capacity` tokens is reserved once. What does a slice of it cost?",
)
NOT_COPIED = Misconception(
    "keeps-the-callers-memory",
    "The cache holds on to the tensors that it was given. They are the caller's, who has put other numbers there by now.",
    "Whose memory does a name point to, after self.k = k?",
)
CACHES_SHARE_MEMORY = Misconception(
    "caches-share-memory",
    "What was appended to one cache appeared in another of the same size: they have one memory.",
    "When is a default argument made, or an attribute of a class: once, or for each cache?",
)
SILENT_WHEN_FULL = Misconception(
    "silent-when-full",
    "More tokens were appended than there is room for, and no ValueError came. What was lost is lost silently.",
    "Compare length + n with the capacity before anything is written.",
)
OTHER_ERROR_WHEN_FULL = Misconception(
    "other-error-when-full",
    "A full cache raised something else than a ValueError. The caller cannot tell it from a bug.",
    "Do not wait until the write fails: compare, and raise.",
)
CHANGED_WHEN_FULL = Misconception(
    "changed-when-full",
    "The ValueError came, but the cache is not as it was before: a part of the tokens was taken in, or the length has grown.",
    "In which order do you check, write and count?",
)

FULL_TOO_EARLY = Misconception(
    "full-too-early",
    "The cache said that it was full with room left for exactly the tokens that were appended.",
    "With room for 8 and 5 held: may 3 more be appended?",
)


def expect_contents(t: Trial, cache: Remote, pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The cache must hold exactly these keys and values."""
    total = sum(k.shape[2] for k, _ in pieces)
    t.expect_equal(cache.get("length"), total, "length")
    for name, own, other in (("keys", 0, 1), ("values", 1, 0)):
        got = expect_length(t, cache, name, pieces)
        expected = torch.cat([piece[own] for piece in pieces], dim=2)
        if torch.equal(got, expected):
            continue
        if got.isnan().any():  # what is written over the arguments of a call, once it is over
            t.fail_as(NOT_COPIED, got=f"{name} that changed after append", expected="what was appended")
        newest = pieces[-1][own]
        if torch.equal(got, torch.cat([piece[other] for piece in pieces], dim=2)):
            t.fail_as(KEYS_AND_VALUES_SWAPPED, got=name)
        if torch.equal(got, torch.cat([piece[own] for piece in reversed(pieces)], dim=2)):
            t.fail_as(NEWEST_FIRST, got=name)
        if torch.equal(got[:, :, : newest.shape[2]], newest):
            t.fail_as(APPEND_OVERWRITES, got=f"the newest of the {name} at index 0")
        came, wanted = contrast(name, got, expected.double(), 0.0)
        t.fail("wrong-values", f"{name} does not hold what was appended.", got=came, expected=wanted)


def expect_length(t: Trial, cache: Remote, name: str, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`keys` or `values`, if it has room for exactly these pieces. Answers it."""
    got = cache.get(name)
    batch, heads, newest, dim = pieces[-1][0].shape
    total = sum(k.shape[2] for k, _ in pieces)
    if isinstance(got, Tensor) and got.ndim == 4 and got.shape[2] != total:
        if got.shape[2] == newest:
            t.fail_as(APPEND_OVERWRITES, got=f"{name} of length {newest}", expected=f"length {total}")
        if got.shape[2] > total:
            t.fail_as(WHOLE_CAPACITY, got=f"{name} of length {got.shape[2]}", expected=f"length {total}")
    return t.expect_tensor(got, name, (batch, heads, total, dim), torch.float32)


def draw_pieces(t: Trial, *counts: int, heads: int = 2, dim: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[2, heads, count, dim]``, for each count."""
    return [(t.randn(2, heads, n, dim), t.randn(2, heads, n, dim)) for n in counts]


@exercise.property(
    points=2,
    hints=[
        "The cache has memory for `capacity` tokens and a count of those it holds.",
        "Write at [:, :, length : length + n], then add n to the length; read [:, :, :length].",
    ],
)
def cache_keeps_what_is_appended(t: Trial) -> None:
    """KVCache gives back what was appended, in order, and nothing else"""
    cache = t.make("KVCache", 2, 2, 16, 4)
    t.expect_equal(cache.get("length"), 0, "The length of a new cache")
    pieces = draw_pieces(t, 3, 1, 1, t.integer(2, 4))
    for count, (k, v) in enumerate(pieces, start=1):
        cache.call("append", k, v)
        expect_contents(t, cache, pieces[:count])
    other, others = t.make("KVCache", 2, 2, 16, 4), draw_pieces(t, 2, 3)
    for k, v in others:
        other.call("append", k, v)
    try:
        expect_contents(t, other, others)
        expect_contents(t, cache, pieces)
    except Failure as failure:
        t.fail_as(CACHES_SHARE_MEMORY, got=failure.finding.got, expected="two caches that know nothing of each other")


@exercise.property(
    points=2,
    hints=[
        "Check before you write, and before you count.",
        "if length + n > capacity: raise ValueError(...), as the first thing append does.",
    ],
)
def cache_says_when_it_is_full(t: Trial) -> None:
    """KVCache raises ValueError when there is no room, and is then as it was"""
    capacity = t.integer(6, 9)
    cache = t.make("KVCache", 2, 2, capacity, 4)
    first, rest, too_many, one = draw_pieces(t, 4, capacity - 4, capacity - 1, 1)
    cache.call("append", *first)
    expect_contents(t, cache, [first])
    expect_full(t, cache, too_many, [first])
    try:
        cache.call("append", *rest)
    except Failure as failure:
        t.fail_as(FULL_TOO_EARLY, got=failure.finding.says, expected=f"room for all {capacity} tokens")
    expect_contents(t, cache, [first, rest])
    expect_full(t, cache, one, [first, rest])


def expect_full(t: Trial, cache: Remote, more: tuple[Tensor, Tensor], held: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Appending `more` must raise ValueError, and leave the cache with what it held."""
    try:
        cache.call("append", *more)
    except Failure as failure:
        if failure.finding.diagnosis != "exception":
            raise
        if "It raised ValueError" not in failure.finding.says:
            t.fail_as(OTHER_ERROR_WHEN_FULL, got=failure.finding.says, expected="ValueError")
    else:
        t.fail_as(SILENT_WHEN_FULL, got="no error", expected="ValueError")
    try:
        expect_contents(t, cache, held)
    except Failure as failure:
        t.fail_as(CHANGED_WHEN_FULL, got=failure.finding.got, expected="what the cache held before")


@exercise.property(
    points=1,
    hints=["Which operation of append touches the tokens that are there already?", "Reserve the memory in __init__."],
)
def cache_appends_without_copying(t: Trial) -> None:
    """KVCache: appending one token does not touch the others"""
    cache = t.make("KVCache", 1, 2, 4096, 16)
    long, short = t.randn(1, 2, 3000, 16), t.randn(1, 2, 1, 16)
    cache.call("append", long, long)
    meter = t.ask("append", (short, short), on=cache.handle, meter={}).meter
    made = meter["largest_elements"]
    if made >= long.numel() // 2:
        t.fail_as(
            APPEND_COPIES, got=f"a tensor of {made} elements", expected=f"no more than the {short.numel()} of a token"
        )
    for name in ("keys", "values"):
        meter = t.ask(name, on=cache.handle, meter={}).meter
        if meter["largest_elements"] >= long.numel() // 2 and meter["largest_op"] != "aten.clone":
            got = f"a tensor of {meter['largest_elements']} elements, made by {meter['largest_op']}"
            t.fail_as(NOT_RESERVED, got=got, expected=f"a part of the memory that is there, as {name}")
    moved = sum(t.ask("append", (short, short), on=cache.handle, meter={}).meter["bytes_written"].values())
    if moved > long.nbytes // 2:
        t.fail_as(APPEND_COPIES, got=f"{moved:,} bytes written", expected=f"{2 * short.nbytes:,} for one token")


# ------------------------------------------------------------------------------------------------------------ decoding


def spans(pieces: Sequence[int]) -> list[slice]:
    ends = torch.tensor(pieces).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, pieces, strict=True)]


def exact_decoding(q: Tensor, k: Tensor, v: Tensor, base: float, pieces: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What decoding piece by piece gives, and the keys in the cache afterwards: the whole text at once."""
    positions = torch.arange(q.shape[2])
    keys = rope64(k, positions, base)
    return reference.oracle(rope64(q, positions, base), keys, v.double(), causal=True)[0], keys


def decoding_budget(q: Tensor, k: Tensor, v: Tensor, base: float, pieces: Sequence[int]) -> tuple[float, float]:
    """Attention's budget on turned queries and keys, and what the rounding of the turning adds to it."""
    positions = torch.arange(q.shape[2])
    turned = zip(rope_naive(q, positions, base), rope_naive(k, positions, base), strict=True)
    attention = max(reference.error_budget(q_turned, k_turned, v, causal=True).out for q_turned, k_turned in turned)
    exact = exact_decoding(q, k, v, base, pieces)[0]
    turned = zip(rope_naive(q, positions, base), rope_naive(k, positions, base), strict=True)
    turning = max(
        reference.largest_error(reference.oracle(q_turned, k_turned, v, causal=True)[0], exact)
        for q_turned, k_turned in turned
    )
    return attention + 2 * turning, apply_rope.budget(k, positions, base)[0]


@dataclass(frozen=True)
class DecodingMistake:
    """Decoding piece by piece in float64, with one mistake.

    Attributes:
        rope, attend: `apply_rope` and `gqa_attention` as this solution has them.
        first_position: where a piece begins, from the number of tokens in the cache and in the piece.
        turns_queries, turns_keys, turns_values: what is turned.
        turns_again: whether the keys from the cache are turned once more before they are used.
        sees_itself: whether the new tokens are in the cache when attention looks at it.
        causal: what is passed on to `attend`.
    """

    rope: Callable[..., Tensor] = rope64
    attend: Callable[..., Tensor] = GroupedMistake()
    first_position: Callable[[int, int], int] = lambda held, count: held
    turns_queries: bool = True
    turns_keys: bool = True
    turns_values: bool = False
    turns_again: bool = False
    sees_itself: bool = True
    causal: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, base: float, pieces: Sequence[int]) -> tuple[Tensor, Tensor]:
        q, k, v = q.double(), k.double(), v.double()
        keys, values, outs = k[:, :, :0], v[:, :, :0], []
        for span in spans(pieces):
            count = span.stop - span.start
            positions = self.first_position(span.start, count) + torch.arange(count)
            queries, new_keys, new_values = (
                self.rope(x[:, :, span], positions, base).double() if turned else x[:, :, span]
                for x, turned in ((q, self.turns_queries), (k, self.turns_keys), (v, self.turns_values))
            )
            before = keys, values
            keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
            seen_keys, seen_values = (keys, values) if self.sees_itself else before
            if self.turns_again:
                seen_keys = self.rope(seen_keys, torch.arange(seen_keys.shape[2]), base)
            outs.append(self.attend(queries, seen_keys, seen_values, self.causal))
        return torch.cat(outs, 2), keys


def _seen_through_decoding(mistake: Misconception, part: str) -> Misconception:
    """A mistake in `apply_rope` or `gqa_attention`, as it comes out of `decode`."""
    says = f"{mistake.says} (In the function that your decode uses.)"
    return replace(mistake, says=says, model=DecodingMistake(**{part: mistake.model}))


_POSITIONS = "The queries and keys of a piece stand at length, length + 1, ... of the cache *before* it."
DECODING_MISTAKES = (
    Misconception(
        "positions-restart",
        f"Every piece was turned as if it stood at the beginning of the text. {_POSITIONS}",
        "At which position does the first token of the second piece stand?",
        DecodingMistake(first_position=lambda held, count: 0),
    ),
    Misconception(
        "positions-after-append",
        f"The positions were counted from the length after the append. {_POSITIONS}",
        "When do you ask the cache for its length?",
        DecodingMistake(first_position=lambda held, count: held + count),
    ),
    Misconception(
        "keys-not-turned",
        "The keys were not turned by their positions.",
        "The score of a query and a key should depend on how far apart they are. Which of the two knows its position?",
        DecodingMistake(turns_keys=False),
    ),
    Misconception(
        "queries-not-turned",
        "The queries were not turned by their positions.",
        "The score of a query and a key should depend on how far apart they are. Which of the two knows its position?",
        DecodingMistake(turns_queries=False),
    ),
    Misconception(
        "values-turned",
        "The values were turned too. Positions enter through the scores alone.",
        "Which of q, k and v meet in a score?",
        DecodingMistake(turns_values=True),
    ),
    Misconception(
        "keys-turned-again",
        "Keys from the cache were turned again: they are turned already, when they are appended.",
        "How often is the key of the first token turned, until the tenth has been written?",
        DecodingMistake(turns_again=True),
    ),
    Misconception(
        "blind-to-itself",
        "The new tokens did not see themselves: attention looked at the cache before they were appended.",
        "In which order do you append and attend?",
        DecodingMistake(sees_itself=False),
    ),
    Misconception(
        "causal-ignored",
        "A token of a prompt saw those behind it in the same piece.",
        "A piece of several tokens holds a future. Who may see it?",
        DecodingMistake(causal=False),
    ),
    *(_seen_through_decoding(mistake, "rope") for mistake in ROPE_MISTAKES),
    *(_seen_through_decoding(mistake, "attend") for mistake in (*GROUPED_MISTAKES, *FORMULA_MISTAKES)),
)


def check_decoding(t: Trial, q: Tensor, k: Tensor, v: Tensor, base: float, pieces: Sequence[int]) -> None:
    """Decode the text in these pieces with one cache; judge first what the cache holds at the end, then the outputs."""
    batch, heads, length, dim = k.shape
    cache = t.make("KVCache", batch, heads, length + 5, dim)
    outs = []
    for span in spans(pieces):
        inputs = [x[:, :, span].contiguous() for x in (q, k, v)]
        reply = t.ask("decode", (*inputs, cache.handle, base))
        outs.append(t.expect_tensor(reply.value, "out", inputs[0].shape, torch.float32))
        if reply.changed:
            t.fail(
                "mutated-input",
                f"decode changed what it was given ({', '.join(reply.changed)}).",
                hint="Look for in-place operations on q, k or v.",
            )
    parts = [(k[:, :, span], v[:, :, span]) for span in spans(pieces)]
    keys, values = (expect_length(t, cache, name, parts) for name in ("keys", "values"))
    outputs_of = t.results_on(q, k, v, base, pieces)
    exact, budgets = outputs_of(exact_decoding), outputs_of(decoding_budget)
    answers = (torch.cat(outs, 2), keys)
    if torch.equal(values, v) and all(
        reference.largest_error(*pair) <= budget for *pair, budget in zip(answers, exact, budgets, strict=True)
    ):
        return
    if torch.equal(keys, v):
        t.fail_as(KEYS_AND_VALUES_SWAPPED, got="the values as keys")
    if not torch.equal(values, v) and torch.equal(values[:, :, : pieces[-1]], parts[-1][1]):
        t.fail_as(APPEND_OVERWRITES, got="the newest of the values at index 0")
    name, answer, truth, budget = (
        ("out", answers[0], exact[0], budgets[0])
        if reference.largest_error(answers[0], exact[0]) > budgets[0]
        else ("cache.keys", answers[1], exact[1], budgets[1])
    )
    got, expected = contrast(name, answer, truth, budget)
    mistake = recognize(DECODING_MISTAKES, answers, exact, budgets, outputs_of)
    if mistake is not None:
        t.fail_as(mistake, got=got, expected=expected)
    t.fail(
        "wrong-values", f"After decoding in pieces of {list(pieces)}, {name} is not right.", got=got, expected=expected
    )


@exercise.property(
    points=3,
    hints=[
        "Where do the new tokens stand? Behind those that the cache holds.",
        "Turn the new keys, append them, and attend with causal=True to all that the cache now holds.",
    ],
)
def decoding_token_by_token(t: Trial) -> None:
    """decode: a prompt, then one token at a time, gives what the whole text gives"""
    check_decoding(t, *draw(t, 11, 11, heads=6, kv_heads=2), 10000.0, (6, 1, 1, 1, 1, 1))
    check_decoding(t, *draw(t, 5, 5, heads=4, kv_heads=4), 500.0, (1, 1, 1, 1, 1))


@exercise.property(
    points=3,
    hints=[
        "The queries of a piece are the last of the positions so far: the causal mask is aligned bottom-right.",
        "Within a piece a token must not see the tokens behind it.",
    ],
)
def decoding_in_chunks(t: Trial) -> None:
    """decode: however a prompt is cut, each token gets what it would get in the whole text"""
    q, k, v = draw(t, 16, 16, heads=6, kv_heads=2)
    for pieces in ((16,), (5, 4, 7), (t.integer(2, 4), 1, 6, 3)):
        length = sum(pieces)
        check_decoding(t, q[:, :, :length], k[:, :, :length], v[:, :, :length], 1000.0, pieces)
