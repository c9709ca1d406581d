"""Checks of ex06: a fused softmax in Triton, over rows of different lengths, padded or packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashlib.course.exercises.compiled import expect_compiled
from flashlib.course.exercises.softmax import (
    NOT_NORMALIZED,
    row_max,
    softmax64,
    softmax_naive,
    softmax_terms,
    softmax_with,
)
from flashlib.course.grader.exercise import SOFTMAX, Exercise, Misconception, Target, budget_of
from flashlib.course.grader.findings import Failure
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex06",
    file="ex06_ragged_softmax.py",
    title="A ragged fused softmax in Triton",
    chapter="06_first_kernels",
    difficulty=3,
    importance=5,
    minutes=60,
    forbidden=SOFTMAX,
    preload=("triton",),
    environment={"TRITON_INTERPRET": "1"},
)

# --------------------------------------------------------------------------------------------------- rows in both forms


def lanes_of(x: Tensor, lengths: Tensor, more: int = 0) -> Tensor:
    """``[rows, cols]`` bool: which entries belong to a row that is `more` longer than it is."""
    return torch.arange(x.shape[1]) < lengths[:, None] + more


def within(x: Tensor, lengths: Tensor, more: int = 0) -> Tensor:
    """x with -inf in the place of padding."""
    return x.masked_fill(~lanes_of(x, lengths, more), -torch.inf)


def ragged64(x: Tensor, lengths: Tensor) -> Tensor:
    return softmax64(within(x, lengths))


def ragged_naive(x: Tensor, lengths: Tensor) -> list[Tensor]:
    return softmax_naive(within(x, lengths))


def ragged_terms(x: Tensor, lengths: Tensor) -> Tensor:
    return softmax_terms(within(x, lengths))


def padded(values: Tensor, cu_seqlens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Packed rows as ``x [rows, width]``, with what follows a row in memory beside it, and their lengths."""
    places = cu_seqlens[:-1, None].long() + torch.arange(width)
    followed = torch.cat([values, torch.full((width,), torch.nan, dtype=values.dtype)])
    return followed[places], cu_seqlens.diff()


def packed(rows: Tensor, lengths: Tensor) -> Tensor:
    return rows[lanes_of(rows, lengths)]


def on_packed_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of padded rows, as one of the arguments of `packed_softmax`."""

    def of_packed(values: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Any:
        x, lengths = padded(values, cu_seqlens, max_seqlen)
        result = function(x, lengths)
        return [packed(one, lengths) for one in result] if isinstance(result, list) else packed(result, lengths)

    return of_packed


def lengths_between(t: Trial, rows: int, low: int, high: int) -> Tensor:
    """Different lengths in random order, the shortest and the longest among them."""
    lengths = torch.linspace(low, high, rows).round().to(torch.int32)
    return lengths[t.permutation(rows)]


def cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)


# ------------------------------------------------------------------------------------------------------------- mistakes


def block_of(cols: int) -> int:
    return 1 << max(cols - 1, 0).bit_length()


def padding_counted(x: Tensor, lengths: Tensor) -> Tensor:
    """Masked lanes were loaded as 0 and stayed in the block, which is the next power of two wide."""
    lanes = torch.zeros(len(x), block_of(x.shape[1]), dtype=torch.float64)
    lanes[:, : x.shape[1]] = x.double().masked_fill(~lanes_of(x, lengths), 0.0)
    return torch.softmax(lanes, -1)[:, : x.shape[1]] * lanes_of(x, lengths)


def with_shift(shift: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Softmax with another number subtracted than the maximum, 0 / 0 as it comes."""

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        return softmax_with(within(x, lengths), shift(within(x, lengths)))

    return model


def finite_lanes(fill: float, hides: bool, padded: bool, written: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Softmax in which the finite number `fill` stands for -inf.

    Args:
        hides: it also replaces what is lower in the row itself.
        padded: lanes outside of the row, as many as the block has, take part with it.
        written: lanes outside of the row keep the weight that they got.
    """

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        inside = lanes_of(x, lengths)
        lanes = torch.full((len(x), block_of(x.shape[1])), fill, dtype=torch.float64)
        lanes[:, : x.shape[1]] = torch.where(inside, x.double().clamp(min=fill) if hides else x.double(), fill)
        takes_part = torch.full(lanes.shape, padded)
        takes_part[:, : x.shape[1]] |= inside
        weights = torch.where(takes_part, torch.exp(lanes - lanes.amax(-1, keepdim=True)), 0.0)
        weights = (weights / weights.sum(-1, keepdim=True))[:, : x.shape[1]]
        return weights if written else weights.where(inside, 0.0)

    return model


def unshifted_with_zero_guarded(x: Tensor, lengths: Tensor) -> Tensor:
    """exp(x) over its sum; 0 where the sum is 0, and inf / inf as it comes."""
    weights = torch.exp(within(x, lengths).float())
    return weights / weights.sum(-1, keepdim=True).where(weights.any(-1, keepdim=True), 1.0)


def masked_by_multiplication(x: Tensor, lengths: Tensor) -> Tensor:
    """Weights of the padding were multiplied by 0, which leaves NaN of what is NaN or infinite."""
    weights = torch.exp(x.float() - row_max(within(x, lengths)).float()) * lanes_of(x, lengths)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def first_lanes(block: Callable[[int], int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Softmax of the lanes that fit a block; the others were never written."""

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        lanes = block(x.shape[1])
        out = torch.full(x.shape, torch.nan, dtype=torch.float64)
        out[:, :lanes] = ragged64(x[:, :lanes], lengths)
        return out

    return model


def as_if_contiguous(x: Tensor, lengths: Tensor, columns_too: bool) -> Tensor:
    """What a kernel reads that takes rows to lie x.shape[1] apart (and columns 1 apart)."""
    rows, cols = x.shape
    strides = (cols, 1) if columns_too else (x.stride(0), 1)
    needed = (rows - 1) * strides[0] + (cols - 1) * strides[1] + 1
    span = (rows - 1) * x.stride(0) + (cols - 1) * x.stride(1) + 1
    memory = torch.full((max(needed, span),), torch.nan, dtype=x.dtype)
    memory[:span] = x.as_strided((span,), (1,))
    return ragged64(memory.as_strided((rows, cols), strides), lengths)


def first_row_only(x: Tensor, lengths: Tensor) -> Tensor:
    out = torch.full(x.shape, torch.nan, dtype=torch.float64)
    out[:1] = ragged64(x[:1], lengths[:1])
    return out


def not_normalized(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.exp(within(x, lengths).double() - row_max(within(x, lengths).double()))


def nan_in_the_row(x: Tensor, lengths: Tensor) -> Tensor:
    """A row is NaN if there is NaN in its padding; the padding's own weights are 0."""
    nan = x.isnan().any(-1, keepdim=True) & lanes_of(x, lengths)
    return ragged64(x, lengths).masked_fill(nan, torch.nan)


def without_last(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same, in code that does not store the last entry of a row either."""
    return lambda x, lengths: model(x, lengths).masked_fill(~lanes_of(x, lengths, -1), torch.nan)


def unwritten_beyond(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same, in code that stores the lanes of the row alone: memory beyond holds what it held."""
    return lambda x, lengths: model(x, lengths).masked_fill(~lanes_of(x, lengths), torch.nan)


ROW_MISTAKES = (
    Misconception(
        "masked-row-nan",
        "A row without entries, or of nothing but -inf, gave NaN: -inf minus the maximum of -inf is NaN, and so is 0 / 0. (So is memory that was never written.)",
        "What is the maximum of a row that has none, and what is its sum? Give both a value that does no harm.",
        with_shift(lambda x: x.amax(-1, keepdim=True)),
    ),
    Misconception(
        "masked-row-nan",
        "A row without entries, or of nothing but -inf, gave NaN: its sum is 0, and 0 / 0 is NaN.",
        "What is the maximum of a row that has none, and what is its sum? Give both a value that does no harm.",
        lambda x, lengths: with_shift(lambda y: y.amax(-1, keepdim=True))(x, lengths).where(lanes_of(x, lengths), 0.0),
    ),
    Misconception(
        "max-starts-at-zero",
        "The maximum was never below 0. In a row of very negative entries every exp is then 0, and 0 / 0 is NaN.",
        "Lanes outside of the row take part in the maximum, too. Which value never wins there?",
        with_shift(lambda x: row_max(x).clamp(min=0.0)),
    ),
    Misconception(
        "max-starts-at-zero",
        "The maximum was never below 0. In a row of very negative entries every exp is then 0, and the row comes out as 0.",
        "Lanes outside of the row take part in the maximum, too. Which value never wins there?",
        lambda x, lengths: with_shift(lambda y: row_max(y).clamp(min=0.0))(x, lengths).nan_to_num(nan=0.0),
    ),
    Misconception(
        "padding-counted",
        "Lanes outside of the row took part as 0: each of them added exp(0 - maximum) to the sum.",
        "A masked load gives `other` in the lanes it does not load. Which value adds nothing to a sum of exponentials?",
        padding_counted,
    ),
    Misconception(
        "no-max-subtraction",
        "exp was taken of the raw entries. exp(89) is already infinite in float32.",
        "Softmax does not change when the same number is subtracted from a whole row. Which number keeps exp in range?",
        with_shift(lambda x: torch.zeros(())),
    ),
    Misconception(
        "no-max-subtraction",
        "exp was taken of the raw entries. exp(89) is already infinite in float32, and exp(-104) is 0.",
        "Softmax does not change when the same number is subtracted from a whole row. Which number keeps exp in range?",
        lambda x, lengths: with_shift(lambda y: torch.zeros(()))(x, lengths).nan_to_num(nan=0.0),
    ),
    Misconception(
        "no-max-subtraction",
        "exp was taken of the raw entries. exp(89) is already infinite in float32, and exp(-104) is 0.",
        "Softmax does not change when the same number is subtracted from a whole row. Which number keeps exp in range?",
        unshifted_with_zero_guarded,
    ),
    *(
        Misconception(
            "minus-infinity-is-finite",
            "A large negative number stood for -inf. Rows of still lower entries lose against it, and a row of nothing but "
            "-inf gives equal weights.",
            "exp(-inf) is 0 whatever is subtracted from it, as long as that is finite. Which row has no finite maximum?",
            finite_lanes(fill, hides, padded, written),
        )
        for fill in (-1e4, -1e5, -1e6, -1e9, -1e30, float(torch.finfo(torch.float32).min))
        for hides in (False, True)
        for padded, written in ((False, False), (True, False), (True, True))
    ),
    Misconception(
        "length-one-too-long",
        "Each row was taken to be one entry longer than it is.",
        "Lanes are counted from 0. Which is the last one of a row of length 3?",
        lambda x, lengths: softmax64(within(x, lengths, 1)),
    ),
    Misconception(
        "length-one-too-short",
        "The last entry of each row was left out.",
        "Lanes are counted from 0. Which is the last one of a row of length 3?",
        lambda x, lengths: softmax64(within(x, lengths, -1)),
    ),
    Misconception(
        "length-ignored",
        "Each row was taken to be as wide as the block allows, whatever its length.",
        "What does the mask of your load compare the column with?",
        lambda x, lengths: softmax64(x),
    ),
    replace(NOT_NORMALIZED, model=not_normalized),
)
RAGGED_MISTAKES = (
    *ROW_MISTAKES,
    Misconception(
        "padding-not-written",
        "The row is right, but the entries of the answer beyond its length were never written: they hold what the memory held.",
        "torch.empty promises nothing about its contents. Which lanes must the store write?",
        unwritten_beyond(ragged64),
    ),
    *(
        Misconception(
            "row-cut-off",
            "The block has fewer lanes than the row has entries: the rest of the row was not seen.",
            "How many lanes must a block have for any number of columns? It has to be a power of two.",
            first_lanes(block),
        )
        for block in (lambda cols: block_of(cols + 1) // 2, *(lambda cols, b=b: b for b in (2048, 1024, 512, 256, 128)))
    ),
    Misconception(
        "row-stride-ignored",
        "Rows were taken to follow each other without a gap: row i was read i * cols entries after the first.",
        "A slice of a wider matrix has its rows further apart. Which number says how far?",
        lambda x, lengths: as_if_contiguous(x, lengths, columns_too=True),
    ),
    Misconception(
        "column-stride-ignored",
        "The entries of a row were taken to lie side by side. In a transposed matrix they do not.",
        "x.stride(1) is not always 1. Where does your address use it?",
        lambda x, lengths: as_if_contiguous(x, lengths, columns_too=False),
    ),
    Misconception(
        "one-row-only",
        "Only the first row was written: every program computed it.",
        "Programs differ in one thing alone: their program id. Along which axis did you launch them?",
        first_row_only,
    ),
)
PACKED_MISTAKES = tuple(
    replace(mistake, model=on_packed_rows(model))
    for mistake in ROW_MISTAKES
    for model in (mistake.model, without_last(mistake.model))
    if model is mistake.model or mistake.slug == "length-one-too-short"
)
PADDING_MISTAKES = tuple(
    Misconception(
        "padding-reaches-the-row",
        "What lies in the padding changed the row, though its weights were set to 0: x[i, lengths[i]:] holds NaN, or numbers "
        "whose exp is infinite.",
        "NaN times 0 is NaN, and so is infinity times 0. Which lanes does your load mask, and what do the others hold?",
        model,
    )
    for model in (masked_by_multiplication, nan_in_the_row)
)
REFUSED_BLOCKS = {
    "must be a power of 2": Misconception(
        "block-not-a-power-of-two",
        "A block of lanes must have a power of two of them, and this row has another number of entries.",
        "Take the next power of two (Triton has a function for it), and mask the lanes that are too many.",
    ),
    "argument must be greater than the start argument": Misconception(
        "block-of-no-lanes",
        "There may be no entries at all, but a block must have at least one lane.",
        "What is the next power of two of 0?",
    ),
}
NO_KERNEL = Misconception(
    "no-kernel",
    "The softmax was computed by PyTorch's operations, each of which reads and writes the whole matrix. No kernel was launched.",
    "The whole row fits one program. Load it once, do all of the softmax there, and store the result.",
)
COPIED_FIRST = Misconception(
    "copied-first",
    "x was copied before the kernel read it. The copy alone reads and writes the whole matrix.",
    "A kernel can read any layout if it knows the strides. Pass them.",
)
READ_AGAIN = Misconception(
    "read-more-than-once",
    "Entries of x were loaded several times. The point of a fused softmax is that the row stays where it was loaded to.",
    "Maximum, sum and quotient need the same lanes. Load them once, and keep the block in a variable.",
)
PADDING_LOADED = Misconception(
    "padding-loaded",
    "Padding was loaded only to be thrown away. A short row in a wide matrix should cost what a short row costs.",
    "The mask of the load can be narrower than the matrix.",
)
INTERMEDIATES = Misconception(
    "intermediate-in-memory",
    "Intermediate results went through memory: something was written and read again before the answer was there.",
    "One kernel can do all of it: what a program computes stays in its registers until it stores it.",
)


def ragged(*mistakes: Misconception) -> Target:
    return Target("ragged_softmax", ragged64, budget_of(ragged_naive, ragged64, ragged_terms), misconceptions=mistakes)


ragged_softmax = ragged(*RAGGED_MISTAKES, *PADDING_MISTAKES)
ragged_beside_nan = ragged(*PADDING_MISTAKES, *RAGGED_MISTAKES)  # there, NaN in a row is most likely from its padding
packed_softmax = Target(
    "packed_softmax",
    on_packed_rows(ragged64),
    budget_of(*map(on_packed_rows, (ragged_naive, ragged64, ragged_terms))),
    misconceptions=PACKED_MISTAKES,
)


@contextlib.contextmanager
def block_sizes_named() -> Iterator[None]:
    """A block size that Triton refuses is named, beside Triton's words and the student's line."""
    try:
        yield
    except Failure as failure:
        found = failure.finding
        for words, mistake in REFUSED_BLOCKS.items():
            if words in found.says:
                named = replace(found, diagnosis=mistake.slug, says=mistake.says, got=found.says, hints=(mistake.hint,))
                raise Failure(named) from failure
        raise


def check(t: Trial, target: Target, *args: Any) -> None:
    with block_sizes_named():
        t.check(target, *args)


def check_no_entries(t: Trial, target: Target, *args: Any) -> None:
    """Where there is nothing to compute, the shape is the answer."""
    with block_sizes_named():
        answer = t.call(target.function, *args)
    t.expect_tensor(answer, "out", args[0].shape, args[0].dtype)


# ---------------------------------------------------------------------------------------------------------- padded rows
# A row of full width stands alone where a lane too many is to be noticed: there it is another row's, or nobody's.


@exercise.property(
    points=2, hints=["Which lanes of the block belong to the row, and which to the answer? These are two masks."]
)
def rows_of_different_lengths(t: Trial) -> None:
    """ragged_softmax treats each row up to its own length, and writes 0 beyond"""
    for rows, cols in [(4, t.integer(20, 30)), (3, t.integer(33, 60))]:
        check(t, ragged_softmax, t.randn(rows, cols), lengths_between(t, rows, 2, cols - 1))
    check(t, ragged_softmax, t.randn(3, 16), lengths_between(t, 3, 3, 13).long())


@exercise.property(points=2, hints=["triton.next_power_of_2, and a mask for what is too much."])
def any_number_of_columns(t: Trial) -> None:
    """ragged_softmax takes any number of columns"""
    for cols in (1, 3, t.integer(129, 250), t.integer(1025, 1500), t.integer(2100, 4000)):
        check(t, ragged_softmax, t.randn(1, cols), torch.tensor([cols], dtype=torch.int32))


@exercise.property(points=2, hints=["What do the lanes outside of the row hold, and do they take part in the maximum?"])
def large_and_very_negative_rows(t: Trial) -> None:
    """ragged_softmax is stable for rows of very large and of very negative entries"""
    lengths = lengths_between(t, 3, 5, 19)
    check(t, ragged_softmax, t.uniform(200, 210, 3, 20), lengths)  # who fails here never subtracts
    check(t, ragged_softmax, t.uniform(-3010, -3000, 3, 20), lengths)  # ... subtracts a maximum that starts at 0
    x = 1e34 * t.uniform(-3e4, -2e4, 3, 20)
    check(t, ragged_softmax, x.masked_fill(~lanes_of(x, lengths), -3.2e38), lengths)  # ... has a finite -inf


@exercise.property(points=2, hints=["The maximum of such a row is -inf. What should be subtracted instead?"])
def rows_of_minus_infinity(t: Trial) -> None:
    """ragged_softmax gives -inf the weight 0, and a row of nothing but -inf all zeros"""
    x, lengths = t.randn(4, 15), lengths_between(t, 4, 6, 11)
    x[:, :12][t.uniform(0, 1, 4, 12) < 0.4] = -torch.inf
    x[:, 2] = t.randn(4)
    x[t.integer(0, 3), :12] = -torch.inf
    check(t, ragged_softmax, x, lengths)


@exercise.property(points=1, hints=["A row of length 0 has no maximum, and its sum is 0."])
def empty_rows(t: Trial) -> None:
    """ragged_softmax gives a row of length 0 all zeros, also when no row has any entry"""
    check(t, ragged_softmax, t.randn(3, 9), lengths_between(t, 3, 0, 8))
    check_no_entries(t, ragged_softmax, t.randn(2, 0), torch.zeros(2, dtype=torch.int32))


@exercise.property(points=1, hints=["Mask the load itself, not what you have loaded."])
def padding_may_hold_anything(t: Trial) -> None:
    """ragged_softmax does not let NaN in the padding reach the row"""
    x, lengths = t.randn(3, 24), lengths_between(t, 3, 3, 20)
    check(t, ragged_beside_nan, x.masked_fill(~lanes_of(x, lengths), torch.nan), lengths)


@exercise.property(points=2, hints=["x.stride() has two numbers, and the kernel needs both."])
def any_strides(t: Trial) -> None:
    """ragged_softmax reads rows that lie apart, and columns that do"""
    lengths = lengths_between(t, 3, 4, 13)
    check(t, ragged_softmax, t.randn(3, 50)[:, 20:34], lengths)
    check(t, ragged_softmax, t.randn(14, 40).T[10:13], lengths)
    check(t, ragged_softmax, t.randn(6, 28)[::2, ::2], lengths)


@exercise.property(points=1, hints=["Convert once after the load and once before the store."])
def half_precision(t: Trial) -> None:
    """ragged_softmax computes float16 rows in float32, and rounds once"""
    check(t, ragged_softmax, 1000 + 2 * t.randn(3, 40, dtype=torch.float16), lengths_between(t, 3, 11, 37))


@exercise.property(points=1)
def inputs_are_left_alone(t: Trial) -> None:
    """ragged_softmax and packed_softmax do not change their inputs"""
    lengths = lengths_between(t, 2, 3, 10)
    with block_sizes_named():
        t.check_inputs_untouched(ragged_softmax, t.randn(2, 11), lengths)
        t.check_inputs_untouched(packed_softmax, t.randn(int(lengths.sum())), cumulative(lengths), 10)


# ---------------------------------------------------------------------------------------------------------- packed rows


@exercise.property(points=2, hints=["A row begins at cu_seqlens[i]. Its length is a difference."])
def rows_packed_together(t: Trial) -> None:
    """packed_softmax finds each row by cu_seqlens"""
    lengths = lengths_between(t, 4, 1, t.integer(20, 30))
    values, longest = t.randn(int(lengths.sum())), int(lengths.max())
    check(t, packed_softmax, values, cumulative(lengths), longest + t.integer(40, 90))
    check(t, packed_softmax, values.half(), cumulative(lengths), longest)


@exercise.property(points=1, hints=["What you did for empty rows and for very negative ones holds here, too."])
def packed_rows_that_are_hard(t: Trial) -> None:
    """packed_softmax takes empty rows, rows of -inf, and rows of very large and very negative entries"""
    lengths = torch.tensor([3, 5, 7, 10], dtype=torch.int32)[t.permutation(4)]
    heights = torch.tensor([200.0, -3000.0, -torch.inf, -1e20])[t.permutation(4)]
    values = t.uniform(0, 10, 25) + heights.repeat_interleave(lengths)
    at = t.integer(0, 4)
    lengths = torch.cat([lengths[:at], torch.zeros(1, dtype=torch.int32), lengths[at:]])
    check(t, packed_softmax, values, cumulative(lengths), 10)
    check_no_entries(t, packed_softmax, t.randn(0), torch.zeros(3, dtype=torch.int32), 0)


# -------------------------------------------------------------------------------------------------------------- traffic


@exercise.property(
    points=3, hints=["Count what crosses memory: each entry of the rows once in, each of the answer once out."]
)
def crosses_memory_once(t: Trial) -> None:
    """both are fused: a kernel loads each entry of a row once, and no intermediate result goes through memory"""
    lengths = lengths_between(t, 3, 100, 200)
    x = t.randn(260, 3).T
    expect_fused(t, ragged_softmax, x, lengths, entries=int(lengths.sum()))
    values = t.randn(int(lengths.sum()))
    expect_fused(t, packed_softmax, values, cumulative(lengths), 200, entries=values.numel())


def expect_fused(t: Trial, target: Target, x: Tensor, *args: Any, entries: int) -> None:
    """The answer is right; the kernel loads the `entries` of float32 that x holds in its rows, and nothing is moved twice."""
    with block_sizes_named():
        reply = t.ask(target.function, (x, *args), meter={"x": x})
    t.judge(target, reply.value, x, *args)
    meter = reply.meter if isinstance(reply.meter, dict) else {}
    read, written, calls, launches = (meter.get(key) for key in ("bytes_read", "bytes_written", "calls", "launches"))
    if not all(isinstance(counter, dict) for counter in (read, written, calls, launches)):
        t.fail("tampered", "The meter in your process was changed.")
    if not launches:
        t.fail_as(NO_KERNEL, got="no kernel was launched", expected="one kernel that does it all")
    of_x = _total({"x": read.pop("x", 0)})
    got, expected = f"{of_x:,} bytes of x read", f"{4 * entries:,}: {entries} entries of 4 bytes"
    if any(name in calls for name in ("aten.clone", "aten.copy_", "aten._to_copy")):
        t.fail_as(COPIED_FIRST, got=got, expected=expected)
    if of_x == x.nbytes and x.numel() > entries:
        t.fail_as(PADDING_LOADED, got=got, expected=expected)
    if of_x > 4 * entries:
        t.fail_as(READ_AGAIN, got=got, expected=expected)
    index = 64 * (args[0].numel() + 1)  # bytes: the lengths, a few times over
    if _total(read) > index or _total(written) > 2 * x.nbytes + index:
        got = f"{_total(read):,} bytes read that are not x, {_total(written):,} written"
        t.fail_as(
            INTERMEDIATES, got=got, expected=f"at most {index:,} for the lengths, and {x.nbytes:,} for the answer"
        )


def _total(counter: dict[str, Any]) -> int:
    return sum(value for value in counter.values() if isinstance(value, int))


@exercise.property(
    points=1,
    hints=[
        "The interpreter runs any Python. A GPU's kernel has numbers, blocks, tl's functions and constexprs, and no more."
    ],
)
def compiles_for_gpus(t: Trial) -> None:
    """the kernels compile for GPUs, sm_80 and sm_90"""
    x, lengths = t.randn(3, 37), torch.tensor([37, t.integer(1, 20), t.integer(21, 36)], dtype=torch.int32)
    values, packed = t.randn(int(lengths.sum())), cumulative(lengths)
    check(t, ragged_softmax, x, lengths)  # who fails anyway is told so at less expense
    check(t, packed_softmax, values, packed, 37)
    expect_compiled(t, NO_KERNEL, "ragged_softmax", x, lengths)
    expect_compiled(t, NO_KERNEL, "packed_softmax", values, packed, 37)
