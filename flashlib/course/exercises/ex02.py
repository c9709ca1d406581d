"""Checks of ex02: the online softmax, one block at a time, and the merge of two results."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from statistics import median

import torch
from torch import Tensor

from flashlib.course.exercises.online_softmax import (
    ONLINE_MISTAKES,
    STEP_MISTAKES,
    State,
    attention64,
    finish,
    finite,
    running_maximum,
    step,
    step64,
)
from flashlib.course.exercises.pieces import FOLD_MISTAKES, NO_PIECES, PIECE_MISTAKES, combine64, fold_budget
from flashlib.course.grader.exercise import SDPA, SOFTMAX, Exercise, Misconception, Target, budget_of
from flashlib.course.grader.inputs import in_poison, ramp
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex02",
    file="ex02_online_softmax.py",
    title="Online softmax and merge",
    chapter="02_online_softmax",
    difficulty=3,
    importance=5,
    minutes=60,
    forbidden=SDPA | SOFTMAX,
)


# -------------------------------------------------------------------------------------------------------------- update


def step_terms(m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor) -> State:
    """Every weight exp(x) is uncertain by its own rounding and by that of x. m is one of the scores and has none."""
    pivot = finite(running_maximum(m, scores))
    shift, old_shift = scores - pivot[:, None], m - pivot
    weights = torch.exp(shift) * (1 + finite(shift).abs())
    old = torch.exp(old_shift) * (1 + finite(old_shift).abs())
    return torch.zeros_like(m), old * l + weights.sum(-1), old[:, None] * acc.abs() + weights @ v.abs()


update = Target(
    "update",
    oracle=step64,
    budget=budget_of(step, step64, step_terms),
    outputs={"m": torch.float32, "l": torch.float32, "acc": torch.float32},
    misconceptions=STEP_MISTAKES,
)


def nothing_seen(rows: int, v_dim: int) -> State:
    return torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows, v_dim)


def state_after(scores: Tensor, v: Tensor) -> State:
    return step(*nothing_seen(scores.shape[0], v.shape[1]), scores, v)


@exercise.property(
    points=2,
    hints=[
        "In the empty state l and acc are 0 and m is -inf. What does exp make of -inf minus a number?",
        "The new m is the block's maximum, l the sum of exp(s - m) over the block, acc the same sum with v.",
    ],
)
def update_with_a_first_block(t: Trial) -> None:
    """update turns the empty state into that of the first block"""
    t.check(update, *nothing_seen(6, 3), t.randn(6, 5), t.randn(5, 3))
    t.check(update, *nothing_seen(4, 7), t.randn(4, 1), t.randn(1, 7))


@exercise.property(
    points=2,
    hints=[
        "The old l is a sum of exp(s - m_old). What would it have to be a sum of?",
        "exp(s - m_new) = exp(s - m_old) * exp(m_old - m_new).",
    ],
)
def update_when_the_maximum_rises(t: Trial) -> None:
    """update brings the old sums into line when the block holds a new maximum"""
    m, l, acc = state_after(t.randn(6, 8), t.randn(8, 3))
    m, l, acc = t.check(update, m, l, acc, t.uniform(3, 5, 6, 5), t.randn(5, 3))
    t.check(update, m, l, acc, t.uniform(6, 7, 6, 2), t.randn(2, 3))


@exercise.property(
    points=2,
    hints=[
        "What is the maximum of all scores so far, if the block's own is smaller than the old one?",
        "Nothing has to be rescaled here: which factor comes out of your formula when m stays the same?",
    ],
)
def update_when_the_maximum_stays(t: Trial) -> None:
    """update keeps the old maximum when the block holds nothing larger"""
    old = state_after(t.randn(6, 8), t.randn(8, 3))
    t.check(update, *old, t.uniform(-6, -4, 6, 5), t.randn(5, 3))
    t.check(update, *old, t.uniform(-210, -200, 6, 5), t.randn(5, 3))


@exercise.property(
    points=2,
    hints=[
        "Follow one row whose scores are far below those of another row.",
        "Each row has its own m: take the maximum along the axis of the keys, and keep the axis of the rows.",
    ],
)
def update_of_rows_far_apart(t: Trial) -> None:
    """update treats each row by itself, however large or small its scores are"""
    height = 400.0 * t.permutation(8)[:, None] - 1400.0
    rise = t.permutation(8)[:, None] - 4.0  # some rows see a new maximum, others do not
    old = state_after(height + t.randn(8, 6), t.randn(6, 3))
    t.check(update, *old, height + 3 * rise + t.randn(8, 5), t.randn(5, 3))


@exercise.property(
    points=2,
    hints=[
        "A hidden score adds nothing. Which blocks have a maximum of -inf?",
        "Where the new maximum is -inf, subtract 0 instead: exp(-inf - 0) is 0, as it should be.",
    ],
)
def update_with_hidden_scores(t: Trial) -> None:
    """update lets hidden scores add nothing, even if a row has seen nothing else"""
    scores = t.randn(6, 5)
    scores[t.uniform(0, 1, 6, 5) < 0.4] = -torch.inf
    scores[:, 2] = 1.0
    old = state_after(t.randn(6, 4), t.randn(4, 3))
    t.check(update, *old, scores, t.randn(5, 3))
    scores[t.integer(0, 2)] = scores[t.integer(3, 5)] = -torch.inf
    t.check(update, *old, scores, t.randn(5, 3))
    started = t.check(update, *nothing_seen(6, 3), scores, t.randn(5, 3))
    t.check(update, *started, t.randn(6, 5), t.randn(5, 3))


@exercise.property(
    points=1, hints=["x = x * y makes a new tensor. x *= y, x.mul_(y) and x[i] = y change the one that x names."]
)
def update_leaves_its_arguments_alone(t: Trial) -> None:
    """update does not change the state it was given, nor the block"""
    t.check_inputs_untouched(update, *state_after(t.randn(6, 8), t.randn(8, 3)), 2 + t.randn(6, 5), t.randn(5, 3))


# ---------------------------------------------------------------------------------------------------- online_attention


def attention_naive(scores: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return finish(*state_after(scores, v))


def attention_terms(scores: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks may be merged by their lse, which every merge then rounds."""
    lse = finite(attention64(scores, v)[1])[:, None]
    blocks = math.ceil(scores.shape[1] / block)
    weights = blocks * torch.exp(scores - lse) * (1 + lse.abs() + finite(scores).abs())
    return weights @ v.abs(), weights.sum(-1)


online = Target(
    "online_attention",
    oracle=attention64,
    budget=budget_of(attention_naive, attention64, attention_terms),
    outputs={"out": torch.float32, "lse": torch.float32},
    misconceptions=ONLINE_MISTAKES,
)


@exercise.property(
    points=2,
    hints=[
        "Write the shape beside each line: scores of a block [rows, block], m and l [rows], acc [rows, Dv].",
        "Start from the empty state, update it with each block, and divide once at the end.",
    ],
)
def online_attention_for_any_block(t: Trial) -> None:
    """online_attention agrees with float64, in blocks of any size that divides the keys"""
    scores, v = t.randn(5, 24), t.randn(24, 3)
    for block in (8, 4, 24):
        t.check(online, scores, v, block)
    t.check(online, scores[:, :8], v[:8], 1)


@exercise.property(
    points=2,
    hints=[
        "How long is the last block, if 23 keys are cut into blocks of 5?",
        "range(0, n, block) gives every start, and a slice that ends beyond n is cut off by itself.",
    ],
)
def online_attention_with_a_shorter_last_block(t: Trial) -> None:
    """online_attention counts the last keys too, when they do not fill a block, and nothing beyond them"""
    scores, v = in_poison(t.randn(5, 23)), in_poison(t.randn(23, 3))
    for block in (5, 22, 16, 40):
        t.check(online, scores, v, block)


@exercise.property(
    points=2,
    hints=[
        "Print m, l and acc after each block, and compare them with a softmax over the keys so far.",
        "When m rises, everything summed up before it must be multiplied by exp(m_old - m_new).",
    ],
)
def online_attention_with_rising_maxima(t: Trial) -> None:
    """online_attention is right when every block raises the maximum"""
    t.check(online, ramp(40, -4, 4) + 0.3 * t.randn(6, 40), t.randn(40, 3), 8)
    t.check(online, ramp(40, -60, 60) + t.randn(6, 40), t.randn(40, 3), 10)


@exercise.property(
    points=1,
    hints=[
        "What should m be after the second block, if the first held the largest score?",
        "m is the larger of the old m and the block's maximum, row by row.",
    ],
)
def online_attention_with_falling_maxima(t: Trial) -> None:
    """online_attention is right when the first block holds the maximum"""
    t.check(online, ramp(40, 4, -4) + 0.3 * t.randn(6, 40), t.randn(40, 3), 8)
    t.check(online, ramp(40, 80, -100) + t.randn(6, 40), t.randn(40, 3), 10)


@exercise.property(
    points=2,
    hints=[
        "If every exponential of a row is 0 or infinite, which number did you subtract?",
        "m starts at -inf, not at 0: 0 is larger than all scores of a very negative row.",
    ],
)
def online_attention_of_large_and_small_rows(t: Trial) -> None:
    """online_attention survives rows of very large and of very negative scores"""
    t.check(online, t.uniform(200, 210, 5, 12), t.randn(12, 3), 4)
    t.check(online, t.uniform(-9.01e3, -9e3, 5, 12), t.randn(12, 3), 4)
    t.check(online, t.randn(6, 12) + 400.0 * t.permutation(6)[:, None], t.randn(12, 3), 4)


@exercise.property(
    points=1,
    hints=[
        "In a row of nothing but -inf, what are m and l at the end? What is m + log l?",
        "Only the division needs care there: divide such a row by 1.",
    ],
)
def online_attention_with_hidden_scores(t: Trial) -> None:
    """online_attention gives hidden scores no weight, and a row of nothing else 0 and -inf"""
    scores = t.randn(6, 12)
    scores[t.uniform(0, 1, 6, 12) < 0.4] = -torch.inf
    scores[:, 0] = 0.5
    scores[t.integer(0, 5), :11] = -torch.inf
    t.check(online, scores, t.randn(12, 3), 4)
    scores[t.integer(0, 5)] = -torch.inf
    t.check(online, scores, t.randn(12, 3), 4)


UNTILED = Misconception(
    "untiled",
    "You made a tensor as large as all the scores. Online means: one block at a time, and then it is gone.",
    "A slice of scores is a view and costs nothing. What do you make of it before you slice?",
)
TWO_PASSES = Misconception(
    "keys-looked-at-twice",
    "The scores were read more than once: first for the maximum of the row, say, and then for the sum. Online means one pass.",
    "What do you need of the whole row before you can add up its first block? What if that turns out too small later?",
)
BLOCK_IGNORED = Misconception(
    "block-ignored",
    "The keys were not looked at `block` at a time: your code cuts them by a number of its own.",
    "Where in your loop does the argument `block` stand?",
)


@exercise.property(
    points=5,
    hints=[
        "A slice of scores is a view and costs nothing. What do you make of it before you slice?",
        "exp, a mask or a padded copy of all scores is as large as they are. Do it to one block at a time.",
    ],
)
def online_attention_never_holds_the_row(t: Trial) -> None:
    """online_attention makes no tensor as large as the scores"""
    t.check(online, t.randn(4, 32), t.randn(32, 4), 8)  # who fails anyway is told so at less expense
    scores, v, block = t.randn(4, 1024), t.randn(1024, 4), 64
    t.expect_calls_to_grow("online_attention", (scores, v, 1024), (scores, v, block), BLOCK_IGNORED)
    meter = t.ask("online_attention", (scores, v, block), meter={"scores": scores}, fast_memory=8 * 1024).meter
    allowed = 4 * block * max(scores.shape[0], v.shape[1])
    if allowed < meter["largest_elements"] <= scores.numel() // 2:
        got = f"a tensor of {meter['largest_elements']:,} elements, for blocks of {block} keys"
        t.fail_as(BLOCK_IGNORED, got=got, expected=f"at most {allowed:,}")
    passes = meter["bytes_read"].get("scores", 0) / scores.nbytes
    if meter["largest_elements"] <= allowed and passes > 1.1:
        t.fail_as(TWO_PASSES, got=f"all the scores read {passes:.3g} times", expected="once")
    scores, v = t.randn(16, 65_536), t.randn(65_536, 4)
    t.check_tiled(
        online,
        scores,
        v,
        4096,
        largest=scores.numel() // 2,
        says=UNTILED.says,
    )
    see_blocks_from_outside(t)


def see_blocks_from_outside(t: Trial) -> None:
    """The scores are handed out piece by piece: each once, and between the values of one block and the next so many of them."""
    rows, length, block, v_dim = 4, 1 << 19, 1 << 14, 2
    scores, v = t.randn(rows, length), t.randn(length, v_dim)
    room = {"scores": (scores, rows * block * 4), "v": (v, block * v_dim * 4)}
    few = 2 * block  # keys in blocks of the same size, so that only what grows with their number is seen
    first = scores[:, :few].clone(), v[:few].clone(), block
    reply = t.watch("online_attention", scores, v, block, first=first, room=room, memory=5 * MIB, copied=UNTILED)
    if reply is None:
        return
    t.judge(online, reply.value, scores, v, block)
    if (times := reply.seen.times("scores")) > 1:
        t.fail_as(TWO_PASSES, got=f"all the scores read {times:.3g} times", expected="once")
    pieces, in_block = median(reply.seen.runs("v")), block * v_dim * 4 // reply.seen.piece["v"]
    if not 0.75 * in_block <= pieces <= 1.5 * in_block:
        got = f"the values of about {pieces * block // in_block:,.0f} keys read between scores and scores"
        t.fail_as(BLOCK_IGNORED, got=got, expected=f"those of {block:,}, a block")
    t.confirmed()


@exercise.property(
    points=1, hints=["x = x * y makes a new tensor. x *= y, x.mul_(y) and x[i] = y change the one that x names."]
)
def online_attention_leaves_its_inputs_alone(t: Trial) -> None:
    """online_attention does not change scores or v"""
    t.check_inputs_untouched(online, t.randn(5, 12), t.randn(12, 3), 4)


# -------------------------------------------------------------------------------------------------------------- merge


def two(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack([out_a, out_b]), torch.stack([lse_a, lse_b])


def of_two(mistake: Misconception) -> Misconception:
    return replace(mistake, model=lambda *args: mistake.model(*two(*args)))


merge = Target(
    "merge",
    oracle=lambda *args: combine64(*two(*args)),
    budget=lambda *args: fold_budget(*two(*args)),
    outputs={"out": torch.float32, "lse": torch.float32},
    misconceptions=[of_two(mistake) for mistake in PIECE_MISTAKES],
)


def pieces(t: Trial, count: int, *shape: int) -> tuple[Tensor, Tensor]:
    """`count` pieces of attention over keys that nobody sees: outs [count, *shape, 3] and lses [count, *shape]."""
    return t.randn(count, *shape, 3), t.randn(count, *shape)


@exercise.property(
    points=2,
    hints=[
        "out_a is a sum of exp(s) * v over the keys of a, divided by exp(lse_a). So what is that sum?",
        "Weigh out_a with exp(lse_a), out_b with exp(lse_b), and divide by the sum of the weights.",
    ],
)
def merge_of_two_pieces(t: Trial) -> None:
    """merge gives what attention over all keys gives, whichever piece comes first"""
    scores, v = t.randn(5, 12), t.randn(12, 3)
    a, b = (tuple(x.float() for x in attention64(scores[:, part], v[part])) for part in (slice(0, 9), slice(9, 12)))
    t.check(merge, *a, *b)
    t.check(merge, *b, *a)
    outs, lses = pieces(t, 2, 2, 4)
    t.check(merge, outs[0], lses[0], outs[1], lses[1])


@exercise.property(
    points=1,
    hints=[
        "A merged result is a piece like any other. Is its lse right?",
        "lse has to stand for the keys of both pieces: log(exp(lse_a) + exp(lse_b)).",
    ],
)
def merge_in_any_grouping(t: Trial) -> None:
    """merge is associative: merged pieces merge again, ((ab)c)d as well as (ab)(cd)"""
    a, b, c, d = zip(*pieces(t, 4, 6), strict=True)
    reduce(lambda x, y: t.check(merge, *x, *y), (a, b, c, d))
    t.check(merge, *t.check(merge, *a, *b), *t.check(merge, *c, *d))


@exercise.property(
    points=2,
    hints=[
        "No exponent may be above 0, and not all of them far below it.",
        "Subtract the larger of lse_a and lse_b, row by row, and add it to the new lse again.",
    ],
)
def merge_of_pieces_far_apart(t: Trial) -> None:
    """merge survives lse of any size, and rows and pieces far apart"""
    outs, lses = pieces(t, 2, 6)
    apart = torch.stack([torch.zeros(6), 150.0 * (1 - 2 * (t.permutation(6) % 2))])
    for first, second in ((0, 1), (1, 0)):
        t.check(merge, outs[first], lses[first] + 200, outs[second], lses[second] + 200)
        t.check(merge, outs[first], lses[first] - 9e3, outs[second], lses[second] - 9e3)
        t.check(merge, outs[first], (lses + apart)[first], outs[second], (lses + apart)[second])
        height = 400.0 * t.permutation(6)
        t.check(merge, outs[first], lses[first] + height, outs[second], lses[second] + height)


@exercise.property(
    points=2,
    hints=[
        "Where lse is -inf there was no key. Do not even read its out.",
        "Merge two empty pieces by hand: which steps meet -inf - -inf, or 0 / 0?",
    ],
)
def merge_with_an_empty_piece(t: Trial) -> None:
    """merge with a piece of no keys changes nothing, whatever that piece's out holds; two of them give 0 and -inf"""
    outs, lses = pieces(t, 2, 6)
    for empty in (0, 1):
        some = lses.clone()
        some[empty, t.permutation(6)[:4]] = -torch.inf
        holding = outs.masked_fill((some == -torch.inf)[..., None], torch.nan)
        t.check(merge, holding[0], some[0], holding[1], some[1])
    lses[:, t.integer(0, 5)] = -torch.inf
    t.check(merge, outs[0], lses[0], outs[1], lses[1])


@exercise.property(
    points=1, hints=["x = x * y makes a new tensor. x *= y, x.mul_(y) and x[i] = y change the one that x names."]
)
def merge_leaves_its_arguments_alone(t: Trial) -> None:
    """merge does not change the pieces"""
    outs, lses = pieces(t, 2, 5)
    lses[1, 2] = -torch.inf
    t.check_inputs_untouched(merge, outs[0], lses[0], outs[1], lses[1])


# ---------------------------------------------------------------------------------------------------------------- fold


fold = Target("fold", oracle=combine64, budget=fold_budget, outputs=merge.outputs, misconceptions=FOLD_MISTAKES)
fold_of_nothing = replace(fold, misconceptions=())  # there the models have nothing to work on


@exercise.property(
    points=2,
    hints=[
        "Two pieces merged are again one piece.",
        "Start from the piece without keys, and merge with one piece after the other.",
    ],
)
def fold_of_many_pieces(t: Trial) -> None:
    """fold of the pieces of a row gives the whole row"""
    scores, v = t.randn(5, 40), t.randn(40, 3)
    cut = [attention64(*both) for both in zip(scores.split(7, 1), v.split(7), strict=True)]
    t.check(fold, *(torch.stack(part).float() for part in zip(*cut, strict=True)))
    t.check(fold, *pieces(t, 9, 2, 4))
    t.check(fold, *pieces(t, 1, 4))


@exercise.property(
    points=1,
    hints=[
        "Each row has its own largest lse. Along which axis do you look for it?",
        "The pieces lie along the first axis; all the others are rows.",
    ],
)
def fold_of_pieces_far_apart(t: Trial) -> None:
    """fold survives lse of any size, and rows and pieces far apart"""
    outs, lses = pieces(t, 5, 6)
    t.check(fold, outs, lses + 200)
    t.check(fold, outs, lses - 9e3)
    t.check(fold, outs, lses + 150.0 * t.permutation(5)[:, None])
    t.check(fold, outs, lses + 400.0 * t.permutation(6))


@exercise.property(
    points=2,
    hints=[
        "What is attention over no keys? Start from that.",
        "outs.shape[1:] and lses.shape[1:] are the shapes of one piece, even if there is none.",
    ],
)
def fold_of_empty_pieces(t: Trial) -> None:
    """fold passes over pieces without keys, and over no piece at all gives 0 and -inf"""
    outs, lses = pieces(t, 5, 6)
    empty = t.uniform(0, 1, 5, 6) < 0.4
    empty[t.integer(0, 4)] = empty[:, t.permutation(6)[:2]] = False
    lses = lses.masked_fill(empty, -torch.inf)
    t.check(fold, outs.masked_fill((lses == -torch.inf)[..., None], torch.nan), lses)
    lses[:, t.integer(0, 5)] = -torch.inf
    t.check(fold, outs, lses)
    nothing = torch.zeros(0, 4, 3), torch.zeros(0, 4)
    t.check(fold_of_nothing, *nothing, if_it_raises=NO_PIECES, but_not_on=(torch.zeros(1, 4, 3), torch.zeros(1, 4)))
