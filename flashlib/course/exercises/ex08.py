"""Checks of ex08: causal masks and windows in a Triton kernel that loads no tile in vain, watched in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises.compiled import expect_compiled
from flashlib.course.exercises.drawing import draw
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.intervals import WINDOW_MISTAKES, blocks, exact_intervals
from flashlib.course.exercises.pieces import merged_budget
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.trial import Trial
from flashlib.masks import Window

exercise = Exercise(
    name="ex08",
    file="ex08_triton_masks.py",
    title="Causal masks and windows in Triton",
    chapter="08_masks_in_a_kernel",
    difficulty=4,
    importance=4,
    minutes=75,
    forbidden=SDPA,
    preload=("triton",),
    environment={"TRITON_INTERPRET": "1"},
)

SKIP, PARTIAL, FULL = 0, 1, 2
EXACTLY = 0.0  # the error budget of integers

# ------------------------------------------------------------------------------------------------ which tiles are visited
# A rule says what a kernel does with the tiles of one block of queries: from `seen`, bool [rows, keys], to one kind for
# each tile of keys. A tile that is taken whole has all its keys.


def exact_kinds(seen: Tensor, block_n: int) -> list[int]:
    tiles = [seen[:, keys] for keys in blocks(seen.shape[1], block_n)]
    return [SKIP if not tile.any() else FULL if tile.all() and tile.shape[1] == block_n else PARTIAL for tile in tiles]


def nothing_skipped(seen: Tensor, block_n: int) -> list[int]:
    return [max(kind, PARTIAL) for kind in exact_kinds(seen, block_n)]


def all_masked(seen: Tensor, block_n: int) -> list[int]:
    return [min(kind, PARTIAL) for kind in exact_kinds(seen, block_n)]


def everything_masked(seen: Tensor, block_n: int) -> list[int]:
    return [PARTIAL for _ in exact_kinds(seen, block_n)]


def left_not_skipped(seen: Tensor, block_n: int) -> list[int]:
    kinds = exact_kinds(seen, block_n)
    return [max(kind, PARTIAL) if any(kinds[tile:]) else kind for tile, kind in enumerate(kinds)]


def right_not_skipped(seen: Tensor, block_n: int) -> list[int]:
    kinds = exact_kinds(seen, block_n)
    return [max(kind, PARTIAL) if any(kinds[: tile + 1]) else kind for tile, kind in enumerate(kinds)]


def ends_with_first_row(seen: Tensor, block_n: int) -> list[int]:
    kinds, of_first = exact_kinds(seen, block_n), exact_kinds(seen[:1], block_n)
    end = max((tile + 1 for tile, kind in enumerate(of_first) if kind), default=0)
    return [kind if tile < end else SKIP for tile, kind in enumerate(kinds)]


def begins_with_last_row(seen: Tensor, block_n: int) -> list[int]:
    kinds, of_last = exact_kinds(seen, block_n), exact_kinds(seen[-1:], block_n)
    begin = next((tile for tile, kind in enumerate(of_last) if kind), len(kinds))
    return [kind if tile >= begin else SKIP for tile, kind in enumerate(kinds)]


def full_by_last_row(seen: Tensor, block_n: int) -> list[int]:
    whole = exact_kinds(seen[-1:], block_n)
    return [
        FULL if kind and last == FULL else kind for kind, last in zip(exact_kinds(seen, block_n), whole, strict=True)
    ]


def last_tile_left_out(seen: Tensor, block_n: int) -> list[int]:
    """A loop that ends before the tile in which the last key stands."""
    kinds = exact_kinds(seen, block_n)
    last = max((tile for tile, kind in enumerate(kinds) if kind), default=0)
    ends_whole = seen[:, (last + 1) * block_n - 1].any() if (last + 1) * block_n <= seen.shape[1] else False
    return [SKIP if tile == last and not ends_whole else kind for tile, kind in enumerate(kinds)]


def partial_not_masked(seen: Tensor, block_n: int) -> list[int]:
    return [FULL if kind else SKIP for kind in exact_kinds(seen, block_n)]


# ------------------------------------------------------------------------------------------------------------- mistakes


@dataclass(frozen=True)
class Kernel:
    """`masked_attention` in float64 with one mistake.

    Attributes:
        intervals: start and stop of each row, from q_len, kv_len, left and right.
        kinds: what is done with each tile.
        guards_pivot: whether a maximum of -inf is kept from being subtracted.
        guards_division: whether a sum of 0 is kept from being divided by.
        fill: the score of a hidden pair in a tile that is masked.
        phantom_rows: whether a tile is judged by rows, too, that the last block has room for but the queries do not fill.
    """

    intervals: Callable[..., tuple[Tensor, Tensor]] = exact_intervals
    kinds: Callable[[Tensor, int], list[int]] = exact_kinds
    guards_pivot: bool = True
    guards_division: bool = True
    fill: float = -math.inf
    phantom_rows: bool = False

    def __call__(self, q, k, v, left=None, right=None, block_m=32, block_n=32) -> tuple[Tensor, Tensor]:
        scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
        kinds = self.tile_kinds(q.shape[2], k.shape[2], left, right, block_m, block_n)
        start, stop = self._bounds(q.shape[2], k.shape[2], left, right)
        key = torch.arange(k.shape[2])
        hidden = (key < start[:, None]) | (key >= stop[:, None])
        visited = _spread(kinds, *hidden.shape, block_m, block_n)
        scores = scores.masked_fill(hidden & (visited == PARTIAL), self.fill).masked_fill(visited == SKIP, -math.inf)
        m = scores.amax(-1)
        p = torch.exp(scores - m.masked_fill(m == -math.inf, 0.0)[..., None])
        l = p.sum(-1)
        out, lse = p @ v.double() / (l.masked_fill(l == 0, 1.0) if self.guards_division else l)[..., None], m + l.log()
        if not self.guards_pivot:
            lost = _blind_in_its_first_tile(scores, kinds, block_m, block_n)
            out, lse = out.masked_fill(lost[..., None], math.nan), lse.masked_fill(lost, math.nan)
        return out, lse

    def tile_kinds(self, q_len, kv_len, left, right, block_m, block_n) -> Tensor:
        """int ``[row blocks, tiles of keys]``."""
        start, stop = self._bounds(q_len, kv_len, left, right)
        if self.phantom_rows:
            beyond = torch.arange(kv_len, kv_len + -q_len % block_m)
            start = torch.cat([start, torch.zeros_like(beyond) if left is None else (beyond - left).clamp(min=0)])
            stop = torch.cat([stop, torch.full_like(beyond, kv_len)])
        key = torch.arange(kv_len)
        seen = (key >= start[:, None]) & (key < stop[:, None])
        return torch.tensor([self.kinds(seen[rows], block_n) for rows in blocks(len(start), block_m)])

    def counts(self, q, k, v, left=None, right=None, block_m=32, block_n=32) -> Tensor:
        """`count_tiles` of this kernel."""
        kinds = self.tile_kinds(q.shape[2], k.shape[2], left, right, block_m, block_n)
        counts = torch.stack([(kinds == PARTIAL).sum(1), (kinds == FULL).sum(1)], dim=-1)
        return counts.to(torch.int32).expand(*q.shape[:2], -1, -1)

    def _bounds(self, q_len, kv_len, left, right) -> tuple[Tensor, Tensor]:
        start, stop = self.intervals(q_len, kv_len, left, right)
        return start[0], stop[0]


def _spread(kinds: Tensor, q_len: int, kv_len: int, block_m: int, block_n: int) -> Tensor:
    """One kind for each pair: ``[Sq, Sk]``."""
    return kinds.repeat_interleave(block_m, 0).repeat_interleave(block_n, 1)[:q_len, :kv_len]


def _blind_in_its_first_tile(scores: Tensor, kinds: Tensor, block_m: int, block_n: int) -> Tensor:
    """Rows that see nothing in the first tile that their block visits: there -inf is subtracted from -inf."""
    lost = torch.zeros(scores.shape[:3], dtype=torch.bool)
    tiles = blocks(scores.shape[3], block_n)
    for rows, line in zip(blocks(scores.shape[2], block_m), kinds, strict=True):
        visited = line.nonzero()
        if len(visited):
            lost[:, :, rows] = (scores[:, :, rows, tiles[int(visited[0])]] == -math.inf).all(-1)
    return lost


def out_alone(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """The model without its lse, which rounding alone decides."""
    return lambda *args, **kwargs: (kernel(*args, **kwargs)[0], None)


_ENDS = "Compare first_row, last_row and both ends of their intervals: which row decides where the block's loop begins and ends?"
INTERVAL_MISTAKES = tuple(replace(mistake, model=Kernel(mistake.model)) for mistake in WINDOW_MISTAKES)
TILE_MISTAKES = (
    Misconception(
        "tiles-cut-off",
        "The loop ends where the first query of the block sees nothing more. The last one sees furthest.",
        _ENDS,
        Kernel(kinds=ends_with_first_row),
    ),
    Misconception(
        "tiles-cut-off",
        "The loop begins where the window of the last query does. The first one sees further back.",
        _ENDS,
        Kernel(kinds=begins_with_last_row),
    ),
    Misconception(
        "diagonal-tile-skipped",
        "The last tile that some query sees was left out: the loop ends at a multiple of BLOCK_N before it.",
        "The last visible key stands inside a tile. Does your loop come to it?",
        Kernel(kinds=last_tile_left_out),
    ),
    Misconception(
        "full-by-one-row",
        "A tile was taken whole because the last query sees all of it. The first one may not.",
        "Which query of the block sees least of the tiles at the right end?",
        Kernel(kinds=full_by_last_row),
    ),
    Misconception(
        "partial-tiles-unmasked",
        "Tiles were skipped, but in those that remain every key was visible.",
        "What must the scores of hidden pairs be, before the maximum is taken?",
        Kernel(kinds=partial_not_masked),
    ),
)
VALUE_MISTAKES = (
    Misconception(
        "masked-with-zero",
        "Hidden scores were set to 0, and exp(0) is 1: they have a weight.",
        "Which score has the weight 0 under exp?",
        Kernel(fill=0.0),
    ),
    *(
        Misconception(
            "empty-row-nan",
            "NaN in rows that see nothing, or nothing in their first tile: -inf - -inf, or 0 / 0.",
            "What are the maximum and the sum of a row, as long as it has seen nothing? What may be subtracted, divided by?",
            Kernel(kinds=kinds, guards_pivot=pivot, guards_division=division),
        )
        for kinds in (exact_kinds, everything_masked)
        for pivot, division in ((False, False), (False, True), (True, False))
    ),
    Misconception(
        "empty-row-averaged",
        "A row that sees nothing got the average of what is hidden from it: a large negative number is not -inf.",
        "If all scores of a row are the same number, subtracting the maximum gives all zeros. And then?",
        out_alone(Kernel(fill=-1e9)),
    ),
)


def exact_attention(q, k, v, left=None, right=None, block_m=32, block_n=32) -> tuple[Tensor, Tensor]:
    return reference.oracle(q, k, v, mask=Window(left, right))


def attention_budget(q, k, v, left=None, right=None, block_m=32, block_n=32) -> tuple[float, float]:
    allowed = merged_budget(q, k, v, math.ceil(k.shape[2] / block_n), mask=Window(left, right))
    return allowed.out, allowed.lse


def as_dense(q, k, v, left=None, right=None, block_m=32, block_n=32) -> Dense:
    start, stop = (x[0, :, None] for x in exact_intervals(q.shape[2], k.shape[2], left, right))
    key = torch.arange(k.shape[2])
    sizes = (k.shape[2], q.shape[2], block_m, block_n)
    hidden = (key < start) | (key >= stop)
    return Dense(q, k, v, q.shape[-1] ** -0.5, True, sizes, hidden=hidden, block=block_n)


# The ends of the intervals are this exercise's own matter.
FORMULA_MISTAKES = formula_mistakes(
    as_dense, leave=("scale-ignored", "newest-key-missed", "causal-sees-the-next", "accumulated-in-half")
)

masked_attention = Target(
    "masked_attention",
    oracle=exact_attention,
    budget=attention_budget,
    outputs={"out": torch.float32, "lse": torch.float32},
    misconceptions=(*INTERVAL_MISTAKES, *TILE_MISTAKES, *VALUE_MISTAKES, *FORMULA_MISTAKES),
)


SKIPS_NOTHING = (
    "skips-nothing",
    "Tiles of which no query sees a key were loaded. The answer is right, but the work was done for nothing.",
    "Where could the loop begin, and where could it end, if you asked the first and the last query of the block?",
)
count_tiles = Target(
    "count_tiles",
    oracle=Kernel().counts,
    budget=lambda *args, **kwargs: EXACTLY,
    outputs={"counts": torch.int32},
    misconceptions=(
        *(
            Misconception(*SKIPS_NOTHING, Kernel(kinds=kinds).counts)
            for kinds in (nothing_skipped, everything_masked, left_not_skipped, right_not_skipped)
        ),
        Misconception(
            "mask-everywhere",
            "Every tile was masked, also those of which every query sees every key.",
            "Between which keys does no query of the block see an end of its interval?",
            Kernel(kinds=all_masked).counts,
        ),
        Misconception(
            "phantom-rows",
            "The last block was judged by rows that do not exist: they see what no query sees, or hide what all of them see.",
            "Which is the last query of a block that is not full?",
            Kernel(phantom_rows=True).counts,
        ),
        *(Misconception(m.slug, m.says, m.hint, m.model.counts) for m in (*INTERVAL_MISTAKES, *TILE_MISTAKES)),
    ),
)
NO_KERNEL = Misconception(
    "not-in-a-kernel",
    "The counts do not come from a kernel. They are to say what it did, not what it should have done.",
    "Each program counts the tiles that pass by, and stores two numbers at the end.",
)

# ---------------------------------------------------------------------------------------------------------- properties


@exercise.property(
    points=2,
    hints=[
        "Begin with the kernel of exercise 7 and put -inf where a pair is hidden, before the maximum is taken.",
        "offset = kv_len - q_len. Query o_m sees the keys up to o_m + offset.",
    ],
)
def causal(t: Trial) -> None:
    """causal, with as many queries as keys and with fewer; and no mask at all"""
    t.check(masked_attention, *draw(t, 48, 48), None, 0, 16, 32)
    t.check(masked_attention, *draw(t, 32, 64), None, 0, 16, 32)
    t.check(masked_attention, *draw(t, 16, 32), None, None, 16, 32)


@exercise.property(
    points=2,
    hints=[
        "Two limits, each with a constexpr of its own: HAS_LEFT and HAS_RIGHT.",
        "Take start and stop of every row first. The mask is then two comparisons.",
    ],
)
def windows(t: Trial) -> None:
    """windows to the left, to the right and to both sides; 0 and None are not the same"""
    t.check(masked_attention, *draw(t, 32, 64), t.integer(5, 9), 0, 16, 16)
    t.check(masked_attention, *draw(t, 32, 48), t.integer(17, 20), t.integer(3, 6), 32, 16)
    t.check(masked_attention, *draw(t, 32, 48), None, t.integer(3, 6), 32, 16)
    t.check(masked_attention, *draw(t, 32, 48), 0, None, 32, 16)


@exercise.property(
    points=2,
    hints=[
        "The last block has fewer queries: which is its last row?",
        "A tile that reaches beyond the last key is never taken whole.",
    ],
)
def ragged_tails(t: Trial) -> None:
    """lengths that the blocks do not divide, several heads and batch entries"""
    t.check(masked_attention, *draw(t, 18, 34, batch=2), None, 0, 16, 16)
    t.check(masked_attention, *draw(t, 27, 45, heads=2), t.integer(9, 12), 2, 32, 16)
    t.check(masked_attention, *draw(t, 7, 11), 3, 1, 16, 16)


@exercise.property(
    points=3,
    hints=[
        "Follow a row through the first tile in which it sees nothing. Which maximum does it have then?",
        "exp2(-inf - 0) is 0: subtract 0 where the maximum is -inf, and divide by 1 where the sum is 0.",
    ],
)
def rows_that_see_nothing(t: Trial) -> None:
    """a row that sees nothing has out 0 and lse -inf, and the rows beside it are not harmed"""
    t.check(masked_attention, *draw(t, 40, 24), None, 0, 32, 16)
    t.check(masked_attention, *draw(t, 25, 17), 4, 1, 32, 16)
    t.check(masked_attention, *draw(t, 32, 64), 3, 0, 32, 16)  # all see something, but not in the first tile


@exercise.property(
    points=3,
    hints=[
        "Which keys does the first query of the block see, and which the last? All tiles in between, and no other.",
        "Round the first key down to a multiple of BLOCK_N.",
    ],
)
def outside_is_never_loaded(t: Trial) -> None:
    """NaN in the tiles that nobody sees does no harm"""
    q, k, v = draw(t, 32, 96)
    left = t.integer(4, 8)
    first = (64 - left) // 16 * 16
    harmless(t, (q, k, v), slice(0, first), left, 0)
    q, k, v = draw(t, 48, 48)
    rows = 16 * t.integer(1, 2)
    harmless(t, (q, k, v), slice(rows, None), None, 0, rows)


def harmless(
    t: Trial, inputs: tuple[Tensor, ...], poisoned: slice, left: int | None, right: int | None, rows: int | None = None
) -> None:
    """The first `rows` queries (all by default) must not notice NaN in the poisoned keys and values, which they do not see."""
    q, k, v = inputs
    k_clean, v_clean = k.clone(), v.clone()
    for x in (k, v):
        x[:, :, poisoned] = torch.nan
    out, lse = t.expect_tuple(t.call("masked_attention", q, k, v, left, right, 16, 16), "out", "lse")
    exact = exact_attention(q, k_clean, v_clean, left, right)
    budget = attention_budget(q, k_clean, v_clean, left, right)
    for name, answer, wanted, allowed in zip(("out", "lse"), (out, lse), exact, budget, strict=True):
        answer = t.expect_tensor(answer, name, wanted.shape)[:, :, :rows]
        if answer.isnan().any():
            t.check(masked_attention, q, k_clean, v_clean, left, right, 16, 16)  # who is wrong anyway is told why
            t.fail(
                "poison-loaded",
                "NaN from tiles that no query of the block sees came through. A weight of 0 does not hide it: 0 * NaN is NaN.",
                got=f"{int(answer.isnan().sum())} elements of {name} are NaN",
                expected="those tiles are not loaded",
                hint=SKIPS_NOTHING[2],
            )
        if reference.largest_error(answer, wanted[:, :, :rows]) > allowed:
            t.check(masked_attention, q, k_clean, v_clean, left, right, 16, 16)
            t.fail("wrong-values", f"{name} is off by more than rounding explains, beside tiles of NaN.")


@exercise.property(
    points=3,
    hints=[
        "A loop over all tiles with an `if` around the arithmetic has still loaded them, if the load stands before it.",
        "Let the loop itself run from the first tile that somebody sees to the last.",
    ],
)
def loads_what_is_seen(t: Trial) -> None:
    """of K and V the kernel loads the tiles that some query of the block sees, and no byte more"""
    q, k, v = draw(t, 64, 90)
    for left, right in ((None, 0), (t.integer(18, 24), 1)):
        arguments = (q, k, v, left, right, 32, 16)
        reply = t.ask("masked_attention", arguments, meter={"k": k, "v": v})
        t.judge(masked_attention, reply.value, *arguments)
        needed = bytes_needed(*arguments)
        for name in ("k", "v"):
            read = bytes_read(reply.meter, name)
            if read > needed:
                t.fail(
                    *SKIPS_NOTHING[:2],
                    got=f"{read:,} bytes of {name}",
                    expected=f"at most {needed:,}",
                    hint=SKIPS_NOTHING[2],
                )
    see_tiles_from_outside(t)


def see_tiles_from_outside(t: Trial) -> None:
    """K and V are handed out piece by piece, each piece part of one tile, with room for one tile: as often as it is loaded."""
    queries, keys, block, dim = 64, 512, 32, 64
    q, k, v = draw(t, queries, keys, dim=dim)
    arguments = (q, k, v, t.integer(100, 200), 0, block, block)
    first = *draw(t, 2, 2, dim=dim), None, 0, block, block
    tile = block * dim * 4
    reply = t.watch("masked_attention", *arguments, first=first, room={"k": (k, tile), "v": (v, tile)})
    if reply is None:
        return
    t.judge(masked_attention, reply.value, *arguments)
    kinds = Kernel().tile_kinds(queries, keys, *arguments[3:])
    for name in ("k", "v"):
        pieces = tile // reply.seen.piece[name]
        in_vain = {number // pieces for number in reply.seen.pieces(name)} - set(
            (kinds != SKIP).any(0).nonzero()[:, 0].tolist()
        )
        read = sum(each == name for each, _ in reply.seen.order) / pieces
        if in_vain or read > int((kinds != SKIP).sum()):
            t.fail(
                *SKIPS_NOTHING[:2],
                got=f"{read:.3g} tiles of {name} loaded, {len(in_vain)} of which nobody sees a key",
                expected=f"at most {int((kinds != SKIP).sum())}",
                hint=SKIPS_NOTHING[2],
            )
    t.confirmed()


def bytes_needed(q: Tensor, k: Tensor, v: Tensor, left, right, block_m: int, block_n: int) -> int:
    """Of K, as of V, all rows of blocks together."""
    kinds = Kernel().tile_kinds(q.shape[2], k.shape[2], left, right, block_m, block_n)
    sizes = torch.tensor([keys.stop - keys.start for keys in blocks(k.shape[2], block_n)])
    return int(((kinds != SKIP) * sizes).sum()) * q.shape[0] * q.shape[1] * k[0, 0, 0].nbytes


def bytes_read(meter: object, name: str) -> float:
    """What the student's process reports of one operand: infinite if it is no count."""
    read = meter.get("bytes_read") if isinstance(meter, dict) else None
    count = read.get(name, 0) if isinstance(read, dict) else None
    return count if isinstance(count, int) else math.inf


@exercise.property(
    points=3,
    hints=[
        "Three loops: the tiles cut by the left edge, those in the middle, those cut by the right edge.",
        "The middle begins where the last query's window does, rounded up, and ends where the first query sees nothing more, "
        "rounded down.",
    ],
)
def counts(t: Trial) -> None:
    """count_tiles: exactly the tiles that must be masked are masked, and the others are taken whole"""
    for queries, keys, left, right, block_m, block_n in (
        (48, 48, None, 0, 16, 16),
        (30, 90, t.integer(36, 39), 4, 16, 16),
        (36, 70, t.integer(28, 31), None, 32, 16),
        (40, 24, None, 0, 32, 16),
        (60, 60, 3, t.integer(33, 40), 32, 16),
    ):
        t.check(count_tiles, *draw(t, queries, keys), left, right, block_m, block_n)
    arguments = (*draw(t, 20, 40, batch=2), 5, 0, 16, 16)
    reply = t.ask("count_tiles", arguments, meter={})
    t.judge(count_tiles, reply.value, *arguments)
    if not isinstance(reply.meter, dict) or not reply.meter.get("launches"):
        t.fail_as(NO_KERNEL, got="no kernel was launched", expected="counts that the kernel writes")


@exercise.property(points=1, hints=["tl.store writes into the caller's memory if the pointer is one of the inputs'."])
def inputs_left_alone(t: Trial) -> None:
    """does not change q, k or v"""
    t.check_inputs_untouched(masked_attention, *draw(t, 20, 64), 7, 0, 32, 32)


@exercise.property(
    points=1,
    hints=[
        "The interpreter runs any Python. A GPU's kernel has numbers, blocks, tl's functions and constexprs, and no more.",
        "What do the products of your tiles round to, if their inputs are float32?",
    ],
)
def compiles_for_gpus(t: Trial) -> None:
    """the kernel compiles for GPUs, sm_80 and sm_90, and multiplies float32 in float32"""
    arguments = (*draw(t, 40, 70), 23, 3, 16, 16)
    t.check(masked_attention, *arguments)  # who fails anyway is told so at less expense
    expect_compiled(t, NO_KERNEL, "masked_attention", *draw(t, 20, 40), 7, 0, 16, 16)
