"""Checks of ex04: masks as intervals, what they leave of a tile, and attention that skips the tiles with nothing to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises import drawing
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.intervals import INTERVAL_MISTAKES, blocks, exact_intervals
from flashlib.course.exercises.mistakes import BLOCK_K_IGNORED
from flashlib.course.exercises.pieces import merged_budget
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.inputs import transposed_in_poison
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.trial import Trial
from flashlib.masks import Mask, RowIntervals

exercise = Exercise(
    name="ex04",
    file="ex04_masks.py",
    title="Masks and tile classification",
    chapter="04_masks",
    difficulty=3,
    importance=4,
    minutes=75,
    forbidden=SDPA,
)

EXACTLY = 0.0  # the error budget of integers

# ----------------------------------------------------------------------------------------------------------- intervals


intervals = Target(
    "intervals",
    oracle=exact_intervals,
    budget=lambda *args, **kwargs: (EXACTLY, EXACTLY),
    outputs={"start": torch.int64, "stop": torch.int64},
    misconceptions=INTERVAL_MISTAKES,
)


@exercise.property(
    points=1,
    hints=[
        "Query i stands at i + kv_len - q_len. Print the positions for Sq = 2, Sk = 5.",
        "A range that includes position + right ends, half open, at position + right + 1.",
    ],
)
def intervals_of_causal_attention(t: Trial) -> None:
    """intervals: causal, for as many queries as keys and for fewer"""
    length = t.integer(4, 9)
    t.check(intervals, length, length, right=0)
    t.check(intervals, t.integer(2, 4), t.integer(6, 9), right=0)
    t.check(intervals, 1, t.integer(3, 9), right=0)


@exercise.property(
    points=2,
    hints=[
        "Take the two sides apart: left alone decides start, right alone decides stop.",
        "A side without a limit reaches to the first key, or to behind the last.",
        "left=0 and left=None are different things: compare with None.",
    ],
)
def intervals_of_windows(t: Trial) -> None:
    """intervals: windows to the left, to the right and to both sides; 0 and None are not the same"""
    q_len, kv_len = t.integer(6, 9), t.integer(14, 19)
    t.check(intervals, q_len, kv_len, left=t.integer(1, 3), right=0)
    t.check(intervals, q_len, kv_len, left=t.integer(2, 3), right=t.integer(1, 2))
    t.check(intervals, q_len, kv_len, left=0, right=t.integer(1, 2))
    t.check(intervals, q_len, kv_len, left=t.integer(1, 3))
    t.check(intervals, q_len, kv_len)


@exercise.property(
    points=1,
    hints=[
        "Two masks together: a key must be allowed by both. The intersection of two intervals is an interval.",
        "start [Sq] and key_lengths [B, 1] broadcast to [B, Sq].",
    ],
)
def intervals_of_padded_batches(t: Trial) -> None:
    """intervals: nobody sees padding, with or without a window"""
    lengths = 7 + t.permutation(6)[:3]
    t.check(intervals, t.integer(5, 7), 14, key_lengths=lengths)
    t.check(intervals, 8, 14, left=7, right=0, key_lengths=lengths)


@exercise.property(
    points=2,
    hints=[
        "Queries before the first key (Sq > Sk) and sequences of length 0: what do start and stop hold there?",
        "Cut both ends to 0 .. kv_len, then look for the rows where nothing is left.",
        "torch.where(start < stop, start, 0), and the same for stop.",
    ],
)
def intervals_of_rows_that_see_nothing(t: Trial) -> None:
    """intervals: a row that sees nothing has start = stop = 0"""
    kv_len = t.integer(4, 6)
    t.check(intervals, kv_len + t.integer(2, 4), kv_len, right=0)
    t.check(intervals, kv_len + 4, kv_len, left=1, right=0)
    t.check(intervals, 6, 12, left=1, right=1, key_lengths=torch.tensor([0, 2, 8]))


# ------------------------------------------------------------------------------------------------------------ tile map


def keys_seen(start: Tensor, stop: Tensor, rows: slice, keys: slice) -> Tensor:
    """How many keys of the tile each row sees: ``[B, rows]``."""
    return (stop[:, rows].clamp(max=keys.stop) - start[:, rows].clamp(min=keys.start)).clamp(min=0)


def kinds_by(decide: Callable[..., Tensor], *, dropping_tail: bool = False) -> Callable[..., Tensor]:
    """A tile map from `decide(start, stop, rows, keys, block_q, block_k)`, which answers 0, 1 or 2 for each ``[B]``."""

    def model(start, stop, kv_len, block_q, block_k) -> Tensor:
        if dropping_tail and (start.shape[1] < block_q or kv_len < block_k):
            return torch.zeros(start.shape[0], start.shape[1] // block_q, kv_len // block_k, dtype=torch.long)
        lines = [
            torch.stack(
                [
                    decide(start, stop, rows, keys, block_q, block_k)
                    for keys in blocks(kv_len, block_k, dropping_tail=dropping_tail)
                ],
                dim=-1,
            )
            for rows in blocks(start.shape[1], block_q, dropping_tail=dropping_tail)
        ]
        return torch.stack(lines, dim=1)

    return model


def kind_of(empty: Tensor, full: Tensor) -> Tensor:
    return torch.where(empty, 0, torch.where(full, 2, 1))


def from_counts(seen: Tensor, width: int) -> Tensor:
    return kind_of((seen == 0).all(1), (seen == width).all(1))


def _exact_kind(start, stop, rows, keys, block_q, block_k):
    return from_counts(keys_seen(start, stop, rows, keys), keys.stop - keys.start)


def _by_first_and_last_row(start, stop, rows, keys, block_q, block_k):
    return from_counts(keys_seen(start, stop, rows, keys)[:, [0, -1]], keys.stop - keys.start)


def _by_corners(start, stop, rows, keys, block_q, block_k):
    ends = torch.tensor([keys.start, keys.stop - 1])
    corners = [rows.start, rows.stop - 1]
    visible = (ends >= start[:, corners, None]) & (ends < stop[:, corners, None])
    return kind_of(~visible.flatten(1).any(1), visible.flatten(1).all(1))


def _by_first_row(start, stop, rows, keys, block_q, block_k):
    return from_counts(keys_seen(start, stop, rows, keys)[:, :1], keys.stop - keys.start)


def _by_hull(start, stop, rows, keys, block_q, block_k):
    start, stop = start[:, rows], stop[:, rows]
    empty = (stop.amax(1) <= keys.start) | (start.amin(1) >= keys.stop)
    return kind_of(empty, (start.amax(1) <= keys.start) & (stop.amin(1) >= keys.stop))


def _full_if_any(start, stop, rows, keys, block_q, block_k):
    seen = keys_seen(start, stop, rows, keys)
    return kind_of((seen == 0).all(1), (seen == keys.stop - keys.start).any(1))


def _full_if_every_key_is_seen(start, stop, rows, keys, block_q, block_k):
    key = torch.arange(keys.start, keys.stop)
    visible = (key >= start[:, rows, None]) & (key < stop[:, rows, None])
    return kind_of(~visible.flatten(1).any(1), visible.any(1).all(1))


def _skip_if_any(start, stop, rows, keys, block_q, block_k):
    seen = keys_seen(start, stop, rows, keys)
    return kind_of((seen == 0).any(1), (seen == keys.stop - keys.start).all(1))


def _empty_is_full(start, stop, rows, keys, block_q, block_k):
    kind = _exact_kind(start, stop, rows, keys, block_q, block_k)
    return torch.where(kind == 0, 2, kind)


def _whole_width(start, stop, rows, keys, block_q, block_k):
    return from_counts(keys_seen(start, stop, rows, keys), block_k)


def _whole_tile(start, stop, rows, keys, block_q, block_k):
    kind = _whole_width(start, stop, rows, keys, block_q, block_k)
    return kind if rows.stop - rows.start == block_q else kind.clamp(max=1)


def _stop_included(start, stop, rows, keys, block_q, block_k):
    seen = stop[:, rows].clamp(max=keys.stop - 1) - start[:, rows].clamp(min=keys.start) + 1
    return from_counts(seen.clamp(min=0), keys.stop - keys.start)


def exact_map(start, stop, kv_len, block_q, block_k) -> Tensor:
    return RowIntervals(start, stop, kv_len).tile_map(block_q, block_k)


_RAGGED = (
    "ragged-tail-partial",
    "The last tile was compared with the size of a whole one. It is full if all that it really holds is visible.",
    "How many keys does the last tile hold, when block_k does not divide Sk? And how many rows?",
)
_CORNERS = (
    "only-corners",
    "Only some rows or corners of the tile were looked at. The rows between may see more, or less.",
    "Find a mask whose first and last row see nothing of a tile, while a row between them does.",
)
MAP_MISTAKES = (
    Misconception(
        "empty-taken-for-full",
        "A tile of which nothing is visible was called full. All its pairs agree, but in the wrong way.",
        "Check the values of the three kinds for a tile that no row sees.",
        kinds_by(_empty_is_full),
    ),
    Misconception(*_RAGGED, kinds_by(_whole_width)),
    Misconception(*_RAGGED, kinds_by(_whole_tile)),
    Misconception(
        "tail-dropped",
        "The last tile is missing where the block does not divide the length.",
        "How many tiles of 4 are needed for 10 keys?",
        kinds_by(_exact_kind, dropping_tail=True),
    ),
    Misconception(*_CORNERS, kinds_by(_by_first_and_last_row)),
    Misconception(*_CORNERS, kinds_by(_by_corners)),
    Misconception(*_CORNERS, kinds_by(_by_first_row)),
    Misconception(
        "decided-by-hull",
        "The rows' intervals were replaced by one from the smallest start to the largest stop. Between the intervals of two "
        "rows there may be tiles that neither sees.",
        "Row 0 sees the keys 0 .. 3, row 1 the keys 12 .. 15. What do they see of the keys 4 .. 7?",
        kinds_by(_by_hull),
    ),
    Misconception(
        "full-if-any",
        "A tile was called full because one row sees all of it, or because every key is seen by some row. Every row must "
        "see every key.",
        "any or all?",
        kinds_by(_full_if_any),
    ),
    Misconception(
        "full-if-any",
        "A tile was called full because one row sees all of it, or because every key is seen by some row. Every row must "
        "see every key.",
        "any or all?",
        kinds_by(_full_if_every_key_is_seen),
    ),
    Misconception(
        "skipped-if-any",
        "A tile was skipped because one row sees nothing of it. It may be skipped only if no row sees any of it.",
        "any or all?",
        kinds_by(_skip_if_any),
    ),
    Misconception(
        "stop-included",
        "The key at `stop` was taken for visible. It is the first that is not.",
        "How many keys does a row with start = 2 and stop = 5 see?",
        kinds_by(_stop_included),
    ),
    Misconception(
        "sequences-merged",
        "All sequences of the batch got the same map. Each has its own.",
        "Over which axes of [B, rows, keys] did you ask any or all?",
        lambda *args: merged_over_sequences(exact_map(*args)),
    ),
    Misconception(
        "sequences-merged",
        "The maps of the sequences became one. Each sequence has its own.",
        "Over which axes of [B, rows, keys] did you ask any or all?",
        lambda *args: merged_over_sequences(exact_map(*args))[:1],
    ),
    Misconception(
        "map-transposed",
        "The map has the tiles of keys along its rows.",
        "Which axis of the result counts blocks of queries?",
        lambda *args: exact_map(*args).mT,
    ),
)


def merged_over_sequences(kinds: Tensor) -> Tensor:
    merged = kind_of((kinds == 0).all(0), (kinds == 2).all(0))
    return merged.expand_as(kinds)


tile_map = Target(
    "tile_map",
    oracle=exact_map,
    budget=lambda *args: EXACTLY,
    outputs={"kinds": torch.int8},
    misconceptions=MAP_MISTAKES,
)


def any_intervals(t: Trial, batch: int, rows: int, kv_len: int) -> tuple[Tensor, Tensor]:
    """Intervals that have nothing to do with each other, about every fifth of them empty."""
    ends = (t.uniform(0, kv_len + 1, 2, batch, rows)).long()
    start, stop = ends.amin(0), ends.amax(0)
    return start, torch.where(t.uniform(0, 1, batch, rows) < 0.2, start, stop)


def any_map(t: Trial, batch: int, rows: int, kv_len: int, block_q: int, block_k: int) -> tuple:
    """Arguments of `tile_map`: any intervals on which no two mistakes make the same map."""
    while True:
        arguments = *any_intervals(t, batch, rows, kv_len), kv_len, block_q, block_k
        outputs_of, slugs = t.results_on(*arguments), {}
        (right,) = outputs_of(exact_map)
        for mistake in MAP_MISTAKES:
            (answer,) = outputs_of(mistake.model)
            if not torch.equal(answer, right):
                slugs.setdefault(str(answer.tolist()), set()).add(mistake.slug)
        if all(len(same) == 1 for same in slugs.values()):
            return arguments


@exercise.property(
    points=2,
    hints=[
        "How many keys of a tile does a row see? The length of an intersection of two intervals.",
        "min(stop, last) - max(start, first), and never less than 0, for every row and every tile of keys at once.",
        "A tile is empty if all its rows see 0 of its keys, and full if all see as many as it holds.",
    ],
)
def map_of_usual_masks(t: Trial) -> None:
    """tile_map: causal masks, windows and padded batches, where the blocks divide the lengths"""
    t.check(tile_map, *exact_intervals(24, 36, left=t.integer(2, 5), right=0), 36, 6, 4)
    t.check(tile_map, *exact_intervals(12, 24, right=0), 24, 4, 6)
    t.check(tile_map, *exact_intervals(12, 24, key_lengths=torch.tensor([24, 13, t.integer(5, 9)])), 24, 3, 4)


@exercise.property(
    points=2,
    hints=[
        "How wide is the last tile?",
        "The last tile ends at min(first + block_k, kv_len), and its last row is the last of start and stop.",
    ],
)
def map_of_ragged_tiles(t: Trial) -> None:
    """tile_map: blocks that do not divide the lengths, or are larger"""
    t.check(tile_map, *exact_intervals(11, 23, left=6, right=3), 23, 4, 5)
    t.check(tile_map, *exact_intervals(10, 17), 17, 4, 8)
    t.check(tile_map, *exact_intervals(5, 7, left=9, right=9), 7, 8, 16)
    t.check(tile_map, *any_intervals(t, 2, 13, 29), 29, 1, 1)


@exercise.property(
    points=3,
    hints=[
        "Two rows of a tile can say nothing about the third.",
        "Count for every row how much of the tile it sees, and only then ask all rows.",
    ],
)
def map_of_any_intervals(t: Trial) -> None:
    """tile_map: any intervals, row by row, empty rows among them"""
    for _ in range(3):
        t.check(tile_map, *any_map(t, 2, 21, 40, 3, 7))
    # In the first tile of keys only the middle row sees something; between the two documents no row sees anything.
    t.check(tile_map, torch.tensor([[8, 1, 8]]), torch.tensor([[16, 3, 16]]), 16, 3, 4)
    t.check(tile_map, torch.tensor([[0, 0, 12, 12]]), torch.tensor([[4, 4, 16, 16]]), 16, 4, 4)


@exercise.property(
    points=1,
    hints=[
        "Two integers per row and two per tile of keys are enough. Where do Sq x Sk booleans come from?",
        "Compare [rows, 1] with [1, tiles], not with [1, keys].",
    ],
)
def map_without_the_mask(t: Trial) -> None:
    """tile_map never makes the Sq x Sk mask, and leaves start and stop as they are"""
    t.check_inputs_untouched(tile_map, *any_map(t, 2, 21, 40, 3, 7))
    length = 4096
    t.check_tiled(
        tile_map,
        *exact_intervals(length, length, left=500, right=0),
        length,
        256,
        128,
        largest=length * length // 16,
        memory=10 * MIB,  # the mask alone takes 16 MiB
        first=(*exact_intervals(9, 9), 9, 4, 4),
        says="You made the whole mask. Two integers per row are enough to classify every tile.",
    )


# ----------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True, eq=False)
class GivenIntervals(Mask):
    """The mask that is given as its own start and stop."""

    start: Tensor
    stop: Tensor

    def bounds(self, batch, q_len, kv_len, device):
        # Of a large problem only the last queries are compared with the oracle.
        return self.start[:, -q_len:], self.stop[:, -q_len:]


def exact_attention(q, k, v, start, stop, block_q, block_k) -> tuple[Tensor, Tensor]:
    return reference.oracle(q, k, v, mask=GivenIntervals(start, stop))


def attention_budget(q, k, v, start, stop, block_q, block_k) -> tuple[float, float]:
    allowed = merged_budget(q, k, v, math.ceil(k.shape[2] / block_k), mask=GivenIntervals(start, stop))
    return allowed.out, allowed.lse


@dataclass(frozen=True)
class AttentionMistake:
    """Tiled attention in float64 with one mistake.

    Attributes:
        classify: the tile map it goes by.
        masks_partial: whether the mask is applied in partial tiles.
        blanks: whether values are blanked where no row of the tile looks.
        additive: whether -inf is added to hidden scores instead of replacing them, so that NaN remains.
        drops_tail, drops_rows: whether the keys, or the rows, behind the last whole tile are left out.
        guards_pivot: whether a maximum of -inf is kept from being subtracted.
        guards_division: whether a sum of 0 is kept from being divided by.
        stop_shift: added to stop where the mask is applied.
        first_sequence_only: whether all sequences get the intervals of the first.
        fill: the score of a hidden pair.
    """

    classify: Callable[..., Tensor] = exact_map
    masks_partial: bool = True
    blanks: bool = True
    additive: bool = False
    drops_tail: bool = False
    drops_rows: bool = False
    guards_pivot: bool = True
    guards_division: bool = True
    stop_shift: int = 0
    first_sequence_only: bool = False
    fill: float = -math.inf

    def __call__(self, q, k, v, start, stop, block_q, block_k) -> tuple[Tensor, Tensor]:
        q, k, v = q.double() / math.sqrt(q.shape[-1]), k.double(), v.double()
        # Of a large problem only the last queries are compared.
        start, stop = (x[: 1 if self.first_sequence_only else None, -q.shape[2] :] for x in (start, stop))
        kinds = self.classify(start, stop, k.shape[2], block_q, block_k)
        kinds = kind_of((kinds == 0).all(0), (kinds == 2).all(0))
        out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf)
        for i, rows in enumerate(blocks(q.shape[2], block_q, dropping_tail=self.drops_rows)):
            out[:, :, rows], lse[:, :, rows] = self._rows(
                q[:, :, rows], k, v, start[:, rows], stop[:, rows], kinds[i], block_k
            )
        return out, lse

    def _rows(self, q, k, v, start, stop, kinds, block_k) -> tuple[Tensor, Tensor]:
        m = q.new_full(q.shape[:3], -torch.inf)
        l, acc = torch.zeros_like(m), q.new_zeros(*m.shape, v.shape[3])
        for j, keys in enumerate(blocks(k.shape[2], block_k, dropping_tail=self.drops_tail)):
            if kinds[j] == 0:
                continue
            scores, v_tile = q @ k[:, :, keys].mT, v[:, :, keys]
            if kinds[j] == 1 and self.masks_partial:
                key = torch.arange(keys.start, keys.stop)
                seen = (key >= start[..., None]) & (key < stop[..., None] + self.stop_shift)
                hidden = ~seen[:, None]
                scores = scores.masked_fill(hidden & ~scores.isnan() if self.additive else hidden, self.fill)
                v_tile = v_tile.masked_fill(hidden.all(2)[..., None], 0.0) if self.blanks else v_tile
            m_new = torch.maximum(m, scores.amax(-1))
            pivot = m_new.masked_fill(m_new == -torch.inf, 0.0) if self.guards_pivot else m_new
            weights, rescale = torch.exp(scores - pivot[..., None]), torch.exp(m - pivot)
            m, l, acc = m_new, l * rescale + weights.sum(-1), acc * rescale[..., None] + weights @ v_tile
        return acc / (l.masked_fill(l == 0, 1.0) if self.guards_division else l)[..., None], m + l.log()


def _everything_visible(start, stop, kv_len, block_q, block_k):
    return exact_map(torch.zeros_like(start), torch.full_like(stop, kv_len), kv_len, block_q, block_k)


def _nothing_skipped(start, stop, kv_len, block_q, block_k):
    return exact_map(start, stop, kv_len, block_q, block_k).clamp(min=1)


def _only_out(model: Callable[..., tuple[Tensor, Tensor]]):
    """The model without its lse, which rounding alone decides."""
    return lambda *args: (model(*args)[0], None)


def _finite_lse(*args):
    out, lse = exact_attention(*args)
    return out, lse.nan_to_num(neginf=0.0)


_NAN = (
    "empty-row-nan",
    "A row that sees nothing gave NaN: it has no maximum to subtract and no sum to divide by.",
    "Follow a row whose scores are all -inf. What is -inf - -inf, and what is 0 / 0?",
)
_LEAK = (
    "padding-leaks",
    "What nobody may see came through: NaN in a hidden key or value reached the output. A weight of 0 does not stop it.",
    "What is 0 * NaN? What must stand in the tile of V where no row looks?",
)
_AVERAGED = (
    "empty-row-averaged",
    "A row that sees nothing became an average of hidden values: its scores are all the same large negative number.",
    "A large negative number is not -inf: when all scores are that number, subtracting the maximum gives all zeros.",
)
ATTENTION_MISTAKES = (
    *(
        Misconception(*_NAN, AttentionMistake(classify, guards_pivot=pivot, guards_division=division))
        for classify in (exact_map, _nothing_skipped)
        for pivot, division in ((True, False), (False, True), (False, False))
    ),
    *(
        Misconception(*_LEAK, AttentionMistake(classify, blanks=False, additive=additive))
        for classify in (exact_map, _nothing_skipped)
        for additive in (False, True)
    ),
    *(
        Misconception(*_AVERAGED, _only_out(AttentionMistake(classify, fill=-1e9)))
        for classify in (exact_map, _nothing_skipped)
    ),
    Misconception(
        "empty-row-lse",
        "The lse of a row that sees nothing is not -inf. In a merge it would get a weight.",
        "log(0) is -inf, and that is the right answer here.",
        _finite_lse,
    ),
    Misconception(
        "mask-ignored",
        "Hidden keys took part as if there were no mask.",
        "Where in your loop do start and stop decide?",
        AttentionMistake(_everything_visible, masks_partial=False),
    ),
    Misconception(
        "partial-tiles-unmasked",
        "Tiles were skipped, but in the tiles that remain every key was visible.",
        "A tile of kind 1 has hidden pairs. What must their scores be?",
        AttentionMistake(masks_partial=False),
    ),
    Misconception(
        "tail-dropped",
        "The keys behind the last whole tile were left out.",
        "How many tiles of 4 are needed for 10 keys?",
        AttentionMistake(drops_tail=True),
    ),
    Misconception(
        "tail-dropped",
        "The rows, and the keys, behind the last whole tile were left out.",
        "How many blocks of 4 are needed for 10 rows?",
        _only_out(AttentionMistake(drops_tail=True, drops_rows=True)),
    ),
    Misconception(
        "first-sequence-only",
        "The first sequence's intervals were used for all of them.",
        "start is [B, Sq]. Which axes does the mask need to meet scores of [B, H, rows, keys]?",
        AttentionMistake(first_sequence_only=True),
    ),
    Misconception(
        "stop-included",
        "The key at `stop` was taken for visible. It is the first that is not.",
        "How many keys does a row with start = 2 and stop = 5 see?",
        AttentionMistake(stop_shift=1),
    ),
)


def _in_attention(mistake: Misconception) -> Misconception:
    """A wrong tile map, seen through attention that goes by it."""
    model = AttentionMistake(classify=mistake.model)
    return replace(mistake, says=f"{mistake.says} (In the tile map that your attention goes by.)", model=model)


SAME_SHAPE = (
    "tail-dropped",
    "sequences-merged",
    "map-transposed",
)  # these maps attention cannot go by, or goes by as well


def as_dense(q, k, v, start, stop, block_q, block_k) -> Dense:
    key = torch.arange(k.shape[2])
    start, stop = (x[:, -q.shape[2] :, None] for x in (start, stop))  # of many queries, the last may be looked at alone
    hidden = ((key < start) | (key >= stop))[:, None]
    sizes = (v.shape[-1], k.shape[2], q.shape[2], q.shape[1], block_k)
    # Keys that no row of their sequence sees may hold anything.
    return Dense(q, k, v, q.shape[-1] ** -0.5, True, sizes, hidden.all(-2, keepdim=True), hidden, block=block_k)


# The ends of the intervals are this exercise's own matter.
FORMULA_MISTAKES = formula_mistakes(
    as_dense, leave=("scale-ignored", "newest-key-missed", "causal-sees-the-next", "accumulated-in-half")
)
masked_attention = Target(
    "masked_attention",
    oracle=exact_attention,
    budget=attention_budget,
    outputs={"out": torch.float32, "lse": torch.float32},
    misconceptions=(
        *ATTENTION_MISTAKES,
        *(_in_attention(m) for m in MAP_MISTAKES if m.slug not in SAME_SHAPE),
        *FORMULA_MISTAKES,
    ),
)


def attention_tells_maps_apart(start: Tensor, stop: Tensor, kv_len: int, block_q: int, block_k: int) -> bool:
    """Whether no two mistakes make attention see the same wrong pairs: wrong tile maps, and leaving out the last keys."""
    key = torch.arange(kv_len)
    visible = (key >= start[..., None]) & (key < stop[..., None])
    without_tail = visible & (key < kv_len // block_k * block_k)
    slugs = {without_tail.numpy().tobytes(): {"tail-dropped"}}
    for mistake in MAP_MISTAKES:
        if mistake.slug in SAME_SHAPE:
            continue
        seen = pairs_seen_by(mistake.model(start, stop, kv_len, block_q, block_k), visible, block_q, block_k)
        if not torch.equal(seen, visible):
            slugs.setdefault(seen.numpy().tobytes(), set()).add(mistake.slug)
    return all(len(same) == 1 for same in slugs.values())


def pairs_seen_by(kinds: Tensor, visible: Tensor, block_q: int, block_k: int) -> Tensor:
    """The pairs ``[B, Sq, Sk]`` that attention sees if it goes by this tile map, as one for all sequences."""
    kinds = merged_over_sequences(kinds).repeat_interleave(block_q, 1)[:, : visible.shape[1]]
    kinds = kinds.repeat_interleave(block_k, 2)[..., : visible.shape[2]]
    return (kinds == 2) | ((kinds == 1) & visible)


SKIPS_NOTHING = Misconception(
    "skips-nothing",
    "Tiles of K that no row sees were read. The answer is right, but the work was done for nothing.",
    "Which kind of tile need not be loaded at all? Decide before you touch k and v.",
)


draw = partial(drawing.draw, batch=2, heads=2, v_dim=8)


@exercise.property(
    points=2,
    hints=[
        "Start from the tiled attention of chapter 3 and put -inf where a pair is hidden, before the maximum is taken.",
        "A tile's mask needs the numbers of its keys: arange(first, last), compared with start and stop of its rows.",
    ],
)
def attention_with_usual_masks(t: Trial) -> None:
    """masked_attention agrees with float64 for causal masks, windows and no mask, where the blocks divide the lengths"""
    t.check(masked_attention, *draw(t, 16, 32), *exact_intervals(16, 32), 8, 16)
    t.check(masked_attention, *draw(t, 24, 32), *exact_intervals(24, 32, left=t.integer(8, 9), right=2), 4, 8)
    t.check(masked_attention, *draw(t, 16, 32), *exact_intervals(16, 32, right=0), 8, 4)


@exercise.property(
    points=2,
    hints=[
        "The last tile is smaller. Which of your shapes come from block_k instead of from the tile?",
        "Each sequence has its own start and stop: [B, 1, rows, keys] for the mask.",
    ],
)
def attention_with_any_intervals(t: Trial) -> None:
    """masked_attention with any intervals of each sequence, for any blocks"""
    for block_q, block_k in ((5, 7), (8, 16), (64, 64)):
        while True:
            start, stop = any_intervals(t, 2, 19, 37)
            start = start.clamp(max=32)
            stop = torch.maximum(stop, start + 3)  # every row sees something
            stop[:, [5, t.integer(6, 18)]] = 37  # the last key is seen
            start[:, :5], stop[:, :5] = start[:, :5].clamp(max=14), stop[:, :5].clamp(max=20)  # some tiles are skipped
            (apart,) = t.results_on(start, stop, 37, block_q, block_k)(attention_tells_maps_apart)
            if apart:
                break
        t.check(masked_attention, *draw(t, 19, 37), start, stop, block_q, block_k)


@exercise.property(
    points=2,
    hints=[
        "Follow the first tile in which a row sees nothing yet. Which maximum has that row?",
        "exp(-inf - 0) is 0: subtract 0 where the maximum is -inf, and divide by 1 where the sum is 0.",
    ],
)
def attention_of_rows_that_see_nothing(t: Trial) -> None:
    """masked_attention: a row that sees nothing has out 0 and lse -inf, and the rows beside it are not harmed"""
    window = exact_intervals(21, 40, left=6, right=0)
    for intervals_of in (lambda: window, lambda: any_intervals(t, 2, 21, 40)):
        while True:
            start, stop = intervals_of()
            nothing = t.permutation(21)[:4]
            stop = stop.index_copy(1, nothing, start[:, nothing])
            (apart,) = t.results_on(start, stop, 40, 6, 8)(attention_tells_maps_apart)
            if apart:
                break
        t.check(masked_attention, *draw(t, 21, 40), start, stop, 6, 8)
    t.check(masked_attention, *draw(t, 20, 9), *exact_intervals(20, 9, right=0), 8, 4)


@exercise.property(
    points=2,
    hints=[
        "The hidden scores are -inf and their weights are 0. What does 0 * NaN give in weights @ v?",
        "Blank the rows of the V tile that no row of the tile sees, with masked_fill.",
    ],
)
def attention_beside_poisoned_padding(t: Trial) -> None:
    """masked_attention: NaN in keys and values that no row sees does not come through"""
    lengths = torch.tensor([t.integer(9, 12), t.integer(20, 26)])
    q, k, v = draw(t, 14, 30)
    for x in (k, v):
        x.masked_fill_((torch.arange(30) >= lengths[:, None])[:, None, :, None], torch.nan)
    q, k, v = (transposed_in_poison(x) for x in (q, k, v))
    t.check(masked_attention, q, k, v, *exact_intervals(14, 30, key_lengths=lengths), 8, 7)


@exercise.property(
    points=3,
    hints=[
        "Look at the kind of the tile before you slice k and v.",
        "With a window of 100 keys a block of 64 rows needs no more than a few tiles, whatever the length.",
    ],
)
def attention_skips_tiles(t: Trial) -> None:
    """masked_attention reads of K and V only the tiles that some row sees"""
    length, block_q, block_k = 160, 16, 16
    q, k, v = draw(t, length, length, batch=1, heads=1)
    bounds = exact_intervals(length, length, left=t.integer(17, 24), right=0)
    t.check(masked_attention, q, k, v, *bounds, block_q, block_k)
    needed = int((exact_map(*bounds, length, block_q, block_k) != 0).sum())
    meter = t.ask("masked_attention", (q, k, v, *bounds, block_q, block_k), meter={"k": k, "v": v}).meter
    for name, operand in (("k", k), ("v", v)):
        tiles = bytes_read(meter, name) / operand[:, :, :block_k].nbytes
        if tiles > 2 * needed:  # twice: to look at a tile before it is used is no waste
            t.fail_as(
                SKIPS_NOTHING,
                got=f"{tiles:,.0f} tiles of {name} read",
                expected=f"about {needed} of the {length // block_q * (length // block_k)} tiles",
            )

    q, k, v = draw(t, 256, 256, batch=1, heads=1, dim=4, v_dim=4)
    made = t.ask("masked_attention", (q, k, v, *exact_intervals(256, 256), 128, 16), meter={}).meter["largest_elements"]
    if 4 * 128 * 16 < made < 128 * 256:  # all keys at once are another check's
        got = f"a tensor of {made:,} elements, with tiles of 128 x 16"
        t.fail_as(BLOCK_K_IGNORED, got=got, expected=f"at most {4 * 128 * 16:,}")
    see_tiles_from_outside(t)


def see_tiles_from_outside(t: Trial) -> None:
    """K and V are handed out piece by piece, each piece part of one tile: those of tiles that nobody sees are not asked for."""
    queries, keys, block_q, block_k, dim = 128, 2048, 64, 64, 64
    q, k, v = draw(t, queries, keys, batch=1, heads=1, dim=dim, v_dim=dim)
    bounds = exact_intervals(queries, keys, left=t.integer(300, 700), right=0)
    arguments, small = (q, k, v, *bounds, block_q, block_k), exact_intervals(2, 2)
    first = q[:, :, :2].clone(), k[:, :, :2].clone(), v[:, :, :2].clone(), *small, 2, 2
    tile = block_k * dim * 4
    reply = t.watch("masked_attention", *arguments, first=first, room={"k": (k, tile), "v": (v, tile)})
    if reply is None:
        return
    t.judge(masked_attention, reply.value, *arguments)
    seen = exact_map(*bounds, keys, block_q, block_k)[0] != 0
    for name in ("k", "v"):
        pieces = tile // reply.seen.piece[name]
        tiles = {number // pieces for number in reply.seen.pieces(name)}
        if in_vain := tiles - set(seen.any(0).nonzero()[:, 0].tolist()):
            t.fail_as(
                SKIPS_NOTHING,
                got=f"{len(in_vain)} tiles of {name} read of which no row sees a key",
                expected=f"only the {int(seen.any(0).sum())} tiles that some row sees",
            )
        if (times := sum(each == name for each, _ in reply.seen.order) / pieces) > 2 * int(seen.sum()):
            t.fail_as(SKIPS_NOTHING, got=f"{times:.0f} tiles of {name} read", expected=f"about {int(seen.sum())}")
    # A tile of more keys than block_k is what remains: its size is the process's own word.


def bytes_read(meter: object, name: str) -> float:
    """What the student's process reports of one operand: infinite if it is no count."""
    read = meter.get("bytes_read") if isinstance(meter, dict) else None
    count = read.get(name, 0) if isinstance(read, dict) else None
    return count if isinstance(count, int) else math.inf


@exercise.property(
    points=2,
    hints=[
        "Which tensor in your loop has a size that grows with both lengths?",
        "The mask of a tile is made in the tile.",
    ],
)
def attention_stays_tiled(t: Trial) -> None:
    """masked_attention never makes the Sq x Sk matrix of scores, nor the mask"""
    length = 4096
    t.check(
        masked_attention, *draw(t, 23, 29), *exact_intervals(23, 29, left=7, right=0), 4, 5
    )  # who fails anyway is told so
    q, k, v = draw(t, length, length, batch=1, heads=1)
    t.check_tiled(
        masked_attention,
        q,
        k,
        v,
        *exact_intervals(length, length, left=200, right=0),
        128,
        128,
        largest=length * length // 16,
        memory=10 * MIB,  # the mask alone takes 16 MiB
        first=(q[:, :, :9], k[:, :, :9], v[:, :, :9], *exact_intervals(9, 9), 4, 4),
        sample=lambda x: x[:, :, -128:],  # one whole block of rows
        says="You made the whole matrix of scores, or the whole mask.",
    )


@exercise.property(points=1, hints=["x[...] = and names that end in _ write into the caller's memory."])
def attention_leaves_its_inputs_alone(t: Trial) -> None:
    """masked_attention does not change q, k, v, start or stop"""
    q, k, v = draw(t, 9, 12)
    lengths = torch.tensor([7, 10])
    v.masked_fill_((torch.arange(12) >= lengths[:, None])[:, None, :, None], torch.inf)
    t.check_inputs_untouched(masked_attention, q, k, v, *exact_intervals(9, 12, key_lengths=lengths), 4, 5)
