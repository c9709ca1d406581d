"""Checks of ex12: a memory injected chunk by chunk, exact in both meanings of alpha, with bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises.drawing import draw
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.mistakes import ASSUMES_CONTIGUOUS, MISSING_SCALE, NO_MAXIMUM, SCALED_TWICE
from flashlib.course.exercises.pieces import combine64, merged_budget
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.inputs import ramp, transposed_in_poison, with_scores_along
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.sandbox.outcome import Reply
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex12",
    file="ex12_chunked_injection.py",
    title="Chunked KV injection with bounded memory",
    chapter="14_injection_and_prefixes",
    difficulty=4,
    importance=4,
    minutes=75,
    forbidden=SDPA,
)

# -------------------------------------------------------------------------------------------------------------- oracle


def shared(memory: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """``[H, M, D]`` -> ``[B, H, M, D]``."""
    return memory.to(dtype).expand(batch, *memory.shape)


def whole(q, k, v, k_memory, v_memory, gate: float = 0.0) -> tuple[Tensor, Tensor, Tensor, float]:
    """The concatenation as one causal attention problem: q, k, v and its scale.

    One channel more holds what is added to the memory's scores: `gate` / scale in its keys, 1 in every query.
    """
    scale = q.shape[3] ** -0.5
    memory = shared(k_memory, q.shape[0], q.dtype)
    added = memory.new_full((*memory.shape[:3], 1), gate / scale)
    keys = torch.cat([torch.cat([memory, added], 3), torch.cat([k, torch.zeros_like(k[..., :1])], 3)], 2)
    values = torch.cat([shared(v_memory, q.shape[0], q.dtype), v], 2)
    return torch.cat([q, torch.ones_like(q[..., :1])], 3), keys, values, scale


def injected64(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend") -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    local = reference.oracle(q, k, v, causal=True)[0]
    if alpha == 0:
        return local
    *problem, scale = whole(q, k, v, k_memory, v_memory, math.log(alpha) if mode == "gate" else 0.0)
    injected = reference.oracle(*problem, causal=True, scale=scale)[0]
    return injected if mode == "gate" else (1 - alpha) * local + alpha * injected


def injected_budget(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend") -> float:
    local = reference.error_budget(q, k, v, causal=True).out
    if alpha == 0:
        return local
    *problem, scale = whole(q, k, v, k_memory, v_memory, math.log(alpha) if mode == "gate" else 0.0)
    pieces = 1 + math.ceil(k_memory.shape[1] / chunk_size)
    budget = merged_budget(*problem, pieces, causal=True, scale=scale).out
    return budget if mode == "gate" else (1 - alpha) * local + alpha * budget


# ------------------------------------------------------------------------------------------------------------ mistakes

Piece = tuple[Tensor, Tensor]  # out [B, H, Sq, Dv] and lse [B, H, Sq], in float64


def merged(*pieces: Piece) -> Piece:
    return combine64(*(torch.stack(side) for side in zip(*pieces, strict=True)))


def chunks_of(q, k_memory, v_memory, chunk_size, **options) -> list[Piece]:
    """Attention over each chunk alone."""
    keys, values = (shared(x, q.shape[0], torch.float64).split(chunk_size, 2) for x in (k_memory, v_memory))
    return [reference.oracle(q, *chunk, **options) for chunk in zip(keys, values, strict=True)]


def finish(own: Piece, memory: Piece, alpha: float, mode: str) -> Tensor:
    """How a right solution ends."""
    if mode == "gate":
        return merged(own, (memory[0], memory[1] + math.log(alpha)))[0]
    return (1 - alpha) * own[0] + alpha * merged(own, memory)[0]


def mistaken(
    memory_of: Callable[[list[Piece]], Piece] = lambda pieces: merged(*pieces),
    *,
    end: Callable[[Piece, Piece, float, str], Tensor] = finish,
    own_causal: bool = True,
    keep: Callable[[int, int], int] = lambda length, chunk_size: length,
    scale: float | None = None,
    **memory_options,
) -> Callable[..., Tensor]:
    """Injection in float64 with one mistake.

    Args:
        memory_of: makes one piece of those of the chunks.
        end: puts the own piece and the memory's together.
        own_causal: whether the own keys are masked.
        keep: how many keys of the memory are looked at, from M and chunk_size.
        scale: of all scores; None for the right one.
        memory_options: of attention over a chunk.
    """

    def model(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend"):
        q, k, v = q.double(), k.double(), v.double()
        own = reference.oracle(q, k, v, causal=own_causal, scale=scale)
        seen = keep(k_memory.shape[1], chunk_size)
        if alpha == 0 or not seen:
            return own[0]
        pieces = chunks_of(q, k_memory[:, :seen], v_memory[:, :seen], chunk_size, scale=scale, **memory_options)
        return end(own, memory_of(pieces), alpha, mode)

    return model


def chunks_with_own_keys(of_pieces: Callable[[list[Piece]], Tensor]) -> Callable[..., Tensor]:
    """Each chunk is looked at together with the own keys, and then something is made of the results."""

    def model(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend"):
        q, k, v = q.double(), k.double(), v.double()
        own = reference.oracle(q, k, v, causal=True)
        if alpha == 0 or not k_memory.shape[1]:
            return own[0]
        pieces = []
        for out, lse in chunks_of(q, k_memory, v_memory, chunk_size):
            gated = lse + math.log(alpha) if mode == "gate" else lse
            pieces.append(merged(own, (out, gated)))
        injected = of_pieces(pieces)
        return injected if mode == "gate" else (1 - alpha) * own[0] + alpha * injected

    return model


def average(pieces: list[Piece]) -> Piece:
    return tuple(torch.stack(side).mean(0) for side in zip(*pieces, strict=True))


def other_mode(own: Piece, memory: Piece, alpha: float, mode: str) -> Tensor:
    return finish(own, memory, alpha, "blend" if mode == "gate" else "gate")


def numerator_only(own: Piece, memory: Piece, alpha: float, mode: str) -> Tensor:
    """Gating where the weights of the memory's values are multiplied after the softmax."""
    if mode != "gate":
        return finish(own, memory, alpha, mode)
    share = torch.sigmoid(memory[1] - own[1])[..., None]
    return (1 - share) * own[0] + alpha * share * memory[0]


def with_gate(gate: Callable[[float], float]) -> Callable[..., Tensor]:
    """Something else than log(alpha) added to the memory's lse."""

    def end(own: Piece, memory: Piece, alpha: float, mode: str) -> Tensor:
        if mode != "gate":
            return finish(own, memory, alpha, mode)
        return merged(own, (memory[0], memory[1] + gate(alpha)))[0]

    return end


def memory_alone(own: Piece, memory: Piece, alpha: float, mode: str) -> Tensor:
    """Blending with the memory's output instead of the injected one."""
    return finish(own, memory, alpha, mode) if mode == "gate" else (1 - alpha) * own[0] + alpha * memory[0]


def gated_again_and_again(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend"):
    """The running result of the memory is multiplied by alpha with every chunk that follows."""
    q, k, v = q.double(), k.double(), v.double()
    own = reference.oracle(q, k, v, causal=True)
    if alpha == 0 or not k_memory.shape[1]:
        return own[0]
    pieces = chunks_of(q, k_memory, v_memory, chunk_size)
    if mode != "gate":
        return finish(own, merged(*pieces), alpha, mode)
    times = range(len(pieces), 0, -1)
    return merged(own, *((out, lse + n * math.log(alpha)) for n, (out, lse) in zip(times, pieces, strict=True)))[0]


def swapped(own: Piece, memory: Piece, alpha: float, mode: str) -> Tensor:
    """Each output with the weight of the other."""
    gated = memory[1] + math.log(alpha) if mode == "gate" else memory[1]
    injected = merged((memory[0], own[1]), (own[0], gated))[0]
    return injected if mode == "gate" else (1 - alpha) * own[0] + alpha * injected


def weighted_by_length(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend"):
    """The outputs over the memory and over the own keys, by how many keys each has."""
    q, k, v = q.double(), k.double(), v.double()
    own = reference.oracle(q, k, v, causal=True)[0]
    length = k_memory.shape[1]
    if alpha == 0 or not length:
        return own
    memory = reference.oracle(q, *(shared(x, q.shape[0], torch.float64) for x in (k_memory, v_memory)))[0]
    share = length / (length + k.shape[2])
    injected = (1 - share) * own + share * memory
    return injected if mode == "gate" else (1 - alpha) * own + alpha * injected


def as_dense(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend") -> Dense:
    """Both kinds of keys in one softmax, where that is what alpha means: elsewhere the answer is a mixture of two."""
    if alpha != 1 or not k_memory.shape[1]:
        memory = k_memory.new_zeros(k_memory.shape[0], 0, k_memory.shape[2]), v_memory[:, :0]
    else:
        memory = k_memory, v_memory
    keys, values = (torch.cat([shared(x, q.shape[0], q.dtype), y], 2) for x, y in zip(memory, (k, v), strict=True))
    hidden = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).triu(1 + keys.shape[2] - q.shape[2])
    sizes = (k_memory.shape[1], k.shape[2], q.shape[2], q.shape[1], keys.shape[2])
    return Dense(q, keys, values, q.shape[-1] ** -0.5, True, tuple(size for size in sizes if size), hidden=hidden)


def rows_misplaced(*, pack_wrongly: bool) -> Callable[..., Tensor]:
    """The requests' queries as rows of one matrix, put there or taken back without exchanging the two axes."""

    def model(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend"):
        q, k, v = q.double(), k.double(), v.double()
        own = reference.oracle(q, k, v, causal=True)
        if alpha == 0 or not k_memory.shape[1]:
            return own[0]
        batch, heads, q_len, _ = q.shape
        packed = q if pack_wrongly else q.transpose(0, 1)
        rows = packed.reshape(1, heads, batch * q_len, -1)
        memory = reference.oracle(rows, k_memory.double()[None], v_memory.double()[None])
        return finish(own, tuple(x.reshape(batch, heads, q_len, *x.shape[3:]) for x in memory), alpha, mode)

    return model


AVERAGED = (
    "chunks-averaged",
    "The outputs of the chunks were averaged. Each was divided by the sum of its own exponentials: a chunk in which a query "
    "finds nothing counts as much as the one that holds the answer.",
    "Say one chunk has a key with a score of 20 and all other scores are 0. How much should that chunk count?",
)
MISTAKES = (
    Misconception(*AVERAGED, chunks_with_own_keys(lambda pieces: average(pieces)[0])),
    Misconception(*AVERAGED, mistaken(lambda pieces: (average(pieces)[0], merged(*pieces)[1]))),
    Misconception(*AVERAGED, mistaken(average)),
    Misconception(
        "own-keys-in-every-chunk",
        "The request's own keys took part in every chunk, and so were counted as often as there are chunks.",
        "With 10 chunks, how often is exp(score) of an own key in the sum you divide by?",
        chunks_with_own_keys(lambda pieces: merged(*pieces)[0]),
    ),
    Misconception(
        "last-chunk-only",
        "Only the last chunk counted: each replaced what was known of those before it.",
        "What is left of the first chunk after the second?",
        mistaken(lambda pieces: pieces[-1]),
    ),
    Misconception(
        "first-chunk-only",
        "Only the first chunk of the memory was looked at.",
        "How many chunks does your loop visit for 10 keys and a chunk_size of 4?",
        mistaken(lambda pieces: pieces[0]),
    ),
    Misconception(
        "chunk-tail-dropped",
        "The last keys of the memory were left out: chunk_size does not divide M, and the shorter last chunk counts too.",
        "How many chunks does your loop visit for 10 keys and a chunk_size of 4? How many are there?",
        mistaken(keep=lambda length, chunk_size: length // chunk_size * chunk_size),
    ),
    Misconception(
        "last-chunk-dropped",
        "The last chunk was left out, though it is a whole one.",
        "What is the last start that your loop over the chunks takes? range ends before its end.",
        mistaken(keep=lambda length, chunk_size: max(0, (length - 1) // chunk_size * chunk_size)),
    ),
    Misconception(
        "weighted-by-length",
        "Memory and own keys were weighted by their numbers of keys. A key counts by exp(score), and not all scores are equal.",
        "The memory has a thousand keys with a score of -20, and the request one with 20. Which should the output be close to?",
        weighted_by_length,
    ),
    Misconception(
        "weights-swapped",
        "The memory's output got the weight of the own keys, and the other way round.",
        "Let one lse be far larger than the other. Which output should survive?",
        mistaken(end=swapped),
    ),
    Misconception(
        "memory-masked",
        "A causal mask was put over the memory. It lies before the prompt: every query sees all of it.",
        "Which key of the memory lies in the future of the first query?",
        mistaken(causal=True),
    ),
    Misconception(
        "own-mask-forgotten",
        "The queries saw their own future: causal attention holds among the request's own keys.",
        "Which of its own keys may query i see? The last query sees the last key.",
        mistaken(own_causal=False),
    ),
    Misconception(
        "modes-swapped",
        "The two meanings of alpha were exchanged.",
        "In which of the two does alpha stand inside the softmax?",
        mistaken(end=other_mode),
    ),
    Misconception(
        "alpha-outside-the-sum",
        "In mode gate alpha was multiplied to the memory's weights after the softmax had divided by their sum. They no longer sum "
        "to 1 with the others.",
        "Write the output as one fraction. Where does alpha stand in the denominator?",
        mistaken(end=numerator_only),
    ),
    Misconception(
        "alpha-without-log",
        "In mode gate alpha itself was added to the memory's scores. exp(score) is to be multiplied by alpha: which number has to "
        "be added to the score for that?",
        "exp(s + x) = alpha * exp(s). What is x?",
        mistaken(end=with_gate(lambda alpha: alpha)),
    ),
    Misconception(
        "alpha-times-score",
        "In mode gate the memory's lse (or its scores) was multiplied by alpha. Its exponentials are to be.",
        "exp(s + x) = alpha * exp(s). What is x?",
        mistaken(
            end=lambda own, memory, alpha, mode: (
                merged(own, (memory[0], alpha * memory[1]))[0] if mode == "gate" else finish(own, memory, alpha, mode)
            )
        ),
    ),
    Misconception(
        "gated-with-every-chunk",
        "In mode gate alpha was multiplied in again with every chunk: the first chunk carries it as often as there are chunks.",
        "Let alpha be 1/2 and take three chunks of one key each, all with the same score. How heavy should each be?",
        gated_again_and_again,
    ),
    Misconception(
        "blended-with-the-memory-alone",
        "In mode blend the output over the memory alone was mixed in. At alpha = 1 the own keys still count.",
        "What should alpha = 1 give, according to the docstring?",
        mistaken(end=memory_alone),
    ),
    *(
        Misconception(
            "rows-misplaced",
            "Queries of one request or head met the memory of another, or their results went to it: reshape keeps the order in "
            "memory, [B, H, Sq] is not [H, B, Sq].",
            "Which axis has to move before two axes can become one?",
            rows_misplaced(pack_wrongly=pack_wrongly),
        )
        for pack_wrongly in (True, False)
    ),
    replace(MISSING_SCALE, model=mistaken(scale=1.0)),
    replace(SCALED_TWICE, model=lambda q, *args, **kwargs: mistaken(scale=1 / q.shape[3])(q, *args, **kwargs)),
)
FORMULA_MISTAKES = formula_mistakes(
    as_dense,
    lambda out, lse: out,
    leave=("missing-scale", "scaled-twice", "scale-ignored", "accumulated-in-half", "summed-in-half"),
)
ALL_MISTAKES = (*MISTAKES, *FORMULA_MISTAKES)
MEMORY_READ_AT_0 = Misconception(
    "memory-read-at-alpha-0",
    "With alpha = 0 the memory still had a say: it held NaN, and 0 * NaN is NaN. (log(0) is -inf; is that safe everywhere?)",
    "What is there to be done with a memory that does not count? Nothing at all.",
)
EMPTY_MEMORY = Misconception(
    "empty-memory",
    "A memory of no keys (M = 0) was not passed over. It has an output of 0 and an lse of -inf, and weighs nothing.",
    "What does your loop leave behind if it is never entered?",
)
GROWS = Misconception(
    "grows-with-the-memory",
    "What you made grows with M. Converting all of the memory, concatenating it, or keeping the scores of all chunks: each needs "
    "the room that chunks are there to save.",
    "Print the shapes of all tensors that are alive when the last chunk has been looked at. In which does M stand?",
)
COPIED = Misconception(
    "chunk-copied-per-request",
    "A chunk was in memory once for every request. matmul copies an operand that it has to broadcast over a batch axis; and "
    "expand followed by reshape or contiguous does so, too.",
    "All requests look at the same keys. Can their queries be rows of one matrix?",
)
READ_AGAIN = Misconception(
    "memory-read-per-request",
    "The memory was read more than once. Reading it is what this costs: once, for all requests and queries together.",
    "Is there a loop over requests around your loop over chunks?",
)


def all_nan(q: Tensor, k: Tensor, v: Tensor, *others) -> Tensor:
    return torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=torch.float64)


inject = Target("inject_chunked", oracle=injected64, budget=injected_budget, misconceptions=ALL_MISTAKES)
inject_nan = replace(inject, misconceptions=(replace(MEMORY_READ_AT_0, model=all_nan), *ALL_MISTAKES))
# In such scores memory and own keys are all or nothing, and weights that are exchanged look like other mistakes.
APART = tuple(mistake for mistake in ALL_MISTAKES if mistake.slug != "weights-swapped")
inject_spread = replace(inject, misconceptions=(replace(NO_MAXIMUM, model=all_nan), *APART))
inject_no_keys = replace(inject, misconceptions=(replace(EMPTY_MEMORY, model=all_nan), *ALL_MISTAKES))

# ---------------------------------------------------------------------------------------------------------- properties


def draw_with_memory(t: Trial, queries: int, keys: int, memory: int, **sizes: int) -> tuple[Tensor, ...]:
    """q, k, v, and a memory whose scores are spread enough that no two ways to weigh chunks agree."""
    q, k, v = draw(t, queries, keys, **{"batch": 2, "heads": 3, "dim": 8, "v_dim": 5, **sizes})
    k_memory, v_memory = (t.randn(k.shape[1], memory, x.shape[3], dtype=torch.float16) for x in (k, v))
    return q, k, v, 2 * k_memory, v_memory


@exercise.property(
    points=3,
    hints=[
        "Take one chunk first, as large as the memory: two pieces, the own keys and the chunk. How do two pieces become one?",
        "Each piece needs its out and its lse. Merge the chunks with each other, and with the own keys once.",
    ],
)
def one_softmax(t: Trial) -> None:
    """alpha = 1 is attention over memory and own keys together, in both modes"""
    t.check(inject, *draw_with_memory(t, 4, 6, 12), 4)
    t.check(inject, *draw_with_memory(t, 5, 5, 12, batch=3, heads=2, dim=16), 3, 1.0, "gate")
    t.check(inject, *draw_with_memory(t, 3, 7, 9, v_dim=12), 9)


@exercise.property(
    points=2,
    hints=[
        "How long is the last chunk, if 23 keys are cut into chunks of 5?",
        "A slice that ends beyond the tensor is cut off by itself. Does anything else of yours rely on chunk_size?",
    ],
)
def any_chunk_size(t: Trial) -> None:
    """the size of the chunks changes nothing: one key, one that does not divide M, more than all"""
    arguments = draw_with_memory(t, 4, 6, 23)
    for chunk_size in (5, 1, 22, 100):
        t.check(inject, *arguments, chunk_size)


@exercise.property(
    points=2,
    hints=[
        "Compute the two outputs of the docstring, and mix them.",
        "At alpha = 1 the own keys take part. Which output has them and the memory?",
    ],
)
def blending(t: Trial) -> None:
    """blend mixes the outputs without and with the memory"""
    for alpha in t.uniform(0.3, 0.8, 2).tolist():
        t.check(inject, *draw_with_memory(t, 4, 6, 14), 4, alpha, "blend")


@exercise.property(
    points=3,
    hints=[
        "alpha * exp(s) = exp(s + log(alpha)). The same holds for a sum of exponentials, so for the lse.",
        "Scale the memory once: its lse grows by log(alpha), its out stays.",
    ],
)
def gating(t: Trial) -> None:
    """gate multiplies the memory's exponentials, in the numerator and in the denominator"""
    for alpha in (*t.uniform(0.2, 0.7, 2).tolist(), 0.001):
        t.check(inject, *draw_with_memory(t, 4, 6, 14), 4, alpha, "gate")


@exercise.property(
    points=2,
    hints=["Is there an early way out, for alpha = 0?", "With M = 0 no chunk comes: out is 0 and lse is -inf."],
)
def nothing_injected(t: Trial) -> None:
    """alpha = 0 is attention without the memory, which is not read; a memory of no keys changes nothing"""
    q, k, v, k_memory, v_memory = draw_with_memory(t, 4, 6, 11)
    poison = torch.full_like(k_memory, torch.nan), torch.full_like(v_memory, torch.nan)
    nothing = k_memory[:, :0], v_memory[:, :0]
    for mode in ("blend", "gate"):
        plain = q, k, v, k_memory, v_memory, 4, 0.5, mode
        t.check(inject_nan, q, k, v, *poison, 4, 0.0, mode, if_it_raises=MEMORY_READ_AT_0, but_not_on=plain)
        t.check(inject_no_keys, q, k, v, *nothing, 4, 0.5, mode, if_it_raises=EMPTY_MEMORY, but_not_on=plain)


@exercise.property(
    points=3,
    hints=[
        "No exponent may be above 0, and not all of them far below it.",
        "Each row keeps the largest score it has seen, or the lse. Subtract it before you take exponentials.",
    ],
)
def scores_far_apart(t: Trial) -> None:
    """right when chunks, and memory and own keys, differ by hundreds in their scores"""
    q, k, v, k_memory, v_memory = draw_with_memory(t, 4, 6, 20)
    for profile in (ramp(20, -60, 60), ramp(20, 110, -90), torch.full((20,), 120.0), torch.full((20,), -200.0)):
        whole_profile = torch.cat([profile, torch.zeros(6)])  # of the memory, and of the own keys
        keys = torch.cat([k_memory.float().expand(2, -1, -1, -1), k], 2)
        q_new, keys = with_scores_along(q, keys, whole_profile)
        k_memory_new, k_new = keys[0, :, :20].half(), keys[:, :, 20:]
        for mode in ("blend", "gate"):
            t.check(inject_spread, q_new, k_new, v, k_memory_new, v_memory, 6, 0.6, mode)


@exercise.property(
    points=1,
    hints=[
        "A tensor in any memory layout has the same values. Do not rely on where they lie.",
        "x = x * y makes a new tensor. x *= y, x.mul_(y) and x[i] = y change the one that x names.",
    ],
)
def inputs_of_any_strides(t: Trial) -> None:
    """reads inputs of any strides right, and leaves them alone"""
    q, k, v, k_memory, v_memory = draw_with_memory(t, 4, 6, 11)
    arguments = (*(transposed_in_poison(x) for x in (q, k, v)), k_memory, v_memory, 4, 0.5)
    t.check(inject, *arguments, if_it_raises=ASSUMES_CONTIGUOUS, but_not_on=(q, k, v, k_memory, v_memory, 4, 0.5))
    t.check_inputs_untouched(inject, q, k, v, k_memory, v_memory, 4, 0.5, "gate")


@exercise.property(
    points=8,
    hints=[
        "What is alive at once may be a chunk of K and of V in float32, their scores, and results. Convert a slice, not the whole.",
        "[B, H, Sq, D] -> [H, B * Sq, D]: then q @ chunk.mT needs no copy of the chunk.",
    ],
)
def bounded_memory(t: Trial) -> None:
    """8192 keys take the room of one chunk, and are read once for all requests"""
    batch, heads, dim, chunk_size, length = 8, 2, 32, 256, 8192
    t.check(inject, *draw_with_memory(t, 2, 3, 9), 4)  # who fails anyway is told so at less expense
    q, k, v, k_memory, v_memory = draw_with_memory(t, 1, 2, length, batch=batch, heads=heads, dim=dim, v_dim=dim)
    chunk = 2 * heads * chunk_size * dim * 4  # bytes of keys and values in float32
    scores = batch * heads * chunk_size * 4
    allowed = 2 * chunk + 8 * scores
    few = slice(0, 4 * chunk_size)
    _, short = measured(t, q, k, v, k_memory[:, few].clone(), v_memory[:, few].clone(), chunk_size)
    reply, long = measured(t, q, k, v, k_memory, v_memory, chunk_size)
    if long > allowed:
        mistake = GROWS if long > 1.5 * short else COPIED
        t.fail_as(
            mistake, got=f"{long:,} bytes alive at once", expected=f"at most {allowed:,}, with chunks of {chunk:,}"
        )
    for name, memory in (("k_memory", k_memory), ("v_memory", v_memory)):
        times = reply.times_read(name, memory)
        if times > 1:
            t.fail_as(READ_AGAIN, got=f"{name} read {times:.3g} times", expected="once")
    answer = t.expect_tensor(reply.value, "out", v[:, :, :1].shape, torch.float32)
    some = slice(0, batch, batch - 1)  # the first request and the last
    t.judge(inject, answer[some], q[some], k[some], v[some], k_memory, v_memory, chunk_size)
    see_memory_from_outside(t)


def see_memory_from_outside(t: Trial) -> None:
    """The memory is handed out piece by piece, with room for one chunk: once, and the process does not grow by a copy of it."""
    batch, heads, dim, chunk_size, length = 16, 2, 32, 4096, 1 << 16
    q, k, v, k_memory, v_memory = draw_with_memory(t, 1, 2, length, batch=batch, heads=heads, dim=dim, v_dim=dim)
    arguments, chunk = (q, k, v, k_memory, v_memory, chunk_size), heads * chunk_size * dim * 2
    few = slice(0, 2 * chunk_size)  # the same chunks, so that only what grows with their number is seen
    first = q, k, v, k_memory[:, few].clone(), v_memory[:, few].clone(), chunk_size
    room = {"k_memory": (k_memory, chunk), "v_memory": (v_memory, chunk)}
    reply = t.watch("inject_chunked", *arguments, first=first, room=room, memory=6 * MIB, copied=GROWS)
    if reply is None:
        return
    out = t.expect_tensor(reply.value, "out", q.shape, torch.float32)
    t.judge(inject, out[:1], q[:1], k[:1], v[:1], k_memory, v_memory, chunk_size)
    for name in room:
        if (times := reply.seen.times(name)) > 1:
            t.fail_as(READ_AGAIN, got=f"{name} read {times:.3g} times", expected="once")
    t.confirmed()


def measured(t: Trial, q, k, v, k_memory, v_memory, chunk_size: int) -> tuple[Reply, int]:
    """A call under the meter, and the most bytes that it had made and still held at one moment."""
    arguments = (q, k, v, k_memory, v_memory, chunk_size)
    reply = t.ask("inject_chunked", arguments, meter={"k_memory": k_memory, "v_memory": v_memory})
    return reply, reply.meter["peak_bytes"]
