"""Checks of ex07: the forward pass as a Triton kernel, run and watched in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises import drawing
from flashlib.course.exercises.compiled import expect_compiled
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.mistakes import ASSUMES_CONTIGUOUS, EXP2_FOR_EXP
from flashlib.course.exercises.online_softmax import ONLINE_MISTAKES
from flashlib.course.exercises.pieces import merged_budget
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.inputs import in_poison, ramp, transposed_in_poison, with_scores_along
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex07",
    file="ex07_triton_forward.py",
    title="FlashAttention forward in Triton",
    chapter="07_flash_attention_in_triton",
    difficulty=4,
    importance=5,
    minutes=90,
    forbidden=SDPA,
    preload=("triton",),
    environment={"TRITON_INTERPRET": "1"},
)

# ------------------------------------------------------------------------------------------------------------- mistakes


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def padded(head_dim: int) -> int:
    """The power of two that holds a head dimension."""
    return 1 << (head_dim - 1).bit_length()


def default_scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def attention64(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, block_m: int = 64, block_n: int = 32):
    return reference.oracle(q, k, v, scale=scale)


def attention_budget(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, block_m: int = 64, block_n: int = 32):
    allowed = merged_budget(q, k, v, math.ceil(k.shape[2] / block_n), scale=scale)
    return allowed.out, allowed.lse


def heads_shared(q: Tensor, x: Tensor) -> Tensor:
    """One KV head for each query head, in float32."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def online(model: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A model of scores, v and block (see `online_softmax`), as one of the arguments of `attention_forward`."""

    def on_tiles(q, k, v, scale=None, block_m=64, block_n=32):
        scores = q.float() @ heads_shared(q, k).mT * (default_scale(q) if scale is None else scale)
        return model(scores, heads_shared(q, v), block_n)

    return on_tiles


def with_scale(scale_of: Callable[[Tensor, float | None], float]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention with another scale, made from q and the scale that was given."""
    return lambda q, k, v, scale=None, block_m=64, block_n=32: reference.oracle(q, k, v, scale=scale_of(q, scale))


def in_base_2(lse_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """2 to the power of the scores instead of e, with an lse made from the rows' maxima and sums."""

    def model(q, k, v, scale=None, block_m=64, block_n=32):
        scale = default_scale(q) if scale is None else scale
        scores = q.double() @ heads_shared(q, k).double().mT * scale
        m = scores.amax(-1)
        l = torch.exp2(scores - m[..., None]).sum(-1)
        return reference.oracle(q, k, v, scale=scale * math.log(2))[0], lse_of(m, l)

    return model


def with_lse(lse_of: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right output, with an lse made in another way from the rows' maxima and sums, and the scale."""

    def model(q, k, v, scale=None, block_m=64, block_n=32):
        scale = default_scale(q) if scale is None else scale
        scores = q.double() @ heads_shared(q, k).double().mT * scale
        m = scores.amax(-1)
        return reference.oracle(q, k, v, scale=scale)[0], lse_of(m, torch.exp(scores - m[..., None]).sum(-1), scale)

    return model


def written_only(
    chosen: Callable[[Tensor, int], tuple[slice, slice]], elsewhere: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right answer in the chosen heads (of all batch entries, counted through) and rows.

    Elsewhere is what memory holds that nobody wrote, NaN, or the zeros that it was filled with.
    """

    def model(q, k, v, scale=None, block_m=64, block_n=32):
        heads, rows = chosen(q, block_m)
        answers = []
        for exact in reference.oracle(q, k, v, scale=scale):
            written = torch.full_like(exact.flatten(0, 1), elsewhere)
            written[heads, rows] = exact.flatten(0, 1)[heads, rows]
            answers.append(written.view_as(exact))
        return tuple(answers)

    return model


def axes_swapped(q: Tensor, block_m: int) -> tuple[slice, slice]:
    """With the program ids exchanged there is a head for each block of rows, and a block of rows for each head."""
    heads, row_blocks = q.shape[0] * q.shape[1], blocks(q.shape[2], block_m)
    return slice(0, row_blocks), slice(0, heads * block_m)


def with_kv(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention with other keys and values: `of(q, k)` and `of(q, v)`, with a head for each head of q."""
    return lambda q, k, v, scale=None, block_m=64, block_n=32: reference.oracle(q, of(q, k), of(q, v), scale=scale)


def contiguous_reads(q, k, v, scale=None, block_m=64, block_n=32):
    """The memory from the first element on, read as if the tensor lay there in the order of its axes."""
    return reference.oracle(*(_dense_from_first(x) for x in (q, k, v)), scale=scale)


def _dense_from_first(x: Tensor) -> Tensor:
    flat = x.as_strided((min(x.numel(), _elements_from(x)),), (1,))
    return torch.cat([flat, flat.new_full((x.numel() - flat.numel(),), math.nan)]).view(x.shape)


def _elements_from(x: Tensor) -> int:
    return x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()


def as_dense(q, k, v, scale=None, block_m=64, block_n=32) -> Dense:
    shared = (heads_shared(q, x).to(q.dtype) for x in (k, v))
    sizes = (v.shape[-2], q.shape[-2], q.shape[1], k.shape[1], block_n)
    return Dense(q, *shared, default_scale(q) if scale is None else scale, scale is None, sizes, block=block_n)


# exp2 is this exercise's own matter.
OF_THE_FORMULA = formula_mistakes(
    as_dense, leave=("exp2-for-exp", "masked-after-softmax", "newest-key-missed", "causal-sees-the-next")
)
LSE_UNITS = "With exp2, m and log2(l) count in units of log 2. lse is the natural logarithm of the sum of exp(score)."
LSE_HINT = "log(x) = log2(x) * log(2). Which of your two terms is in which unit?"
MISTAKES = (
    *(
        Misconception(slug, says, hint, written_only(chosen, elsewhere))
        for slug, says, hint, chosen in (
            (
                "program-axes-swapped",
                "The two program ids are taken for each other: as many heads are computed as there are blocks of rows.",
                "Compare the order of your grid with what you take from program_id(0) and program_id(1).",
                axes_swapped,
            ),
            (
                "dropped-query-tail",
                "The last queries were never computed: block_m does not divide their number, and the grid rounds down.",
                "How many programs do 10 queries in blocks of 4 need?",
                lambda q, m: (slice(None), slice(0, max(m, q.shape[2] // m * m))),
            ),
        )
        for elsewhere in (math.nan, 0.0)
    ),
    Misconception(
        "first-batch-only",
        "All batch entries got the keys and values of the first.",
        "Which strides take you from one batch entry to the next?",
        with_kv(lambda q, x: x[:1].expand_as(x)),
    ),
    Misconception(
        "heads-interleaved",
        "Query head h looked at KV head h % Hkv. Heads of a group are neighbors: h // group_size.",
        "With 4 query heads and 2 KV heads, which query heads share KV head 0?",
        with_kv(lambda q, x: x.repeat(1, q.shape[1] // x.shape[1], 1, 1)),
    ),
    Misconception(
        "first-head-only",
        "All heads looked at KV head 0.",
        "Which stride takes you from one KV head to the next?",
        with_kv(lambda q, x: x[:, :1].expand_as(x)),
    ),
    *(mistake for mistake in OF_THE_FORMULA if mistake.slug in ("missing-scale", "scaled-twice", "wrong-axis")),
    Misconception(
        "scaled-by-block",
        "The scale was made from the width of the block, not from D.",
        "D is 24 and the block is 32 wide. Of which is 1 / sqrt the scale?",
        with_scale(lambda q, scale: 1 / math.sqrt(padded(q.shape[-1])) if scale is None else scale),
    ),
    *(mistake for mistake in OF_THE_FORMULA if mistake.slug == "scale-ignored"),
    *(
        replace(EXP2_FOR_EXP, model=in_base_2(lse_of))
        for lse_of in (
            lambda m, l: m + l.log(),
            lambda m, l: m + l.log2(),
            lambda m, l: (m + l.log2()) * math.log(2),
            lambda m, l: m * math.log(2) + l.log2(),
        )
    ),
    *(
        Misconception("lse-base-2", f"{says} {LSE_UNITS}", LSE_HINT, with_lse(lse_of))
        for says, lse_of in (
            ("lse is in base 2.", lambda m, l, scale: (m + l.log()) / math.log(2)),
            ("m was converted, log2(l) was not.", lambda m, l, scale: m + l.log2()),
            ("log2(l) was converted, m was not.", lambda m, l, scale: m / math.log(2) + l.log()),
        )
    ),
    Misconception(
        "lse-unscaled",
        "In lse the maximum is that of the raw products: the scale is missing there.",
        "In which units does your running maximum count?",
        with_lse(lambda m, l, scale: m / scale + l.log()),
    ),
    *(replace(mistake, model=online(mistake.model)) for mistake in ONLINE_MISTAKES),
    *(mistake for mistake in OF_THE_FORMULA if "half" in mistake.slug or mistake.slug == "scaled-by-another-size"),
    replace(
        ASSUMES_CONTIGUOUS,
        says="The kernel read memory as if it lay in the order of the axes. A transposed tensor does not.",
        hint="Do all the strides of q, k and v reach the kernel, and is each index multiplied by its own?",
        model=contiguous_reads,
    ),
)
NOT_IN_A_KERNEL = Misconception(
    "not-in-a-kernel",
    "PyTorch's operations read q, k or v. This exercise is to do it in a Triton kernel.",
    "PyTorch allocates out and lse and launches. All else happens in the kernel.",
)
READ_BEFORE = Misconception(
    "read-before-the-kernel",
    "PyTorch's operations passed over q, k or v beside the kernel: memory traffic that strides and an integer division spare.",
    "What does contiguous(), repeat_interleave() or a product with the scale do for you that the kernel cannot?",
)
READ_TOO_OFTEN = Misconception(
    "keys-read-too-often",
    "K or V was loaded more often than once for each block of queries.",
    "When a tile of K is there, how many queries should make use of it?",
)

forward = Target(
    "attention_forward",
    oracle=attention64,
    budget=attention_budget,
    outputs={"out": None, "lse": torch.float32},
    misconceptions=MISTAKES,
)

# ---------------------------------------------------------------------------------------------------------- properties


draw = partial(drawing.draw, kv_heads=1)


@exercise.property(
    points=3,
    hints=[
        "Start with one program and one tile: load q, k and v, two tl.dot, one division, two stores.",
        "Write the shape beside each line: q [BLOCK_M, BLOCK_D], k [BLOCK_N, BLOCK_D], scores [BLOCK_M, BLOCK_N], m and l [BLOCK_M].",
        "Then put the middle into `for n in range(0, kv_len, BLOCK_N)`, with m = -inf, l = 0 and acc = 0 before it.",
    ],
)
def one_program(t: Trial) -> None:
    """one head and one block of queries, with one tile of keys and with several"""
    t.check(forward, *draw(t, 16, 32), None, 16, 32)
    t.check(forward, *draw(t, 32, 48), None, 32, 16)


@exercise.property(
    points=3,
    hints=[
        "Print tl.program_id(0) and tl.program_id(1) in the kernel. Which rows of which head are that?",
        "b, h = i // Hq, i % Hq. A KV head has its own number, and its own strides.",
    ],
)
def programs_and_heads(t: Trial) -> None:
    """several blocks of queries, batch entries and heads, and query heads that share KV heads"""
    t.check(forward, *draw(t, 32, 16, heads=3, kv_heads=3), None, 16, 16)
    t.check(forward, *draw(t, 16, 16, batch=2, heads=4, kv_heads=2), None, 16, 16)


@exercise.property(
    points=3,
    hints=[
        "The last block of 21 queries in blocks of 16 has 5. What do the other lanes load, and where do they store?",
        "A lane behind the last key must not be loaded, and its score must be -inf: a 0 has the weight exp(0).",
    ],
)
def ragged_tails(t: Trial) -> None:
    """lengths that the blocks do not divide, and blocks larger than the lengths"""
    t.check(forward, *draw(t, 21, 37, heads=2, kv_heads=2), None, 16, 32)
    t.check(forward, *draw(t, 9, 13), None, 32, 64)
    t.check(forward, *draw(t, 1, 1), None, 16, 16)


@exercise.property(
    points=2,
    hints=[
        "tl.arange takes a power of two. What is the next one after 24?",
        "Columns beyond D load 0: they add nothing to a product. And they are not stored.",
    ],
)
def any_head_dim(t: Trial) -> None:
    """head dimensions from 16 to 128, powers of two or not"""
    t.check(forward, *draw(t, 18, 35, dim=24, heads=2, kv_heads=2), None, 32, 32)
    t.check(forward, *draw(t, 16, 32, dim=80), None, 16, 32)
    t.check(forward, *draw(t, 16, 32, dim=128), None, 16, 32)


@exercise.property(
    points=2,
    hints=[
        "x.stride() gives one stride for each axis, in elements. Which of them do you multiply with what?",
        "The same kernel reads [B, S, H, D] memory when it gets that tensor's strides.",
    ],
)
def any_strides(t: Trial) -> None:
    """inputs of any strides, with NaN between their elements"""
    interleaved = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(t, 16, 20, heads=2, kv_heads=2))
    t.check(forward, *interleaved, None, 16, 32)
    q, k, v = draw(t, 16, 20, batch=2, heads=2, dim=24)
    t.check(forward, transposed_in_poison(q), transposed_in_poison(k), in_poison(v.mT).mT, None, 16, 32)


@exercise.property(
    points=2,
    hints=[
        "Print m, l and acc after each tile, and compare them with a softmax over the keys so far.",
        "exp(s - m_new) = exp(s - m_old) * exp(m_old - m_new), for every s at once.",
    ],
)
def rising_maxima(t: Trial) -> None:
    """right when every tile of keys raises the maximum"""
    q, k, v = draw(t, 6, 48)
    t.check(forward, *with_scores_along(q, k, ramp(48, -4, 4)), v, None, 16, 16)
    t.check(forward, *with_scores_along(q, k, ramp(48, -60, 60)), v, None, 16, 16)


@exercise.property(
    points=1,
    hints=[
        "What should m be after the second tile, if the first held the largest score?",
        "m is the larger of the old m and the tile's maximum, row by row.",
    ],
)
def falling_maxima(t: Trial) -> None:
    """right when the first tile of keys holds the maximum"""
    q, k, v = draw(t, 6, 48)
    t.check(forward, *with_scores_along(q, k, ramp(48, 4, -4)), v, None, 16, 16)
    t.check(forward, *with_scores_along(q, k, ramp(48, 80, -100)), v, None, 16, 16)


@exercise.property(
    points=2,
    hints=[
        "If every exponential of a row is 0 or infinite, which number did you subtract from its scores?",
        "m starts at -inf, not at 0, and each row of the tile has its own: tl.max(scores, 1).",
    ],
)
def rows_of_any_height(t: Trial) -> None:
    """rows of very large, of very negative and of very different scores are all right"""
    q, k, v = draw(t, 6, 32)
    t.check(forward, *with_scores_along(q, k, ramp(32, 200, 202)), v, None, 16, 16)
    # Then those that tell one maximum for a whole tile from one that starts at 0; in the last check the two are the same.
    mixed_q, mixed_k = with_scores_along(q, k, ramp(32, 400, 402))
    mixed_q[..., -1] *= t.permutation(6) - 2.0
    t.check(forward, mixed_q, mixed_k, v, None, 16, 16)
    t.check(forward, *with_scores_along(q, k, ramp(32, -2000, -2002)), v, None, 16, 16)


@exercise.property(
    points=1,
    hints=[
        "The caller's scale replaces the default; it does not multiply it.",
        "Is the scale multiplied in exactly once, to q or to the scores?",
    ],
)
def given_scale(t: Trial) -> None:
    """uses the scale it is given"""
    t.check(forward, *draw(t, 16, 32), float(t.uniform(0.6, 0.9, 1)), 16, 32)
    t.check(forward, *draw(t, 16, 32), scale=1.0, block_m=16, block_n=32)


@exercise.property(
    points=2,
    hints=[
        "tl.dot takes two float16 tiles and sums in float32. Which other sums does your kernel have?",
        "p must have v's dtype for the second tl.dot. l is summed from p before that.",
        "A pointer knows its dtype: p_out.dtype.element_ty. Convert once, when you store.",
    ],
)
def half_precision(t: Trial) -> None:
    """float16: sums in float32, out in float16, lse in float32"""
    # The first key has the maximum and all others weigh exp(-0.1), so that a sum in float16 is rounded in the same direction
    # at every tile; and with values around 400 acc passes 65504, where float16 ends.
    keys = 256
    profile = torch.full((keys,), -0.1).index_fill(0, torch.tensor(0), 0.0)
    q, k = (0.01 * t.randn(1, 1, size, 16, dtype=torch.float16) for size in (4, keys))
    v = t.uniform(380, 420, 1, 1, keys, 16, dtype=torch.float16)
    t.check(forward, *with_scores_along(q, k, profile), v, None, 16, 32)
    t.check(forward, *draw(t, 20, 33, dim=32, dtype=torch.float16), None, 32, 32)


@exercise.property(points=1, hints=["tl.store writes into the caller's memory if the pointer is one of the inputs'."])
def inputs_left_alone(t: Trial) -> None:
    """does not change q, k or v"""
    t.check_inputs_untouched(forward, *draw(t, 20, 40), None, 32, 32)


@exercise.property(
    points=2,
    hints=[
        "Count the loads of K for Sq = 40 and BLOCK_M = 16: three programs for each query head, so three times.",
        "q.stride() and integer division replace every copy.",
    ],
)
def memory_traffic(t: Trial) -> None:
    """K and V are read once for each block of queries of each query head, by the kernel alone"""
    q, k, v = draw(t, 40, 24, heads=2)
    k = k.mT.contiguous().mT
    reply = t.ask("attention_forward", (q, k, v, None, 32, 32), meter={"q": q, "k": k, "v": v})
    t.judge(forward, reply.value, q, k, v, None, 32, 32)
    meter = reply.meter
    if calls := torch_calls(meter):
        mistake = READ_BEFORE if meter["launches"] else NOT_IN_A_KERNEL
        t.fail_as(mistake, got=", ".join(calls), expected="nothing but allocations beside the kernel")
    expected = blocks(40, 32) * 2
    for name, x in (("k", k), ("v", v)):
        read = reply.times_read(name, x)
        if read > expected:
            t.fail_as(READ_TOO_OFTEN, got=f"{name} read {read:.3g} times", expected=f"at most {expected} times")
    see_loads_from_outside(t)


def see_loads_from_outside(t: Trial) -> None:
    """K and V are handed out piece by piece, with room for one tile of each: once for each block of queries, from where they lie."""
    queries, keys, block_m, block_n, dim, heads = 64, 512, 32, 64, 64, 2
    q, k, v = draw(t, queries, keys, heads=heads, dim=dim)
    arguments, tile = (q, k, v, None, block_m, block_n), block_n * dim * 4
    first = *draw(t, 2, 2, dim=dim), None, block_m, block_n
    reply = t.watch("attention_forward", *arguments, first=first, room={"k": (k, tile), "v": (v, tile)})
    if reply is None:
        return
    t.judge(forward, reply.value, *arguments)
    expected = queries // block_m * heads
    for name in ("k", "v"):
        times = reply.seen.times(name)
        if times != expected:
            mistake = READ_TOO_OFTEN if times > expected else READ_BEFORE
            t.fail_as(mistake, got=f"{name} read {times:.3g} times", expected=f"{expected} times, from where it lies")
    # That it is a kernel that reads them, and no operation of PyTorch, is the process's own word.


@exercise.property(
    points=3,
    hints=[
        "Which tensors do you make in Python? out and lse are enough.",
        "Which of your blocks has a size that grows with Sk?",
    ],
)
def tiled_in_the_kernel(t: Trial) -> None:
    """the work is done in the kernel, and a program holds one tile of keys at a time"""
    queries, keys, block_m, block_n = 48, 2048, 64, 256
    q, k, v = draw(t, queries, keys)
    t.check(forward, *draw(t, 20, 40), None, 32, 32)  # who fails anyway is told so at less expense
    reply = t.check_tiled(
        forward,
        q,
        k,
        v,
        None,
        block_m,
        block_n,
        largest=queries * keys // 2,
        says="You made the scores of all tiles in a tensor. A program keeps its tile to itself.",
    )
    meter = reply.meter if isinstance(reply.meter, dict) else {}
    if not meter.get("launches"):
        t.fail_as(NOT_IN_A_KERNEL, got="no kernel was launched", expected="a Triton kernel that computes out and lse")
    largest = meter.get("largest_block")
    allowed = 2 * max(block_m, block_n) * q.shape[-1]  # twice: to load K and V together is no mistake
    if not isinstance(largest, int) or largest > allowed:
        t.fail(
            "untiled",
            "A program loaded far more at once than a tile of block_n keys. Its memory must not grow with Sk.",
            got=f"a block of {largest} elements",
            expected=f"at most {block_n} keys x {q.shape[-1]}",
            hint="Which of your blocks has a size that comes from kv_len?",
        )


@exercise.property(
    points=1,
    hints=[
        "The interpreter runs any Python. A GPU's kernel has numbers, blocks, tl's functions and constexprs, and no more.",
        "What do the products of your tiles round to, if their inputs are float32?",
    ],
)
def compiles_for_gpus(t: Trial) -> None:
    """the kernel compiles for GPUs, sm_80 and sm_90, and multiplies float32 in float32"""
    t.check(forward, *draw(t, 20, 40), None, 32, 32)  # who fails anyway is told so at less expense
    expect_compiled(t, NOT_IN_A_KERNEL, "attention_forward", *draw(t, 20, 40), None, 16, 16)


def torch_calls(meter: dict) -> list[str]:
    """The operations of PyTorch that moved data, save those that only fill a new tensor."""
    fills = {"aten.zeros", "aten.full", "aten.zero_", "aten.fill_", "aten.zeros_like", "aten.full_like", "aten.ones"}
    return sorted(name[:40] for name in meter["calls"] if name not in fills)
