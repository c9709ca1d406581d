"""Checks of ex10: combining partial results, cutting a cache into splits, and decoding over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises.drawing import draw
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.mistakes import ASSUMES_CONTIGUOUS, HEADS_MODULO, KV_REPEATED
from flashlib.course.exercises.online_softmax import attention64
from flashlib.course.exercises.pieces import (
    FOLD_MISTAKES,
    NO_PIECES,
    combine64,
    fold_budget,
    from_largest,
    merged_budget,
    weighted,
    with_pivot,
)
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.findings import Failure
from flashlib.course.grader.inputs import ramp, transposed_in_poison, with_poisoned_tail, with_scores_along
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.trial import Trial
from flashlib.masks import KeyLengths

exercise = Exercise(
    name="ex10",
    file="ex10_split_kv.py",
    title="Merging, and split-KV decoding",
    chapter="12_split_kv_decoding",
    difficulty=3,
    importance=5,
    minutes=75,
    forbidden=SDPA,
)

# ------------------------------------------------------------------------------------------------------------- combine


def lse_never_updated(keep: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """A running result whose out is merged with each piece, while its lse stays that of one piece: `keep`, 0 or -1."""

    def model(outs, lses):
        out, lse = outs[0], lses[0]
        for piece, piece_lse in zip(outs[1:], lses[1:], strict=True):
            out = combine64(torch.stack([out, piece]), torch.stack([lse, piece_lse]))[0]
            lse = (lse, piece_lse)[keep]
        return out, lse

    return model


COMBINE_MISTAKES = (
    *(
        Misconception(
            "running-lse-forgotten",
            "The running out is that of all pieces so far, but its lse is still that of one piece: it weighs too little in the "
            "next step.",
            "After two pieces are merged, which lse belongs to the result?",
            lse_never_updated(keep),
        )
        for keep in (0, -1)
    ),
    Misconception(
        "weights-over-rows",
        "The weights were normalized over the rows, not over the pieces.",
        "For one row, over which axis must the weights sum to 1?",
        weighted(lambda lses: lses.softmax(-1), normalized=False),
    ),
    *FOLD_MISTAKES,
)
_OVERFLOW_IS_NAN = (
    "overflow-is-nan",
    "One piece had an lse of +inf, and the answer is NaN: inf - inf is NaN, and so is inf / inf. That piece outweighs all the "
    "others, so its out is the answer.",
    "Where two numbers are equal, their difference is 0. Even for these?",
)
OVERFLOW_IS_NAN = Misconception(*_OVERFLOW_IS_NAN, with_pivot(lambda lses: lses.amax(0)))
OVERFLOW_DECIDED = Misconception(
    "overflow-decided",
    "Two pieces had an lse of +inf, and you answered with a number. One may outweigh the other a thousandfold, or the other way "
    "round: nobody can know. NaN says so.",
    "What is inf / inf?",
)
combine = Target(
    "combine",
    oracle=combine64,
    budget=fold_budget,
    outputs={"out": torch.float32, "lse": torch.float32},
    misconceptions=COMBINE_MISTAKES,
)
combine_of_nothing = replace(combine, misconceptions=())  # there the models have nothing to work on

overflowed = replace(
    combine,
    # A number that outweighs all others, and is no infinity, which no budget can be made of. exp(-1000) is 0 even in float64.
    budget=lambda outs, lses: fold_budget(outs, lses.masked_fill(lses == torch.inf, 1000.0)),
    misconceptions=(
        OVERFLOW_IS_NAN,
        Misconception(*_OVERFLOW_IS_NAN, with_pivot(lambda lses: torch.zeros_like(lses[0]))),
        *COMBINE_MISTAKES,
    ),
)


def pieces(t: Trial, count: int, *shape: int) -> tuple[Tensor, Tensor]:
    """`count` pieces of attention over keys that nobody sees: outs [count, *shape, 3] and lses [count, *shape]."""
    return t.randn(count, *shape, 3), t.randn(count, *shape)


@exercise.property(
    points=2,
    hints=[
        "The out of a piece is a sum of exp(s) * v, divided by exp(lse). What was that sum?",
        "The weight of a piece is exp(lse of the piece - lse of the whole), and the weights of a row sum to 1.",
    ],
)
def combine_gives_the_whole(t: Trial) -> None:
    """combine of the pieces of a row gives the row, however unequal the pieces are"""
    scores, v = t.randn(5, 60), t.randn(60, 3)
    cut = [attention64(*both) for both in zip(scores.split((3, 40, 1, 16), 1), v.split((3, 40, 1, 16)), strict=True)]
    t.check(combine, *(torch.stack(part).float() for part in zip(*cut, strict=True)))
    t.check(combine, *pieces(t, 7, 2, 4))
    t.check(combine, *pieces(t, 1, 4))


@exercise.property(
    points=2,
    hints=[
        "What combine returns is a piece like any other. Is its lse that of all its keys?",
        "lse = log(sum of exp(lse of the pieces)), with the largest taken out of the exponents.",
    ],
)
def combine_in_any_order_and_grouping(t: Trial) -> None:
    """combine is commutative and associative: pieces in another order, and pieces that were combined before"""
    outs, lses = pieces(t, 6, 5)
    order = t.permutation(6)
    t.check(combine, outs[order], lses[order])
    halves = [t.check(combine, outs[half], lses[half]) for half in (order[:2], order[2:])]
    t.check(combine, *(torch.stack(part) for part in zip(*halves, strict=True)))


@exercise.property(
    points=2,
    hints=[
        "No exponent may be above 0, and not all of them far below it.",
        "Subtract the largest lse of each row, and add it to the new lse again.",
    ],
)
def combine_of_pieces_far_apart(t: Trial) -> None:
    """combine survives lse of any size, and rows and pieces far apart"""
    outs, lses = pieces(t, 5, 6)
    t.check(combine, outs, lses + 200)
    t.check(combine, outs, lses - 9e3)
    t.check(combine, outs, lses + 150.0 * t.permutation(5)[:, None])
    t.check(combine, outs, lses + 400.0 * t.permutation(6))


@exercise.property(
    points=2,
    hints=[
        "Where lse is -inf there was no key. Do not even read that out.",
        "Do a row by hand in which every lse is -inf: which step meets -inf - -inf, or 0 / 0?",
        "outs.shape[1:] and lses.shape[1:] tell the shape of the answer, even for P = 0.",
    ],
)
def combine_of_empty_pieces(t: Trial) -> None:
    """combine passes over pieces without keys; if no piece has any, or there is no piece, it gives 0 and -inf"""
    outs, lses = pieces(t, 5, 6)
    empty = t.uniform(0, 1, 5, 6) < 0.4
    empty[t.integer(0, 4)] = empty[:, t.permutation(6)[:2]] = False
    lses = lses.masked_fill(empty, -torch.inf)
    t.check(combine, outs.masked_fill((lses == -torch.inf)[..., None], torch.nan), lses)
    lses[:, t.integer(0, 5)] = -torch.inf
    t.check(combine, outs, lses)
    nothing = torch.zeros(0, 4, 3), torch.zeros(0, 4)
    t.check(
        combine_of_nothing,
        *nothing,
        if_it_raises=NO_PIECES,
        but_not_on=(torch.zeros(1, 4, 3), torch.zeros(1, 4)),
    )


@exercise.property(
    points=2,
    hints=[
        "Follow a row with lse +inf and 0 through your code. Which is the first NaN?",
        "The weight of a piece whose lse is the largest is 1, whatever that lse is. Count the +inf of each row.",
    ],
)
def combine_of_overflowed_pieces(t: Trial) -> None:
    """combine: a piece with lse +inf outweighs the others; where two have it, nobody knows, and the answer is NaN"""
    outs, lses = pieces(t, 4, 6)
    lses[t.integer(0, 3), ::2] = torch.inf
    lses[t.integer(0, 3), 1] = -torch.inf
    t.check(overflowed, outs, lses)
    two_of = 2 * t.integer(0, 2)
    lses[t.permutation(4)[:2], two_of] = torch.inf
    answers = t.expect_tuple(t.call("combine", outs, lses), "out", "lse")
    out = t.expect_tensor(answers[0], "out", outs.shape[1:])
    lse = t.expect_tensor(answers[1], "lse", lses.shape[1:])
    if not out[two_of].isnan().all():
        t.fail_as(OVERFLOW_DECIDED, got=f"out = {out[two_of].tolist()}", expected="NaN in that row")
    if lse[two_of] != torch.inf:
        t.fail_as(OVERFLOW_IS_NAN, got=f"lse = {float(lse[two_of])}", expected="+inf")


@exercise.property(
    points=1, hints=["x = x * y makes a new tensor. x *= y, x.mul_(y) and x[i] = y change the one that x names."]
)
def combine_leaves_its_arguments_alone(t: Trial) -> None:
    """combine does not change the pieces"""
    outs, lses = pieces(t, 3, 5)
    lses[1, 2] = -torch.inf
    t.check_inputs_untouched(combine, outs, lses)


# -------------------------------------------------------------------------------------------------------- split_ranges

WRONG_COUNT = Misconception(
    "wrong-number-of-ranges",
    "There must be one range for each split, even if it has no keys: a kernel launches a fixed number of programs, and each "
    "must find out what is its own.",
    "What are start and stop of a range without keys?",
)
TAIL_DROPPED = Misconception(
    "tail-dropped",
    "The last keys belong to no range. They are the newest tokens.",
    "For 10 keys in 3 splits, what is 10 // 3 * 3?",
)
BEYOND_THE_LENGTH = Misconception(
    "beyond-the-length",
    "A range ends behind the last key. There lies what somebody else has left.",
    "The last block may not be full. Where does it end?",
)
STOP_INCLUDED = Misconception(
    "stop-included",
    "You gave the last key of each range. stop is the one behind it, as in a slice.",
    "k[start:stop] of a range with one key: by how much do start and stop differ?",
)
GAP_OR_OVERLAP = Misconception(
    "gap-or-overlap",
    "Each range must begin where the one before it ends: a key in two ranges counts twice, a key in none not at all.",
    "Print the ranges one below the other.",
)
NOT_WHOLE_BLOCKS = Misconception(
    "not-whole-blocks",
    "A range begins in the middle of a block. A program reads whole blocks, so two programs would read this one.",
    "Count in blocks first, and multiply by the size of a block in the end.",
)
UNEVEN = Misconception(
    "uneven-ranges",
    "One range is longer than it must be. All run at once, and everyone waits for the longest.",
    "Cut 7 blocks into 4 ranges. How long is your longest? It can be 2.",
)


def check_ranges(t: Trial, length: int, num_splits: int, block: int) -> None:
    """The student's ranges are one of the right answers: there may be several."""
    answer = t.call("split_ranges", length, num_splits, block)
    ranges = [tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in _as_list(answer)]
    if not ranges or not all(len(pair) == 2 and all(type(end) is int for end in pair) for pair in ranges):
        t.fail("wrong-type", "The answer should be a list of pairs (start, stop) of integers.", got=str(answer)[:80])
    longest = math.ceil(math.ceil(length / block) / num_splits) * block
    starts, stops = zip(*ranges, strict=True)
    problems = (
        (len(ranges) != num_splits, WRONG_COUNT, f"{num_splits} ranges"),
        (_stops_included(starts, stops, length), STOP_INCLUDED, "each to begin where the last one ends"),
        (max(stops) < length, TAIL_DROPPED, f"a last range that ends at {length}"),
        (max(stops) > length, BEYOND_THE_LENGTH, f"a last range that ends at {length}"),
        (
            starts != (0, *stops[:-1]) or any(a > b for a, b in ranges),
            GAP_OR_OVERLAP,
            "each to begin where the last one ends",
        ),
        (any(x % block and x != length for x in starts + stops), NOT_WHOLE_BLOCKS, f"multiples of {block}"),
        (any(b - a > longest for a, b in ranges), UNEVEN, f"none of more than {longest} keys"),
    )
    for wrong, mistake, expected in problems:
        if wrong:
            t.fail_as(mistake, got=str(ranges)[:120], expected=expected)


def _stops_included(starts: tuple[int, ...], stops: tuple[int, ...], length: int) -> bool:
    return max(stops) == length - 1 and starts[1:] == tuple(stop + 1 for stop in stops[:-1])


def _as_list(value: object) -> list:
    return list(value) if isinstance(value, (tuple, list)) else []


@exercise.property(
    points=2,
    hints=[
        "How many blocks are there? The last one may not be full.",
        "Range s gets the blocks from s * blocks // num_splits on. Or: each gets ceil(blocks / num_splits), while there are any.",
    ],
)
def ranges_cover_every_key_once(t: Trial) -> None:
    """split_ranges covers all keys in whole blocks, and no range takes longer than it must"""
    for length, num_splits, block in ((24, 4, 1), (7, 4, 1), (64, 4, 4), (100, 3, 8), (70, 4, 10), (1000, 7, 16)):
        check_ranges(t, length, num_splits, block)
    for _ in range(10):
        block = t.integer(1, 20)
        check_ranges(t, t.integer(20 * block, 900), t.integer(1, 19), block)


@exercise.property(
    points=1,
    hints=[
        "A range that begins at `length` ends there, too.",
        "min(..., length) keeps both ends of a range in bounds.",
    ],
)
def ranges_of_few_keys(t: Trial) -> None:
    """split_ranges gives empty ranges where there are fewer blocks than splits, down to no key at all"""
    for length, num_splits, block in ((3, 5, 1), (0, 3, 4), (5, 1, 8), (1, 4, 16), (33, 132, 16)):
        check_ranges(t, length, num_splits, block)


# --------------------------------------------------------------------------------------------------- choose_num_splits

Launch = tuple[int, int, int, int]  # length, block, programs, sm_count


def soonest(
    waves_of: Callable[[float], float] = math.ceil,
    blocks_of: Callable[[float], float] = math.ceil,
    *,
    overhead: int = 1,
    last: bool = False,
) -> Callable[[Launch], int]:
    """What `choose_num_splits` should answer, and what it answers with another rounding or the last of equals."""

    def choose(launch: Launch) -> int:
        length, block, programs, sm_count = launch
        blocks = math.ceil(length / block)
        counts = list(range(1, max(1, blocks) + 1))

        def time(num_splits: int) -> float:
            return waves_of(programs * num_splits / sm_count) * (blocks_of(blocks / num_splits) + overhead)

        return min(reversed(counts) if last else counts, key=time)

    return choose


def for_all(choose: Callable[[Launch], int]) -> Callable[..., list[int]]:
    """A model of one launch, for a list of them. It is held to the possible: 1 to the number of blocks."""
    return lambda *launches: [
        min(max(1, choose(launch)), max(1, math.ceil(launch[0] / launch[1]))) for launch in launches
    ]


_FILLS = (
    "only-fills-the-gpu",
    "You filled the GPU once, and looked no further. Two waves of short programs may be done sooner than one wave of long ones, "
    "and one program more than there is room for costs a whole wave.",
    "With 132 processors and 100 programs of 12 blocks: how long do 1, 2 and 4 splits take?",
)
CHOICE_MISTAKES = (
    Misconception(*_FILLS, for_all(lambda launch: launch[3] // launch[2])),
    Misconception(*_FILLS, for_all(lambda launch: math.ceil(launch[3] / launch[2]))),
    Misconception(
        "as-many-as-blocks",
        "You cut every cache into single blocks. Every program begins and writes its result, and when the GPU is full it waits.",
        "How many waves do your programs take?",
        for_all(lambda launch: math.ceil(launch[0] / launch[1])),
    ),
    Misconception(
        "never-splits",
        "You never split. One program on one processor leaves all the others idle.",
        "With one program and 132 processors, how many are at work?",
        for_all(lambda launch: 1),
    ),
    Misconception(
        "not-the-smallest",
        "Of several counts that take equally long you did not take the smallest. Every split writes a result that must be "
        "combined.",
        "In which order do you try the counts, and what do you do when two are equal?",
        for_all(soonest(last=True)),
    ),
    Misconception(
        "overhead-forgotten",
        "A program takes one unit of time more than it has blocks: it must begin, and write its result.",
        "What do two programs of one block take, one after the other, and what one of two blocks?",
        for_all(soonest(overhead=0)),
    ),
    Misconception(
        "waves-not-rounded",
        "You took part of a wave for part of its time. The first of a new wave takes as long as all of it.",
        "133 programs on 132 processors: when is the last one done?",
        for_all(soonest(waves_of=lambda waves: max(1.0, waves))),
    ),
    Misconception(
        "blocks-not-rounded",
        "You divided the blocks exactly. The longest split decides, and it has a whole number of them.",
        "How many blocks has the longest of 4 splits of 9 blocks?",
        for_all(soonest(blocks_of=float)),
    ),
)


@exercise.property(
    points=3,
    hints=[
        "Write the time of one count as a formula: waves, times what the longest split takes.",
        "waves = ceil(programs * n / sm_count), and one wave takes ceil(blocks / n) + 1. Try every n, in ascending order.",
        "min(range(1, blocks + 1), key=time) answers with the first of several equal ones.",
    ],
)
def choice_of_the_number_of_splits(t: Trial) -> None:
    """choose_num_splits finds the smallest number with the shortest time"""
    launches = [(4096, 64, 1, 132), (12 * 64, 64, 100, 132), (64, 64, 3, 8), (0, 16, 2, 108), (16 * 9, 16, 4, 16)]
    launches += [(t.integer(1, 3000), t.integer(8, 64), t.integer(1, 200), t.integer(4, 132)) for _ in range(25)]
    answers = [t.call("choose_num_splits", *launch) for launch in launches]
    t.tried = "choose_num_splits(length, block, programs, sm_count) for each of " + str(launches)[:80] + " ..."
    expected = for_all(soonest())(*launches)
    t.expect_equal(answers, expected, "Some of these choices", CHOICE_MISTAKES, *launches)


# -------------------------------------------------------------------------------------------------------- split_decode

Ranges = Sequence[tuple[int, int]]


def even_ranges(length: int, num_splits: int, block: int) -> Ranges:
    per_split = math.ceil(math.ceil(length / block) / num_splits) * block
    return [(min(s * per_split, length), min((s + 1) * per_split, length)) for s in range(num_splits)]


def shared_out_ranges(length: int, num_splits: int, block: int) -> Ranges:
    """The other common way: split s begins at block s * blocks // num_splits."""
    blocks = math.ceil(length / block)
    ends = [min(s * blocks // num_splits * block, length) for s in range(num_splits + 1)]
    return list(pairwise(ends))


def equal_ranges(keys: int, num_splits: int) -> Ranges:
    return [(split * keys, (split + 1) * keys) for split in range(num_splits)]


@dataclass(frozen=True)
class DecodeMistake:
    """Split decoding in float64, with one mistake.

    Attributes:
        ranges: of the keys, from length, number of splits and block.
        visible: the keys of a request, from all lengths, its index and the capacity.
        kv_head: which KV head query head h looks at, from h, the heads of a group and the KV heads.
        piece_lse: of a split, from its scores [Hq, n], n >= 1.
        empty: out and lse of a split without keys.
        merged: the results of all splits, outs [P, Hq, Dv] and lses [P, Hq], combined; it is also told their numbers of keys.
    """

    ranges: Callable[[int, int, int], Ranges] = even_ranges
    visible: Callable[[list[int], int, int], int] = lambda lengths, request, capacity: lengths[request]
    kv_head: Callable[[Tensor, int, int], Tensor] = lambda h, group, kv_heads: h // group
    piece_lse: Callable[[Tensor], Tensor] = lambda scores: scores.logsumexp(-1)
    empty: tuple[float, float] = (0.0, -math.inf)
    merged: Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]] = lambda outs, lses, counts: combine64(
        outs, lses
    )

    def __call__(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        results = [self.merged(*pieces) for pieces in self.pieces(*args, **kwargs)]
        out, lse = (torch.stack(part) for part in zip(*results, strict=True))
        return out, lse

    def pieces(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, num_splits: int, block: int, scale: float | None = None
    ) -> list[tuple[Tensor, Tensor, list[int]]]:
        """For each request: outs [P, Hq, Dv], lses [P, Hq] and numbers of keys of its splits."""
        heads = self.kv_head(torch.arange(q.shape[1]), q.shape[1] // k.shape[1], k.shape[1])
        results = []
        for request in range(len(q)):
            length = self.visible(lengths.tolist(), request, k.shape[2])
            ranges = self.ranges(length, num_splits, block)
            parts = [self._attend(*(x[request].double() for x in (q, k, v)), heads, scale, *each) for each in ranges]
            outs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
            results.append((outs, lses, [max(0, stop - start) for start, stop in ranges]))
        return results

    def _attend(self, q, k, v, heads, scale, start, stop):
        if start >= min(stop, k.shape[1]):
            out, lse = self.empty
            return q.new_full((len(q), v.shape[-1]), out), q.new_full((len(q),), lse)
        scores = torch.einsum("hd,hnd->hn", q, k[heads, start:stop]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        out = torch.einsum("hn,hnd->hd", torch.softmax(scores, -1), v[heads, start:stop])
        return out, self.piece_lse(scores)


def exact_decoding(q, k, v, lengths, num_splits, block, scale=None) -> tuple[Tensor, Tensor]:
    k, v = k.nan_to_num(), v.nan_to_num()  # what lies beyond the lengths is hidden, but the oracle multiplies it by 0
    out, lse = reference.oracle(q[:, :, None], k, v, mask=KeyLengths(lengths), scale=scale)
    return out[:, :, 0], lse[:, :, 0]


def decoding_budget(q, k, v, lengths, num_splits, block, scale=None) -> tuple[float, float]:
    k, v = k.nan_to_num(), v.nan_to_num()
    allowed = merged_budget(q[:, :, None], k, v, num_splits, mask=KeyLengths(lengths), scale=scale)
    return allowed.out, allowed.lse


@lru_cache(maxsize=1)  # of the tensors of one call, for all the mistakes that it is compared with
def right_pieces(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """outs [P, B, Hq, Dv] and lses [P, B, Hq] of all splits, as a right solution has them before it combines them."""
    outs, lses, _ = zip(*DecodeMistake().pieces(*args, **kwargs), strict=True)
    return torch.stack(outs, 1).float(), torch.stack(lses, 1).float()


def of_splits(mistake: Misconception) -> Misconception:
    """A mistake in combining, seen through split_decode."""
    says = f"{mistake.says} (In how your splits become one result.)"
    return replace(mistake, says=says, model=lambda *args, **kwargs: mistake.model(*right_pieces(*args, **kwargs)))


def weighted_by_count(outs: Tensor, lses: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    weights = lses.new_tensor(counts) / max(1, sum(counts))
    return torch.einsum("p,phd->hd", weights, outs), combine64(outs, lses)[1]


def reading_empty_splits(outs: Tensor, lses: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    return weighted(from_largest, hides=False)(outs, lses)


_EMPTY = (
    "empty-split-counted",
    "A split without keys took part. There is nothing in it, so it must not change anything: its lse is -inf, not 0.",
    "exp(0) is 1: how heavy is a piece with an lse of 0? Which lse gives the weight 0?",
)
_PIECE_LSE = (
    "lse-without-sum",
    "The lse of a split is its largest score: the logarithm of the sum is missing. A split of many keys then weighs as much as one "
    "of few.",
    "Two splits have the same largest score, one has one key and the other a hundred. Which should weigh more?",
)
DECODE_MISTAKES = (
    Misconception(
        "weighted-by-length",
        "The splits were weighted by their number of keys. A key counts by exp(score), and not all scores are equal.",
        "One split holds one key with a score of 20, another 99 keys with a score of 0. Where should the weight be?",
        DecodeMistake(merged=weighted_by_count),
    ),
    *(
        replace(TAIL_DROPPED, model=DecodeMistake(ranges=ranges))
        for ranges in (
            lambda length, n, block: equal_ranges(length // n, n),
            lambda length, n, block: equal_ranges(length // block // n * block, n),
            lambda length, n, block: even_ranges(length // block * block, n, block),
        )
    ),
    *(
        Misconception(
            "last-split-dropped",
            "The last split was left out, though it has keys: the newest of them.",
            "For how many splits does your loop run, and how many results do you combine?",
            DecodeMistake(ranges=lambda length, n, block, cut=cut: cut(length, n, block)[:-1] or [(0, 0)]),
        )
        for cut in (even_ranges, shared_out_ranges)
    ),
    Misconception(
        "beyond-the-length",
        "Keys behind a request's length were seen: its last block is not full, and was read to its end.",
        "Where does the last block end, if lengths[b] lies in the middle of it?",
        DecodeMistake(
            ranges=lambda length, n, block: [
                (start, math.ceil(stop / block) * block) for start, stop in even_ranges(length, n, block)
            ]
        ),
    ),
    Misconception(
        "lengths-ignored",
        "All of the cache was seen, up to its capacity. Behind a request's length lie other people's keys.",
        "Where do you use the argument lengths?",
        DecodeMistake(visible=lambda lengths, request, capacity: capacity),
    ),
    Misconception(
        "lengths-of-another",
        "Every request was given the same length. Each has its own.",
        "For which index do you read lengths, inside the loop over requests?",
        DecodeMistake(visible=lambda lengths, request, capacity: lengths[0]),
    ),
    Misconception(
        "lengths-of-another",
        "Every request was given the longest length. Each has its own.",
        "For which index do you read lengths, inside the loop over requests?",
        DecodeMistake(visible=lambda lengths, request, capacity: max(lengths)),
    ),
    Misconception(*_EMPTY, DecodeMistake(empty=(0.0, 0.0))),
    Misconception(
        "empty-split-nan",
        "A split without keys gave NaN, and its weight of 0 does not hide that: 0 * NaN is NaN.",
        "What is the sum over no keys, and what was it divided by?",
        DecodeMistake(empty=(math.nan, -math.inf), merged=reading_empty_splits),
    ),
    Misconception(*_PIECE_LSE, DecodeMistake(piece_lse=lambda scores: scores.amax(-1))),
    Misconception(
        "lse-base-2",
        "The lse of a split is a logarithm to base 2, and was combined as a natural one.",
        "If scores were multiplied by log2(e), in which base is their log-sum-exp?",
        DecodeMistake(piece_lse=lambda scores: scores.logsumexp(-1) / math.log(2)),
    ),
    replace(HEADS_MODULO, model=DecodeMistake(kv_head=lambda h, group, kv_heads: h % kv_heads)),
    *(of_splits(mistake) for mistake in COMBINE_MISTAKES),
)


def as_dense(q, k, v, lengths, num_splits, block, scale=None) -> Dense:
    shared = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    absent = (torch.arange(k.shape[2]) >= lengths[:, None])[:, None, None]
    sizes = (v.shape[-1], k.shape[2], q.shape[1], k.shape[1], q.shape[1] // k.shape[1])
    given = q.shape[-1] ** -0.5 if scale is None else scale
    return Dense(q[:, :, None], *shared, given, scale is None, sizes, absent, block=block)


def of_one_query(out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return out[:, :, 0], None if lse is None else lse[:, :, 0]


# There is one query, and no mask.
FORMULA_MISTAKES = formula_mistakes(
    as_dense,
    of_one_query,
    leave=(
        "wrong-axis",
        "masked-after-softmax",
        "causal-sees-the-next",
        "accumulated-in-half",
    ),
)
PADDING_MULTIPLIED = Misconception(
    "padding-multiplied",
    "Something from behind a request's length reached the answer. Hiding the scores is not enough: a weight of 0 times a value of "
    "NaN is NaN.",
    "Which of your slices go beyond lengths[b]?",
)
EMPTY_SPLIT_RAISES = Misconception(
    "empty-split-raises",
    "A split without keys, or a request without any, made your code stop. There is no maximum over nothing.",
    "What are out and lse of attention over no keys? What must be done for such a split?",
)
NOT_SPLIT = Misconception(
    "not-split",
    "A tensor was made for more keys than one split has. On a GPU no program holds what belongs to the others, and it is to be one "
    "program for each split.",
    "Make the scores from a slice of k, inside the loop over the splits.",
)
READ_TOO_OFTEN = Misconception(
    "cache-read-too-often",
    "Keys or values were read more than once. Reading the cache is all that decoding costs.",
    "How often does your code come past the same key: for each split, for each query head, once more to clean it?",
)
PADDING_READ = Misconception(
    "padding-read",
    "What lies behind a request's length was read too, and hidden afterwards. With one long request in a batch, that is most of the "
    "work.",
    "Slice the cache of a request by its own length, before anything is computed.",
)
decode = Target(
    "split_decode",
    oracle=exact_decoding,
    budget=decoding_budget,
    outputs={"out": torch.float32, "lse": torch.float32},
    misconceptions=(*DECODE_MISTAKES, *FORMULA_MISTAKES),
)


def draw_step(t: Trial, capacity: int, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """A token's q ``[batch, heads, dim]``, whose scores are far enough apart to matter, and a cache of k and v ``[batch, kv_heads, capacity, ..]``."""
    q, k, v = draw(t, 1, capacity, **{"batch": 2, "kv_heads": 2, "dim": 8, "v_dim": 5, **sizes})
    return 2 * q[:, :, 0], k, v


def along(t: Trial, profile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of 2 with 4 query heads and 2 KV heads, whose scaled scores follow the profile."""
    q, k, v = draw_step(t, len(profile), heads=4)
    q, k = with_scores_along(q[:, :, None], k, profile)
    return q[:, :, 0], k, v


@exercise.property(
    points=3,
    hints=[
        "A split's result is attention over its own keys, with the lse of its own scores.",
        "Collect outs [num_splits, B, Hq, Dv] and lses [num_splits, B, Hq], and combine them at the end.",
    ],
)
def decoding_agrees_with_float64(t: Trial) -> None:
    """split_decode gives what attention over the whole cache gives, for any number of splits"""
    for batch, heads, kv_heads, length, num_splits, block in (
        (2, 6, 2, 26, 3, 4),
        (2, 4, 4, 30, 1, 5),
        (1, 6, 3, 37, 3, 8),
    ):
        step = draw_step(t, length, batch=batch, heads=heads, kv_heads=kv_heads)
        t.check(decode, *step, torch.full((batch,), length), num_splits, block)
    q, k, v = draw_step(t, 53, heads=6)
    for num_splits in (2, 5, 7):
        t.check(decode, q, k, v, torch.tensor([53, 53]), num_splits, 4)


@exercise.property(
    points=2,
    hints=[
        "Each request is cut by its own length.",
        "Slice k[b, :, start:stop] with stop at most lengths[b]; then nothing behind it can get into the answer.",
    ],
)
def decoding_of_ragged_lengths(t: Trial) -> None:
    """split_decode sees lengths[b] keys of request b, and nothing that lies behind them"""
    lengths = torch.tensor([t.integer(26, 29), t.integer(21, 24), t.integer(36, 38)])
    q, k, v = draw_step(t, 40, batch=3, heads=6)
    t.check(decode, q, k, v, lengths, 3, 5)
    k, v = (torch.stack([with_poisoned_tail(x[b], int(lengths[b])) for b in range(3)]) for x in (k, v))
    answers = t.expect_tuple(t.call("split_decode", q, k, v, lengths, 3, 5), "out", "lse")
    if any(isinstance(x, Tensor) and x.isnan().any() for x in answers):
        t.fail_as(PADDING_MULTIPLIED, got="NaN", expected="numbers: nobody should have seen the NaN in k and v")
    t.judge(decode, answers, q, k, v, lengths, 3, 5)


@exercise.property(
    points=2,
    hints=[
        "With 3 keys and 5 splits, two splits have none. Which out and lse should they have?",
        "Start from outs of 0 and lses of -inf, and write only those that have keys.",
    ],
)
def decoding_with_empty_splits(t: Trial) -> None:
    """split_decode with more splits than blocks, and with requests that have no key yet"""
    q, k, v = draw_step(t, 24, batch=3, heads=4)
    for lengths, num_splits, block in (([3, 7, 20], 5, 4), ([1, 2, 3], 6, 1), ([9, 0, 20], 3, 8), ([0, 5, 0], 9, 16)):
        arguments = q, k, v, torch.tensor(lengths), num_splits, block
        t.check(decode, *arguments, if_it_raises=EMPTY_SPLIT_RAISES, but_not_on=(q, k, v, torch.tensor([24] * 3), 2, 4))


@exercise.property(
    points=2,
    hints=[
        "Let one split hold the largest score of all. Which weights should the others get?",
        "A split's weight is exp(lse of the split - lse of all), and lse = m + log(sum of exp(s - m)).",
    ],
)
def decoding_when_one_split_outweighs(t: Trial) -> None:
    """split_decode is right whichever split has the large scores, and for scores of any height"""
    for profile in (ramp(40, -9, 9), ramp(40, 9, -9), ramp(40, 300, 310), ramp(40, -2000, -2010)):
        t.check(decode, *along(t, profile), torch.tensor([38, 34]), 4, 5)


@exercise.property(points=1, hints=["The caller's scale replaces the default; it does not multiply it."])
def decoding_with_a_given_scale(t: Trial) -> None:
    """split_decode uses the scale it is given"""
    t.check(decode, *draw_step(t, 23, heads=4), torch.tensor([19, 18]), 3, 4, scale=float(t.uniform(0.6, 0.9, 1)))
    t.check(decode, *draw_step(t, 23, heads=4), torch.tensor([19, 18]), 3, 4, 0.1)


@exercise.property(points=1, hints=["x[...] = and names that end in _ write into the caller's memory."])
def decoding_leaves_its_inputs_alone(t: Trial) -> None:
    """split_decode changes none of its inputs, and reads them in any memory layout"""
    q, k, v = draw_step(t, 25, heads=4)
    lengths = torch.tensor([23, 11])
    t.check_inputs_untouched(decode, q, k, v, lengths, 3, 4)
    strided = q, *(transposed_in_poison(x) for x in (k, v)), lengths, 3, 4
    t.check(decode, *strided, if_it_raises=ASSUMES_CONTIGUOUS, but_not_on=(q, k, v, lengths, 3, 4))


SPLITS_IGNORED = Misconception(
    "num-splits-ignored",
    "The cache was not cut into num_splits splits: the work is the same for 2 of them as for 16.",
    "Where does num_splits enter the ranges that your loop runs over?",
)
BLOCK_IGNORED = Misconception(
    "block-ignored",
    "Blocks of keys were cut apart: the splits do not begin and end where split_ranges says for this `block`.",
    "Which block does your call of split_ranges get?",
)


@exercise.property(
    points=4,
    hints=[
        "Which of your tensors grows with the length of the cache, whatever the number of splits?",
        "Inside the loop over splits: slice k and v, make scores, out and lse of that slice alone.",
    ],
)
def every_split_works_alone(t: Trial) -> None:
    """split_decode makes no tensor larger than what one split needs"""
    t.check(
        decode, *draw_step(t, 26, batch=1, heads=4), torch.tensor([26]), 3, 4
    )  # who fails anyway is told so at less expense
    heads, length, splits, block, dim = 8, 65_000, 64, 64, 4
    longest = math.ceil(math.ceil(length / block) / splits) * block
    q, k, v = draw_step(t, length, batch=1, heads=heads, kv_heads=heads, dim=dim, v_dim=dim)
    _check_largest(t, NOT_SPLIT, q, k, v, torch.tensor([length]), splits, block, largest=2 * heads * longest * dim)
    q, k, v = draw_step(t, 2048, batch=1, heads=heads, kv_heads=1, dim=16, v_dim=16)
    _check_largest(t, KV_REPEATED, q, k, v, torch.tensor([2048]), 1, 64, largest=2 * k.numel())
    q, k, v = draw_step(t, 1024, batch=1, heads=1, kv_heads=1, dim=2, v_dim=2)
    lengths = torch.tensor([1024])
    t.expect_calls_to_grow("split_decode", (q, k, v, lengths, 2, 8), (q, k, v, lengths, 16, 8), SPLITS_IGNORED)
    # 1024 keys in blocks of 1000 are two blocks, so one of two splits gets 1000 keys, and not 512.
    made = t.ask("split_decode", (q, k, v, lengths, 2, 1000), meter={}).meter["largest_elements"]
    if made < 1000 and t.call("split_ranges", 1024, 2, 1000) == [(0, 1000), (1000, 1024)]:
        t.fail_as(
            BLOCK_IGNORED,
            got=f"no tensor of more than {made:,} elements, with 1000 keys in a block",
            expected="the scores of one split: 1000",
        )


def _check_largest(t: Trial, mistake: Misconception, *args, largest: int) -> None:
    try:
        t.check_tiled(decode, *args, largest=largest)
    except Failure as failure:
        if failure.finding.diagnosis != "untiled":
            raise
        t.fail_as(mistake, got=failure.finding.got, expected=failure.finding.expected)


@exercise.property(
    points=3,
    hints=[
        "Reading k and v is all that decoding costs: count how often each number passes.",
        "q.reshape(Hkv, G, D) @ k[b, :, start:stop].mT reads every key once for all heads of its group.",
    ],
)
def every_key_is_read_once(t: Trial) -> None:
    """split_decode reads each visible key and value once, and nothing behind the lengths"""
    for capacity, lengths, mistake in ((60, [60, 60], READ_TOO_OFTEN), (64, [60, 30], PADDING_READ)):
        q, k, v = draw_step(t, capacity, heads=6)
        t.check(decode, q, k, v, torch.tensor(lengths), 4, 4)
        reply = t.ask("split_decode", (q, k, v, torch.tensor(lengths), 4, 4), meter={"k": k, "v": v})
        for name, x in (("k", k), ("v", v)):
            visible = sum(lengths) * x.shape[1] * x.shape[3] * x.element_size()
            read = bytes_read(reply.meter, name)
            if read > visible:
                t.fail_as(
                    mistake,
                    got=f"{read:,} bytes of {name} read, for lengths {lengths}",
                    expected=f"{visible:,}: each visible one once",
                )
    see_reads_from_outside(t)


def see_reads_from_outside(t: Trial) -> None:
    """K and V are handed out piece by piece, with room for a split's keys of one head: the visible ones once, the others never."""
    batch, q_heads, kv_heads, capacity, dim, splits, block = 2, 6, 2, 8192, 64, 8, 64
    q, k, v = draw_step(t, capacity, batch=batch, heads=q_heads, kv_heads=kv_heads, dim=dim, v_dim=dim)
    lengths = torch.tensor([capacity, 64 * t.integer(70, 90)])
    arguments, split = (q, k, v, lengths, splits, block), capacity // splits * dim * 4
    few = 2 * capacity // splits  # keys in splits of the same size, so that only what grows with their number is seen
    first = q, k[:, :, :few].clone(), v[:, :, :few].clone(), torch.tensor([few, few]), 2, block
    room = {"k": (k, split), "v": (v, split)}
    reply = t.watch(
        "split_decode", *arguments, first=first, room=room, together=True, memory=6 * MIB, copied=KV_REPEATED
    )
    if reply is None:
        return
    t.judge(decode, reply.value, *arguments)
    for name in ("k", "v"):
        keys = reply.seen.piece[name] // (dim * 4)  # in a piece; they are all of one request and head
        needed = {
            (request * kv_heads + head) * (capacity // keys) + piece
            for request, length in enumerate(lengths.tolist())
            for head in range(kv_heads)
            for piece in range(math.ceil(length / keys))
        }
        if in_vain := reply.seen.pieces(name) - needed:
            t.fail_as(PADDING_READ, got=f"{len(in_vain) * keys:,} keys read that no request has", expected="none")
        read = sum(each == name for each, _ in reply.seen.order)
        if read > 1.5 * len(needed):  # where two splits meet in a piece, it may come twice
            t.fail_as(READ_TOO_OFTEN, got=f"{read * keys:,} keys read", expected=f"{len(needed) * keys:,}")
    t.confirmed()


def bytes_read(meter: object, name: str) -> float:
    """What the meter saw read of an operand; infinitely much if what it reports is no count."""
    read = meter.get("bytes_read") if isinstance(meter, dict) else None
    count = read.get(name, 0) if isinstance(read, dict) else None
    return count if isinstance(count, int) else math.inf
