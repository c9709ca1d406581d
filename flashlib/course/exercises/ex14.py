"""Checks of ex14: FLOPs, tiles and bytes counted exactly, under bands, grouped heads and splits.

What is right is what :mod:`flashlib.cost` counts, which the tests hold against the loops themselves and against what kernels load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from flashlib.cost.counts import Problem, fa2, formula
from flashlib.cost.visible import Visible
from flashlib.course.grader.exercise import Exercise, Misconception
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex14",
    file="ex14_counting.py",
    title="Counting FLOPs and bytes",
    chapter="15_counting",
    difficulty=2,
    importance=4,
    minutes=50,
)

Width = int | None

# ------------------------------------------------------------------------------------------------------------ the truth


def true_pairs(q_len: int, kv_len: int, left: Width, right: Width) -> int:
    return Visible.band(q_len, kv_len, left=left, right=right).pairs


def problem(q_heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int, v_head_dim: int, left: Width, right: Width, dtype: str = "bf16") -> Problem:  # fmt: skip
    mask = Visible.band(q_len, kv_len, left=left, right=right)
    return Problem(1, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, (mask,), dtype)


def true_flops(*call) -> tuple[int, int]:
    work = formula(problem(*call))
    return work.products, work.exponentials


def true_kinds(q_len: int, kv_len: int, block_q: int, block_k: int, left: Width, right: Width) -> tuple[int, int, int]:
    blocks = Visible.band(q_len, kv_len, left=left, right=right).by_rows(block_q, block_k)
    seen, full = sum(block.seen for block in blocks), sum(block.full for block in blocks)
    return len(blocks) * -(-kv_len // block_k) - seen, seen - full, full


def true_bytes(q_heads, kv_heads, q_len, kv_len, head_dim, block_q, block_k, itemsize, left, right) -> dict[str, int]:
    dtype = {2: "bf16", 4: "fp32"}[itemsize]
    work = fa2(problem(q_heads, kv_heads, q_len, kv_len, head_dim, head_dim, left, right, dtype), block_q, block_k)
    return {**{name: work.read[name] for name in "qkv"}, **{name: work.written[name] for name in ("out", "lse")}}


def decode_model(
    lengths: list[int], q_heads: int, kv_heads: int, head_dim: int, itemsize: int, num_splits: int, *,
    heads: Callable[[int, int], int] = lambda q_heads, kv_heads: kv_heads, of_all: Callable[[Iterable[int]], int] = sum,
    passes: int = 2, size: Callable[[int], int] = lambda itemsize: 4, always: bool = False, lse: int = 1, values: int = 2,
) -> int:  # fmt: skip
    """`decode_bytes`, with one mistake or without.

    Args:
        heads: how many times a key is read, from the heads. of_all: keys of all requests.
        passes: how often partial results cross memory. size: bytes of their numbers. always: also those of a single split.
        lse: numbers in a partial result beside its channels. values: of keys, or of keys and values.
    """
    cache = values * of_all(lengths) * heads(q_heads, kv_heads) * head_dim * itemsize
    partials = (
        len(lengths) * num_splits * q_heads * (head_dim + lse) * size(itemsize) if num_splits > 1 or always else 0
    )
    return cache + 2 * len(lengths) * q_heads * head_dim * itemsize + passes * partials


# ------------------------------------------------------------------------------------------------------------- mistakes


@dataclass(frozen=True)
class Rows:
    """Which keys rows see, with one mistake.

    Attributes:
        top_left: row 0 sits at key 0. later: the window begins so many keys too late. sooner: it ends so many keys too soon.
    """

    top_left: bool = False
    later: int = 0
    sooner: int = 0

    def seen(self, q_len: int, kv_len: int, left: Width, right: Width) -> list[tuple[int, int]]:
        offset = 0 if self.top_left else kv_len - q_len
        rows = []
        for i in range(q_len):
            start = 0 if left is None else max(0, i + offset - left + self.later)
            stop = kv_len if right is None else min(kv_len, i + offset + right + 1 - self.sooner)
            rows.append((start, stop) if start < stop else (0, 0))
        return rows

    def pairs(self, q_len: int, kv_len: int, left: Width, right: Width) -> int:
        return sum(stop - start for start, stop in self.seen(q_len, kv_len, left, right))

    def flops(self, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, left, right) -> tuple[int, int]:
        pairs = q_heads * self.pairs(q_len, kv_len, left, right)
        return 2 * (head_dim + v_head_dim) * pairs, pairs

    def tiles(self, q_len, kv_len, block_q, block_k, left, right) -> list[tuple[int, int, int, int]]:
        """For each tile the fewest and the most keys that a row of it sees, how many it holds, and how many rows."""
        rows, found = self.seen(q_len, kv_len, left, right), []
        for row in range(0, q_len, block_q):
            for key in range(0, kv_len, block_k):
                end, some = min(key + block_k, kv_len), rows[row : row + block_q]
                seen = [max(0, min(stop, end) - max(start, key)) for start, stop in some]
                found.append((min(seen), max(seen), end - key, len(some)))
        return found

    def kinds(self, q_len, kv_len, block_q, block_k, left, right) -> tuple[int, int, int]:
        tiles = self.tiles(q_len, kv_len, block_q, block_k, left, right)
        skipped, full = sum(most == 0 for _, most, _, _ in tiles), sum(least == held for least, _, held, _ in tiles)
        return skipped, len(tiles) - skipped - full, full

    def bytes(
        self, q_heads, kv_heads, q_len, kv_len, head_dim, block_q, block_k, itemsize, left, right
    ) -> dict[str, int]:
        tiles = self.tiles(q_len, kv_len, block_q, block_k, left, right)
        keys = sum(held for _, most, held, _ in tiles if most)
        return operands(q_heads, q_len, keys, head_dim, itemsize)


def operands(q_heads: int, rows: int, keys: int, head_dim: int, itemsize: int, *, kv_heads: int | None = None, lse: int = 4) -> dict[str, int]:  # fmt: skip
    once, passing = q_heads * rows * head_dim * itemsize, (kv_heads or q_heads) * keys * head_dim * itemsize
    return {"q": once, "k": passing, "v": passing, "out": once, "lse": q_heads * rows * lse}


ROWS = (
    (
        "top-left",
        "Row 0 was put at key 0. The last row sits at the last key, so row 0 sits at key kv_len - q_len.",
        "One new row and a cache of 100 keys: which of them may it see, under a causal mask?",
        Rows(top_left=True),
    ),
    (
        "window-begins-late",
        "The key that lies exactly `left` before a row is seen, too.",
        "With left = 0 and right = 0, how many keys does a row see?",
        Rows(later=1),
    ),
    (
        "row-misses-itself",
        "A row ends one key too soon: the key `right` behind it is included, and with right = 0 that is its own.",
        "What does the first row of a causal mask see?",
        Rows(sooner=1),
    ),
)


def about_rows(method: str) -> list[Misconception]:
    return [Misconception(slug, says, hint, getattr(rows, method)) for slug, says, hint, rows in ROWS]


def half(q_len: int, kv_len: int, left: Width, right: Width) -> int:
    """Half of the square wherever the future is hidden, as the papers count."""
    whole = q_len * kv_len
    return whole // 2 if right == 0 and left is None else true_pairs(q_len, kv_len, left, right)


def below_nothing(q_len: int, kv_len: int, left: Width, right: Width) -> int:
    """Rows that see nothing count as less than nothing."""
    total = 0
    for i in range(q_len):
        at = i + kv_len - q_len
        start = 0 if left is None else max(0, at - left)
        stop = kv_len if right is None else min(kv_len, at + right + 1)
        total += stop - start
    return total


HALF = (
    "half-of-the-square",
    "You took half of the square. A causal mask leaves the diagonal as well, and with more keys than rows far more than half.",
    "How many pairs are visible of 1 x 1, and of 1 x 100?",
)
BELOW_NOTHING = (
    "less-than-nothing",
    "A row that sees nothing was counted as fewer than no pairs: its interval ends before it begins.",
    "Five rows and two keys, causal: what does row 0 see?",
)


def with_pairs(pairs: Callable[..., int], *, factor: int = 1, by_kv: bool = False, twice: bool = False, scores: Callable[..., int] | None = None) -> Callable[..., tuple[int, int]]:  # fmt: skip
    """`attention_flops` with one mistake: `factor` on the products over 1, KV heads for query heads, `head_dim` for both products, or
    other exponentials than one for each pair."""

    def model(q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, left, right):
        heads = kv_heads if by_kv else q_heads
        seen = heads * pairs(q_len, kv_len, left, right)
        width = 2 * head_dim if twice else head_dim + v_head_dim
        found = heads * scores(q_len, kv_len, left, right) if scores else seen
        return 2 * width * seen * factor, found

    return model


def all_pairs(q_len: int, kv_len: int, left: Width, right: Width) -> int:
    return q_len * kv_len


PAIR_MISTAKES = [*about_rows("pairs"), Misconception(*HALF, half), Misconception(*BELOW_NOTHING, below_nothing)]
FLOP_MISTAKES = [
    *about_rows("flops"),
    Misconception(*HALF, with_pairs(half)),
    Misconception(*BELOW_NOTHING, with_pairs(below_nothing)),
    Misconception(
        "softmax-factor",
        "The products were multiplied by 3 for the softmax. Exponentials are counted apart: one for each pair, beside hundreds of FLOPs.",
        "How many FLOPs in products are there for each exponential, at head_dim 128?",
        with_pairs(true_pairs, factor=3),
    ),
    Misconception(
        "one-flop-per-multiply-add",
        "A multiply-add was counted as one. It is a multiplication and an addition: 2 FLOPs.",
        "How many operations are in a dot product of two numbers each?",
        lambda *call: (true_flops(*call)[0] // 2, true_flops(*call)[1]),
    ),
    Misconception(
        "kv-heads-counted",
        "KV heads were counted. They share keys, not work: every query head has scores of its own.",
        "Does grouping heads make attention compute less?",
        with_pairs(true_pairs, by_kv=True),
    ),
    Misconception(
        "head-dim-for-both",
        "Both products were given head_dim channels. The second one multiplies weights by values, which have v_head_dim.",
        "What are the shapes of the two products?",
        with_pairs(true_pairs, twice=True),
    ),
    Misconception(
        "hidden-pairs-counted",
        "Pairs that the mask hides were counted.",
        "What is the exponential of a score that is hidden worth?",
        with_pairs(all_pairs),
    ),
    Misconception(
        "hidden-pairs-counted",
        "Exponentials were counted for pairs that the mask hides.",
        "What is the exponential of a score that is hidden worth?",
        with_pairs(true_pairs, scores=all_pairs),
    ),
]  # fmt: skip


def whole_tiles_only(q_len, kv_len, block_q, block_k, left, right) -> tuple[int, int, int]:
    tiles = [tile for tile in Rows().tiles(q_len, kv_len, block_q, block_k, left, right) if tile[2] == block_k and tile[3] == block_q]  # fmt: skip
    skipped, full = sum(most == 0 for _, most, _, _ in tiles), sum(least == held for least, _, held, _ in tiles)
    return skipped, len(tiles) - skipped - full, full


def ends_are_partial(q_len, kv_len, block_q, block_k, left, right) -> tuple[int, int, int]:
    tiles = Rows().tiles(q_len, kv_len, block_q, block_k, left, right)
    skipped = sum(most == 0 for _, most, _, _ in tiles)
    full = sum(least == held == block_k and rows == block_q for least, _, held, rows in tiles)
    return skipped, len(tiles) - skipped - full, full


def by_extremes(q_len, kv_len, block_q, block_k, left, right) -> tuple[int, int, int]:
    """Partial tiles counted as full: whatever is not skipped."""
    skipped, partly, full = true_kinds(q_len, kv_len, block_q, block_k, left, right)
    return skipped, 0, partly + full


TILE_MISTAKES = [
    *about_rows("kinds"),
    Misconception(
        "ends-left-out",
        "The last tiles, which hold fewer rows or keys, were left out.",
        "How many tiles of 16 do 17 keys need?",
        whole_tiles_only,
    ),
    Misconception(
        "ends-always-partial",
        "A tile at the end was called partial because it holds less. It is full if everything that it holds is visible.",
        "Has a kernel to apply a mask to it?",
        ends_are_partial,
    ),
    Misconception(
        "partial-taken-for-full",
        "Tiles of which only some pairs are visible were counted as full.",
        "What distinguishes the tiles on the diagonal from those below it?",
        by_extremes,
    ),
]


def bytes_with(*, by_kv: bool = False, once: bool = False, padded: bool = False, unmasked: bool = False, lse: Callable[[int], int] = lambda itemsize: 4) -> Callable[..., dict[str, int]]:  # fmt: skip
    """`forward_bytes` with one mistake."""

    def model(q_heads, kv_heads, q_len, kv_len, head_dim, block_q, block_k, itemsize, left, right):
        tiles = Rows().tiles(q_len, kv_len, block_q, block_k, left, right)
        keys = sum(block_k if padded else held for _, most, held, _ in tiles if most or unmasked)
        rows = -(-q_len // block_q) * block_q if padded else q_len
        keys = kv_len if once else keys
        found = operands(q_heads, rows, keys, head_dim, itemsize, kv_heads=kv_heads if by_kv else None)
        return {**found, "lse": q_heads * rows * lse(itemsize)}

    return model


BYTE_MISTAKES = [
    *about_rows("bytes"),
    Misconception(
        "keys-loaded-once",
        "K and V were counted once. Each block of rows loads them again: what the cache answers is asked for all the same.",
        "How many blocks of rows are there, and where does each get its keys from?",
        bytes_with(once=True),
    ),
    Misconception(
        "kv-heads-for-query-heads",
        "K and V were counted for each KV head. In this loop every query head works by itself and loads the keys of its group.",
        "How many programs load the keys of KV head 0, if 4 query heads share it?",
        bytes_with(by_kv=True),
    ),
    Misconception(
        "ends-padded",
        "Tiles at the ends were counted as if they were whole. What is not there is not loaded.",
        "17 keys in tiles of 16: how many keys are loaded?",
        bytes_with(padded=True),
    ),
    Misconception(
        "skipped-tiles-loaded",
        "Tiles of which nothing is visible were loaded. Skipping them is the point of classifying them.",
        "What does the first block of rows need, under a causal mask?",
        bytes_with(unmasked=True),
    ),
    Misconception(
        "lse-in-itemsize",
        "The LSE was given the size of q's numbers. It is float32: half of its digits would not do.",
        "In which type are softmax statistics kept?",
        bytes_with(lse=lambda itemsize: itemsize),
    ),
    Misconception(
        "lse-forgotten",
        "The LSE was left out. The backward needs it.",
        "What is stored beside out?",
        bytes_with(lse=lambda itemsize: 0),
    ),
]

DECODE_MISTAKES = [
    Misconception(
        slug, says, hint, lambda *steps, options=options: [decode_model(*step, **options) for step in steps]
    )
    for slug, says, hint, options in (
        (
            "cache-read-by-every-query-head",
            "The cache was read for each query head. The heads of a group read it once, together: that is what grouping is for.",
            "32 query heads share 8 KV heads. How often is a key read?",
            {"heads": lambda q_heads, kv_heads: q_heads},
        ),
        (
            "padded-to-the-longest",
            "Every request was counted with the length of the longest.",
            "What of a slot that nobody has written to?",
            {"of_all": lambda lengths: len(lengths) * max(lengths)},
        ),
        (
            "values-forgotten",
            "Keys were counted, and values were not, or the other way round.",
            "How many numbers does a token take in the cache of one head?",
            {"values": 1},
        ),
        (
            "partials-only-written",
            "Partial results were counted once. They are written, and read again to be merged.",
            "Who reads them?",
            {"passes": 1},
        ),
        (
            "partials-in-itemsize",
            "Partial results were given the size of q's numbers. They are float32 until they are merged.",
            "What would rounding each split's result to 16 bits do to the sum?",
            {"size": lambda itemsize: itemsize},
        ),
        (
            "partials-of-one-split",
            "A single split was given partial results. Its result is the result.",
            "What is there to merge?",
            {"always": True},
        ),
        (
            "partial-lse-forgotten",
            "Partial results were counted without their LSE, and without it they cannot be merged.",
            "By what are two pieces weighed?",
            {"lse": 0},
        ),
    )
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------- properties

BANDS: tuple[tuple[Width, Width], ...] = ((None, None), (None, 0), (5, 0), (None, 3), (4, 2))


def answers(
    t: Trial, function: str, calls: list[tuple], truth: Callable, mistakes: list[Misconception], *, what: str
) -> None:
    """All calls are made, and judged together: a mistake that shows on one of them is named by all."""
    got = [t.call(function, *call) for call in calls]
    listed = [replace_model(mistake) for mistake in mistakes]
    t.tried = f"{function} for each of {calls}"[:160]
    t.expect_equal(got, [truth(*call) for call in calls], what, listed, *calls)


def replace_model(mistake: Misconception) -> Misconception:
    """The model of one call, for a list of them."""
    model = partial(_for_all, mistake.model)
    return Misconception(mistake.slug, mistake.says, mistake.hint, model)


def _for_all(model: Callable, *calls: tuple) -> list:
    return [model(*call) for call in calls]


@exercise.property(
    points=3,
    hints=[
        "Write down the first and the last key that row i sees, for a band without limits first. Where does row 0 sit?",
        "stop - start, but never less than 0, summed over the rows.",
    ],
)
def pairs_of_a_band(t: Trial) -> None:
    """visible_pairs counts exactly: any band, more keys than rows, more rows than keys, and none at all"""
    sizes = [(9, 9), (4, 13), (t.integer(20, 40), t.integer(50, 90)), (17, 6), (1, 30), (0, 5), (5, 0)]
    calls = [(*size, *band) for size in sizes for band in BANDS]
    answers(t, "visible_pairs", calls, true_pairs, PAIR_MISTAKES, what="Some of these counts")


@exercise.property(
    points=3,
    hints=[
        "Score: a dot product of head_dim. Output: for each pair v_head_dim multiply-adds. For how many heads?",
        "2 * (head_dim + v_head_dim) for each visible pair of each query head; and one exponential.",
    ],
)
def flops_of_a_forward(t: Trial) -> None:
    """attention_flops counts products and exponentials of visible pairs, each kind by itself"""
    calls = [
        (8, 2, t.integer(20, 40), t.integer(50, 80), 16, 24, *band) for band in BANDS
    ] + [(6, 3, 12, 12, 64, 32, None, 0), (4, 1, 14, 5, 8, 16, None, 0)]  # fmt: skip
    answers(t, "attention_flops", calls, true_flops, FLOP_MISTAKES, what="Some of these counts")


@exercise.property(
    points=3,
    hints=[
        "For each tile: how many of its keys does each of its rows see?",
        "Skipped if no row sees any; full if every row sees all the keys that the tile holds.",
    ],
)
def kinds_of_tiles(t: Trial) -> None:
    """tile_kinds sorts every tile, those at the ends too"""
    sizes = [(32, 32, 8, 8), (30, 45, 8, 16), (t.integer(33, 47), t.integer(50, 61), 16, 8), (40, 21, 16, 16)]
    calls = [(*size, *band) for size in sizes for band in (*BANDS, (20, 0))]
    answers(t, "tile_kinds", calls, true_kinds, TILE_MISTAKES, what="Some of these counts")


@exercise.property(
    points=4,
    hints=[
        "Take one query head and one block of rows: what does it load, and what does it store?",
        "Count the keys of all tiles that are not skipped, over all blocks of rows. Then multiply by heads, channels and bytes.",
    ],
)
def bytes_of_a_forward(t: Trial) -> None:
    """forward_bytes says what FlashAttention-2's loop asks for, operand by operand"""
    sizes = [(6, 2, 45, t.integer(60, 90), 16, 16, 8), (4, 4, 64, 64, 32, 16, 16), (3, 1, 21, 70, 8, 8, 32)]
    calls = [(*size, itemsize, *band) for size in sizes for itemsize in (2, 4) for band in (*BANDS, (20, 0))]
    answers(t, "forward_bytes", calls, true_bytes, BYTE_MISTAKES, what="Some of these counts")


@exercise.property(
    points=4,
    hints=[
        "One request, one split first: what is read of its cache, and what else is moved?",
        "Then the splits: what does each of them hand over, in which type, and how often does that cross memory?",
    ],
)
def bytes_of_a_decoding_step(t: Trial) -> None:
    """decode_bytes says what a step moves, with one split and with several"""
    lengths = [t.integer(100, 900) for _ in range(4)]
    calls = [
        (lengths, 32, 8, 128, 2, 1), (lengths, 32, 8, 128, 2, 16), ([777], 8, 1, 64, 4, 4), ([50, 5000], 9, 3, 64, 2, 7),
        ([64], 4, 4, 32, 2, 1), ([300, 200, 100], 16, 2, 64, 4, 2),
    ]  # fmt: skip
    got = [t.call("decode_bytes", *call) for call in calls]
    t.tried = f"decode_bytes for each of {calls}"[:160]
    t.expect_equal(got, [decode_model(*call) for call in calls], "Some of these counts", DECODE_MISTAKES, *calls)
