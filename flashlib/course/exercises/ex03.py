"""Checks of ex03: the tiled forward pass with its log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises import drawing
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.mistakes import ASSUMES_CONTIGUOUS, BLOCK_K_IGNORED, KEYS_RESHAPED
from flashlib.course.exercises.online_softmax import ONLINE_MISTAKES
from flashlib.course.exercises.pieces import merged_budget
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.inputs import in_poison, ramp, transposed_in_poison, with_scores_along
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex03",
    file="ex03_tiled_forward.py",
    title="Tiled forward with log-sum-exp",
    chapter="03_tiling",
    difficulty=4,
    importance=5,
    minutes=75,
    forbidden=SDPA,
)

# ------------------------------------------------------------------------------------------------------------- mistakes


def default_scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def attention64(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, scale: float | None = None):
    return reference.oracle(q, k, v, scale=scale)


def attention_budget(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, scale: float | None = None):
    allowed = merged_budget(q, k, v, math.ceil(k.shape[2] / block_k), scale=scale)
    return allowed.out, allowed.lse


def online(model: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A model of scores, v and block, as one of the arguments of `tiled_attention`, in float32.

    All rows may be computed at once: how the queries are cut into blocks changes nothing.
    """

    def on_tiles(q, k, v, block_q, block_k, scale=None):
        scores = q.float() @ k.float().mT * (default_scale(q) if scale is None else scale)
        return model(scores, v.float(), block_k)

    return on_tiles


def without_query_tail(keep_shape: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def model(q, k, v, block_q, block_k, scale=None):
        out, lse = reference.oracle(q, k, v, scale=scale)
        full = q.shape[2] // block_q * block_q
        if not keep_shape:
            return out[:, :, :full], lse[:, :, :full]
        out[:, :, full:], lse[:, :, full:] = 0.0, 0.0
        return out, lse

    return model


def keys_reshaped(q, k, v, block_q, block_k, scale=None):
    tiles = [tile.reshape(tile.mT.shape).mT for tile in k.split(block_k, 2)]
    return reference.oracle(q, torch.cat(tiles, 2), v, scale=scale)


def tiles_stacked(q, k, v, block_q, block_k, scale=None):
    """Tiles of the answer piled up along a new first axis, and that memory read as [B, H, Sq, ...]."""
    out, lse = reference.oracle(q, k, v, scale=scale)
    if q.shape[2] % block_q:
        return out, lse
    return tuple(torch.stack(x.split(block_q, 2)).reshape(x.shape) for x in (out, lse))


def as_dense(q, k, v, block_q, block_k, scale=None) -> Dense:
    sizes = (v.shape[-1], k.shape[-2], q.shape[-2], q.shape[1])
    return Dense(q, k, v, default_scale(q) if scale is None else scale, scale is None, sizes, block=block_k)


# Two of them are among the mistakes of the loop, with their lse.
OF_THE_FORMULA = formula_mistakes(
    as_dense, leave=("exp2-for-exp", "masked-after-softmax", "newest-key-missed", "causal-sees-the-next")
)
MISTAKES = (
    *(mistake for mistake in OF_THE_FORMULA if "scale" in mistake.slug or mistake.slug == "wrong-axis"),
    replace(KEYS_RESHAPED, model=keys_reshaped),
    Misconception(
        "tiles-misplaced",
        "The blocks of queries were put together along the wrong axis: right rows, in the wrong places.",
        "Which axis of out do the blocks follow each other on? stack makes a new axis.",
        tiles_stacked,
    ),
    *(
        Misconception(
            "dropped-query-tail",
            "The last queries were left out: block_q does not divide their number, and the shorter last block counts too.",
            "How many blocks does your loop visit for 10 queries in blocks of 4? How many are there?",
            without_query_tail(keep_shape),
        )
        for keep_shape in (True, False)
    ),
    *(replace(mistake, model=online(mistake.model)) for mistake in ONLINE_MISTAKES),
    *(mistake for mistake in OF_THE_FORMULA if "half" in mistake.slug),
    Misconception(
        "lse-in-half",
        "lse was rounded to the inputs' dtype. Near 10 float16 has steps of 1 / 128, and the backward takes exponentials of it.",
        "With which dtype is the tensor made that lse is written into?",
        lambda q, k, v, *args, scale=None: (
            (exact := reference.oracle(q, k, v, scale=args[2] if len(args) > 2 else scale))[0],
            exact[1].to(q.dtype),
        ),
    ),
)
READ_TOO_OFTEN = Misconception(
    "keys-read-too-often",
    "K and V were read more often than once per block of block_q queries. Slow memory is what tiling is to spare.",
    "When a tile of K is there, how many queries should make use of it before the next one is loaded?",
)

OUT_REWRITTEN = Misconception(
    "out-rewritten",
    "out was written more than once: with the keys in the outer loop, every block of keys fetches the whole of out, and puts it back.",
    "Which loop must be outside, for a block of rows to be done before the next one is begun?",
)
forward = Target(
    "tiled_attention",
    oracle=attention64,
    budget=attention_budget,
    outputs={"out": None, "lse": torch.float32},
    misconceptions=MISTAKES,
)


# ---------------------------------------------------------------------------------------------------------- properties


draw = partial(drawing.draw, batch=2, heads=3, dim=8, v_dim=5)


@exercise.property(
    points=3,
    hints=[
        "Write the shape beside each line: q tile [B, H, block_q, D], scores [B, H, block_q, block_k], m and l [B, H, block_q].",
        "The outer loop takes a block of queries and starts with m = -inf, l = 0, acc = 0; the inner one takes the keys.",
    ],
)
def whole_tiles(t: Trial) -> None:
    """out and lse agree with float64 where tiles divide the lengths, and Sq, Sk, D and Dv all differ"""
    t.check(forward, *draw(t, 8, 12), 4, 3)
    t.check(forward, *draw(t, 6, 20, dim=16, v_dim=7), 2, 10)
    t.check(forward, *draw(t, 12, 4, dim=4, v_dim=12), 6, 4)


@exercise.property(
    points=3,
    hints=[
        "How long is the last block, if 23 keys are cut into blocks of 5? And the last block of 11 queries, cut by 4?",
        "A slice that ends beyond the tensor is cut off by itself. Does anything else of yours rely on the block size?",
    ],
)
def ragged_tails(t: Trial) -> None:
    """queries and keys that do not fill their last block count too, and nothing beyond them does"""
    t.check(forward, *draw(t, 12, 23), 4, 5)
    t.check(forward, *draw(t, 11, 20), 4, 5)
    q, k, v = draw(t, 7, 13)
    for block_q, block_k in ((3, 4), (16, 32)):
        t.check(forward, q, k, v, block_q, block_k)
        plain, strided = (q, k, v, block_q, block_k), (*(in_poison(x) for x in (q, k, v)), block_q, block_k)
        t.check(forward, *strided, if_it_raises=ASSUMES_CONTIGUOUS, but_not_on=plain)


@exercise.property(
    points=2,
    hints=[
        "Do a 1 x 1 tile by hand: which line assumes more than one key, or more than one query?",
        "The state's shape is that of the block of queries at hand, not of block_q.",
    ],
)
def any_tile_size(t: Trial) -> None:
    """tile sizes never change the result, down to one query by one key"""
    q, k, v = draw(t, 7, 10)
    for block_q, block_k in ((1, 1), (7, 1), (1, 10), (5, 3), (64, 128), (2, 64)):
        t.check(forward, q, k, v, block_q, block_k)
    t.check(forward, *draw(t, 1, 9), 4, 4)
    t.check(forward, *draw(t, 6, 1), 4, 4)


@exercise.property(
    points=2,
    hints=[
        "Print m, l and acc after each tile, and compare them with a softmax over the keys so far.",
        "exp(s - m_new) = exp(s - m_old) * exp(m_old - m_new), for every s at once.",
    ],
)
def rising_maxima(t: Trial) -> None:
    """right when every tile of keys raises the maximum"""
    q, k, v = draw(t, 6, 40)
    t.check(forward, *with_scores_along(q, k, ramp(40, -4, 4)), v, 4, 8)
    t.check(forward, *with_scores_along(q, k, ramp(40, -60, 60)), v, 4, 10)


@exercise.property(
    points=1,
    hints=[
        "What should m be after the second tile, if the first held the largest score?",
        "m is the larger of the old m and the tile's maximum, row by row.",
    ],
)
def falling_maxima(t: Trial) -> None:
    """right when the first tile of keys holds the maximum"""
    q, k, v = draw(t, 6, 40)
    t.check(forward, *with_scores_along(q, k, ramp(40, 4, -4)), v, 4, 8)
    t.check(forward, *with_scores_along(q, k, ramp(40, 80, -100)), v, 4, 10)


@exercise.property(
    points=2,
    hints=[
        "If every exponential of a row is 0 or infinite, which number did you subtract from its scores?",
        "m starts at -inf, not at 0, and each row of the tile has its own.",
    ],
)
def rows_of_any_height(t: Trial) -> None:
    """rows of very large, of very negative and of very different scores are all right"""
    q, k, v = draw(t, 6, 12)
    t.check(forward, *with_scores_along(q, k, ramp(12, 200, 202)), v, 4, 5)
    t.check(forward, *with_scores_along(q, k, ramp(12, -2000, -2002)), v, 4, 5)
    q, k = with_scores_along(q, k, ramp(12, 400, 402))
    q[..., -1] *= t.permutation(6) - 2.0
    t.check(forward, q, k, v, 6, 5)


@exercise.property(
    points=1,
    hints=[
        "The caller's scale replaces the default; it does not multiply it.",
        "Is the scale multiplied in exactly once, to q or to the scores?",
    ],
)
def given_scale(t: Trial) -> None:
    """uses the scale it is given"""
    t.check(forward, *draw(t, 5, 9), 2, 4, scale=float(t.uniform(0.6, 0.9, 1)))
    t.check(forward, *draw(t, 5, 9), 2, 4, 1.0)


@exercise.property(
    points=2,
    hints=[
        "What is the largest number that float16 can hold? How large may l become?",
        "Convert a tile to float32 when you load it, and the result once, when you store it.",
    ],
)
def half_precision(t: Trial) -> None:
    """float16 and bfloat16: sums in float32, however long the row, out in the inputs' dtype, lse in float32"""
    # The maximum comes first and all other weights are 0.9, so l ends at 76,000, and acc passes that halfway: too much for
    # float16, which ends at 65504. What acc comes to at last would fit. Scores near -8 keep the budget of lse realistic:
    # naive attention rounds them in float16.
    keys = 84_000
    profile = torch.full((keys,), -8.0).index_fill(0, torch.tensor(0), -7.9)
    q, k = (0.1 * t.randn(1, 1, size, 4, dtype=torch.float16) for size in (4, keys))
    v = torch.cat([t.uniform(1.9, 2.1, keys // 2, 1), t.uniform(-0.7, -0.5, keys // 2, 1)]).half()
    t.check(forward, *with_scores_along(q, k, profile), v[None, None], 4, keys // 4)
    t.check(forward, *draw(t, 9, 33, dim=32, dtype=torch.float16), 4, 8)
    t.check(forward, *draw(t, 9, 33, dim=32, dtype=torch.bfloat16), 4, 8)


@exercise.property(
    points=1,
    hints=[
        "A tensor in any memory layout has the same values. Do not rely on where they lie.",
        "Slices and matrix products take any strides. Which of your operations asks for contiguous memory?",
    ],
)
def transposed_inputs(t: Trial) -> None:
    """reads inputs of any strides right"""
    q, k, v = draw(t, 6, 13)
    t.check(forward, q, k, v, 3, 5)
    strided = [transposed_in_poison(x) for x in (q, k, v)]
    t.check(forward, *strided, 3, 5, if_it_raises=ASSUMES_CONTIGUOUS, but_not_on=(q, k, v, 3, 5))


@exercise.property(
    points=1, hints=["x = x * y makes a new tensor. x *= y, x.mul_(y) and x[i] = y change the one that x names."]
)
def inputs_left_alone(t: Trial) -> None:
    """does not change q, k or v"""
    t.check_inputs_untouched(forward, *draw(t, 6, 13), 3, 5)


@exercise.property(
    points=10,
    hints=[
        "The scores of one block of queries with all keys are too much as well. What does the second loop run over?",
        "Make the scores of a tile from a slice of q and a slice of k, inside both loops.",
    ],
)
def linear_memory(t: Trial) -> None:
    """at 4096 x 4096 only one tile of scores exists at a time"""
    t.check(forward, *draw(t, 12, 20, batch=1, heads=2), 4, 5)  # who fails anyway is told so at less expense
    length, heads, dim, block = 4096, 1, 32, 256
    q, k, v = draw(t, length, length, batch=1, heads=heads, dim=dim, v_dim=dim)
    some = t.permutation(length)[:64]
    t.check_tiled(
        forward,
        q,
        k,
        v,
        block,
        block,
        largest=2 * heads * max(length * dim, block * block),
        memory=20 * MIB,  # the scores take 64 MiB
        first=(q[:, :, :9], k[:, :, :9], v[:, :, :9], 4, 4),
        sample=lambda x: x[:, :, some],
        says="You made the scores of more than one tile at a time. The point of tiling is never to hold them.",
    )


@exercise.property(
    points=2,
    hints=[
        "Count the reads of K for Sq = 96 and block_q = 32: three blocks of queries, so three times.",
        "Is block_q used as it is given, and not some number of your own?",
    ],
)
def memory_traffic(t: Trial) -> None:
    """K and V are read at most once per block of queries"""
    q, k, v = draw(t, 96, 120)
    for block_q in (32, 96, 40):
        t.check(forward, q, k, v, block_q, 24)
        reply = t.ask("tiled_attention", (q, k, v, block_q, 24), meter={"q": q, "k": k, "v": v})
        blocks_of_queries = math.ceil(q.shape[2] / block_q)
        for name, x in (("k", k), ("v", v)):
            read = reply.times_read(name, x)
            if read > blocks_of_queries:
                expected = f"at most {blocks_of_queries} with block_q={block_q} and Sq={q.shape[2]}"
                t.fail_as(READ_TOO_OFTEN, got=f"{name} read {read:.3g} times", expected=expected)
    expect_traffic_of_rows_outside(t)
    q, k, v = draw(t, 256, 256, batch=1, heads=1, dim=4, v_dim=4)
    made, allowed = t.ask("tiled_attention", (q, k, v, 64, 16), meter={}).meter["largest_elements"], 2 * 64 * 16
    if allowed < made < 64 * 256:  # all keys at once are another check's
        got = f"a tensor of {made:,} elements, with tiles of 64 x 16"
        t.fail_as(BLOCK_K_IGNORED, got=got, expected=f"at most {allowed:,}")
    if made <= allowed:
        t.expect_calls_to_grow("tiled_attention", (q, k, v, 8, 128), (q, k, v, 8, 16), BLOCK_K_IGNORED)
        see_traffic_from_outside(t)


def see_traffic_from_outside(t: Trial) -> None:
    """The inputs are handed out piece by piece, and there is room for a tile of each.

    Rows outside: q comes once, and K and V once for each block of rows, in turn, a tile at a time.
    """
    dim, block_q, block_k, queries, keys = 64, 32, 1024, 64, 32_768
    q, k, v = draw(t, queries, keys, batch=1, heads=1, dim=dim, v_dim=dim)
    room = {"q": (q, block_q * dim * 4), "k": (k, block_k * dim * 4), "v": (v, block_k * dim * 4)}
    few = 2 * block_k  # keys in tiles of the same size, so that only what grows with their number is seen
    first = q[:, :, :block_q].clone(), k[:, :, :few].clone(), v[:, :, :few].clone(), block_q, block_k
    reply = t.watch(
        "tiled_attention", q, k, v, block_q, block_k, first=first, room=room, memory=6 * MIB, copied=READ_TOO_OFTEN
    )
    if reply is None:
        return
    out, lse = t.expect_tuple(reply.value, "out", "lse")
    out, lse = t.expect_tensor(out, "out", q.shape), t.expect_tensor(lse, "lse", q.shape[:3])
    t.judge(forward, (out[:, :, ::16], lse[:, :, ::16]), q[:, :, ::16], k, v, block_q, block_k)
    seen, passes = reply.seen, queries // block_q
    for name in ("k", "v"):
        if (times := seen.times(name)) > passes:
            t.fail_as(READ_TOO_OFTEN, got=f"{name} read {times:.3g} times", expected=f"at most {passes} times")
    if (times := seen.times("q")) > 1.5:
        t.fail_as(OUT_REWRITTEN, got=f"q read {times:.3g} times, by rows that come again", expected="once")
    pieces, in_tile = median(seen.runs("k")), block_k * dim * 4 // seen.piece["k"]
    if not 0.75 * in_tile <= pieces <= 1.5 * in_tile:
        got = f"about {pieces * block_k // in_tile:,.0f} keys read between values and values"
        t.fail_as(BLOCK_K_IGNORED, got=got, expected=f"a tile of {block_k:,}")
    t.confirmed()


def expect_traffic_of_rows_outside(t: Trial) -> None:
    """Count with a fast memory that holds a tile and the state of a block of rows, but not the whole of any tensor.

    Then out is written once, whatever a block gathers on the way; and what is read of K and V counts, or of copies of them.
    """
    length, dim, block, fast_memory = 256, 64, 16, 48 * 1024  # bytes; q, k, v and out have 64 KiB each
    q, k, v = draw(t, length, length, batch=1, heads=1, dim=dim, v_dim=dim)
    arguments = q, k, v, block, block
    meter = t.ask("tiled_attention", arguments, meter={"q": q, "k": k, "v": v}, fast_memory=fast_memory).meter
    if meter["largest_elements"] > 2 * q.numel():
        return  # all the scores at once are another check's
    written = sum(meter["bytes_written"].values()) / q.nbytes
    # Rows outside: about 1, and 3 if inputs are copied or the parts of out put together. Keys outside: 17.
    if written > 14:
        t.fail_as(OUT_REWRITTEN, got=f"{written:.3g} times the size of out written", expected="about once")
    read = sum(meter["bytes_read"].get(name, 0) for name in ("k", "v", "made inside")) / (k.nbytes + v.nbytes)
    passes = length // block
    if read > 3 * passes:  # who converts a tile to float64 reads it in four bytes, and again in eight
        got = f"K, V and what was made of them read {read:.3g} times"
        t.fail_as(READ_TOO_OFTEN, got=got, expected=f"at most {passes} times, with {passes} blocks of queries")
