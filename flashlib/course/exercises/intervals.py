"""Masks as intervals, one for each row, as ex04 writes them and ex08 puts them into a kernel, and the mistakes that people make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashlib.course.grader.exercise import Misconception
from flashlib.masks import KeyLengths, Unmasked, Window


def exact_intervals(q_len, kv_len, left=None, right=None, key_lengths=None) -> tuple[Tensor, Tensor]:
    padding = Unmasked() if key_lengths is None else KeyLengths(key_lengths)
    batch = 1 if key_lengths is None else len(key_lengths)
    seen = (Window(left, right) & padding).intervals(batch, q_len, kv_len)
    return seen.start.expand(batch, q_len), seen.stop.expand(batch, q_len)


@dataclass(frozen=True)
class IntervalMistake:
    """`intervals` with one mistake: what is added to an end, or a step that is left out."""

    start_shift: int = 0
    stop_shift: int = 0
    top_left: bool = False
    zero_is_none: bool = False
    none_is_zero: bool = False
    keep_lengths: bool = True
    align_to_lengths: bool = False
    clamp: bool = True
    normalize: bool = True

    def __call__(self, q_len, kv_len, left=None, right=None, key_lengths=None) -> tuple[Tensor, Tensor]:
        if self.zero_is_none:
            left, right = left or None, right or None
        if self.none_is_zero:
            left, right = left or 0, right or 0
        lengths = torch.tensor([kv_len]) if key_lengths is None else key_lengths
        aligned = lengths[:, None] if self.align_to_lengths else torch.full((len(lengths), 1), kv_len)
        position = torch.arange(q_len) + (0 if self.top_left else aligned - q_len)
        position = position.expand(len(lengths), q_len)
        start = torch.zeros_like(position) if left is None else position - left + self.start_shift
        stop = torch.full_like(position, kv_len) if right is None else position + right + 1 + self.stop_shift
        if self.keep_lengths:
            stop = torch.minimum(stop, lengths[:, None])
        if self.clamp:
            start, stop = start.clamp(0, kv_len), stop.clamp(0, kv_len)
        if self.normalize:
            start, stop = torch.where(start < stop, start, 0), torch.where(start < stop, stop, 0)
        return start, stop


WINDOW_MISTAKES = (
    Misconception(
        "causal-top-left",
        "Query 0 was placed at key 0. With Sq != Sk the last query must stand at the last key.",
        "The queries are the last Sq positions of a sequence of Sk. At which position does query 0 stand?",
        IntervalMistake(top_left=True),
    ),
    Misconception(
        "right-end-excluded",
        "Each row stops one key early: stop is already the first key that is not seen, and position + right is seen.",
        "With right=0 a query sees itself. What must stop be then?",
        IntervalMistake(stop_shift=-1),
    ),
    Misconception(
        "right-end-too-far",
        "Each row stops one key late: it sees position + right + 1.",
        "Write down the row of query 0 with right=0 and Sq = Sk = 3.",
        IntervalMistake(stop_shift=1),
    ),
    Misconception(
        "left-end-excluded",
        "The window is one key too narrow on the left: position - left is seen.",
        "left counts the keys before the query, without the query itself. How wide is the window of left=2, right=0?",
        IntervalMistake(start_shift=1),
    ),
    Misconception(
        "left-end-too-far",
        "The window is one key too wide on the left.",
        "left counts the keys before the query, without the query itself. How wide is the window of left=2, right=0?",
        IntervalMistake(start_shift=-1),
    ),
    Misconception(
        "zero-taken-for-none",
        "left=0 or right=0 was treated as no limit. 0 is a limit: no key on that side.",
        "In Python, what does `if right:` do when right is 0?",
        IntervalMistake(zero_is_none=True),
    ),
    Misconception(
        "none-taken-for-zero",
        "left=None or right=None was treated as 0. None means that there is no limit on that side.",
        "Which start has a row without a limit on the left, and which stop one without a limit on the right?",
        IntervalMistake(none_is_zero=True),
    ),
)
INTERVAL_MISTAKES = (
    *WINDOW_MISTAKES,
    Misconception(
        "key-lengths-ignored",
        "Padding is visible: the key lengths made no difference.",
        "No row of sequence b sees a key from key_lengths[b] on. Which end does that limit?",
        IntervalMistake(keep_lengths=False),
    ),
    Misconception(
        "aligned-to-key-lengths",
        "The queries were placed by the length of each sequence. The padding does not move them: the last query stands "
        "at position kv_len - 1.",
        "Which of the two numbers does the docstring use for the position of a query?",
        IntervalMistake(align_to_lengths=True),
    ),
    Misconception(
        "empty-row-inverted",
        "A row that sees nothing has start > stop, or an interval somewhere among the keys. Its length, stop - start, must "
        "be 0, and the contract says where it lies.",
        "Which rows have start >= stop after both ends were cut to size? What should they hold?",
        IntervalMistake(normalize=False),
    ),
    Misconception(
        "not-clamped",
        "An interval reaches beyond the keys: start or stop lies outside 0 .. kv_len.",
        "Which keys exist? Cut both ends to that range.",
        IntervalMistake(clamp=False),
    ),
    Misconception(
        "not-clamped",
        "An interval reaches beyond the keys: start or stop lies outside 0 .. kv_len.",
        "Which keys exist? Cut both ends to that range.",
        IntervalMistake(clamp=False, normalize=False),
    ),
)


def blocks(length: int, block: int, *, dropping_tail: bool = False) -> list[slice]:
    whole = length // block * block if dropping_tail else length
    return [slice(first, min(first + block, length)) for first in range(0, whole, block)]
