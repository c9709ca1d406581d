"""Checks of ex13: prefixes that requests share, read once, at several levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashlib import reference
from flashlib.course.exercises.drawing import draw
from flashlib.course.exercises.formula import Dense, formula_mistakes
from flashlib.course.exercises.mistakes import ASSUMES_CONTIGUOUS, HEADS_MODULO, NO_MAXIMUM
from flashlib.course.exercises.pieces import combine64, merged_budget
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.inputs import ramp, transposed_in_poison, with_poisoned_tail, with_scores_along
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex13",
    file="ex13_shared_prefix.py",
    title="Shared prefixes",
    chapter="14_injection_and_prefixes",
    difficulty=4,
    importance=4,
    minutes=60,
    forbidden=SDPA,
)

Level = tuple[Tensor, Tensor, list[int]]

# -------------------------------------------------------------------------------------------------------------- oracle


def of_request(b: int, q: Tensor, levels: Sequence[Level], k: Tensor, v: Tensor, lengths: Tensor):
    """q, and the keys and values that request b sees, concatenated: each with a batch of 1."""
    own = slice(0, int(lengths[b]))
    parts = [(keys[members[b]], values[members[b]]) for keys, values, members in levels]
    parts.append((k[b, :, own], v[b, :, own]))
    return q[b : b + 1], *(torch.cat(side, dim=1)[None] for side in zip(*parts, strict=True))


def requests(q: Tensor) -> range:
    return range(q.shape[0])


def exact(q, levels, k, v, lengths) -> tuple[Tensor, Tensor]:
    results = [reference.oracle(*of_request(b, q, levels, k, v, lengths), causal=True) for b in requests(q)]
    return tuple(torch.cat(side) for side in zip(*results, strict=True))


def budget(q, levels, k, v, lengths) -> tuple[float, float]:
    problems = [of_request(b, q, levels, k, v, lengths) for b in requests(q)]
    budgets = [merged_budget(*problem, len(levels) + 1, causal=True) for problem in problems]
    return max(one.out for one in budgets), max(one.lse for one in budgets)


# ------------------------------------------------------------------------------------------------------------ mistakes

Pieces = list[
    tuple[Tensor, Tensor]
]  # of one request: out [Hq, Sq, Dv] and lse [Hq, Sq] over each level, then over the own keys


def merged(pieces: Pieces) -> tuple[Tensor, Tensor]:
    return combine64(*(torch.stack(side) for side in zip(*pieces, strict=True)))


@dataclass(frozen=True)
class PrefixMistake:
    """Attention over shared prefixes in float64, with one mistake.

    Attributes:
        merge: makes one result of the pieces.
        kv_head: which KV head query head h looks at, from h, Hq and Hkv.
        prefix_last: the last key of a prefix that the queries i see, from i, Sq and P.
        own_last: the last own key that the queries i see, from i, lengths[b], Sq and S.
        member: which prefix a request has, from members and b.
    """

    merge: Callable[[Pieces], tuple[Tensor, Tensor]] = merged
    kv_head: Callable[[int, int, int], int] = lambda h, q_heads, kv_heads: h // (q_heads // kv_heads)
    prefix_last: Callable[[Tensor, int, int], Tensor] = lambda i, q_len, length: i + length
    own_last: Callable[[Tensor, int, int, int], Tensor] = lambda i, length, q_len, kv_len: i + length - q_len
    member: Callable[[list[int], int], int] = lambda members, b: members[b]

    def __call__(self, q, levels, k, v, lengths) -> tuple[Tensor, Tensor]:
        i, q_len, kv_len = torch.arange(q.shape[2]), q.shape[2], k.shape[2]
        results = []
        for b, length in enumerate(lengths.tolist()):
            pieces = []
            for keys, values, members in levels:
                prefix = self.member(members, b)
                last = self.prefix_last(i, q_len, keys.shape[2])
                pieces.append(self._attend(q[b], keys[prefix], values[prefix], last))
            pieces.append(self._attend(q[b], k[b], v[b], self.own_last(i, length, q_len, kv_len)))
            results.append(self.merge(pieces))
        return tuple(torch.stack(side) for side in zip(*results, strict=True))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Query i sees keys up to last[i]."""
        heads = [self.kv_head(h, len(q), len(k)) for h in range(len(q))]
        scores = q.double() @ k[heads].double().mT * q.shape[-1] ** -0.5
        hidden = torch.arange(k.shape[1]) > last[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        seen = torch.where(hidden.all(0)[:, None], 0.0, v[heads].double())
        return torch.softmax(scores, -1).nan_to_num(nan=0.0) @ seen, scores.logsumexp(-1)


def averaged(pieces: Pieces) -> tuple[Tensor, Tensor]:
    return torch.stack([out for out, _ in pieces]).mean(0), merged(pieces)[1]


def added(pieces: Pieces) -> tuple[Tensor, Tensor]:
    return torch.stack([out for out, _ in pieces]).sum(0), merged(pieces)[1]


def swapped(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Merged one after the other, each with the weight of the other."""
    out, lse = pieces[-1]
    for piece_out, piece_lse in pieces[:-1]:
        out = merged([(piece_out, lse), (out, piece_lse)])[0]
        lse = torch.logaddexp(lse, piece_lse)
    return out, lse


def own_lse_kept(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Merged with the running out, but always weighed by the lse of the own keys."""
    out, lse = pieces[-1]
    for piece in pieces[:-1]:
        out = merged([piece, (out, lse)])[0]
    return out, lse


def rows_misplaced(q, levels, k, v, lengths) -> tuple[Tensor, Tensor]:
    """Results over a prefix taken back as [n, Hkv, ...], which lie in memory as [Hkv, n, ...]. For one prefix in each level."""
    outs, lses = [], []
    kv_heads = k.shape[1]
    for keys, values, members in levels:
        out, lse = torch.zeros(*q.shape[:3], v.shape[3]).double(), torch.zeros(q.shape[:3]).double()
        for prefix in set(members):
            own = [b for b in requests(q) if members[b] == prefix]
            piece = reference.oracle(
                q[own], keys[prefix].expand(len(own), -1, -1, -1), values[prefix].expand(len(own), -1, -1, -1)
            )
            for whole, x in zip((out, lse), piece, strict=True):
                packed = x.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()
                whole[own] = packed.reshape(x.shape)
        outs.append(out)
        lses.append(lse)
    own = [
        reference.oracle(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], causal=True)
        for b, n in enumerate(lengths.tolist())
    ]
    outs.append(torch.cat([out for out, _ in own]))
    lses.append(torch.cat([lse for _, lse in own]))
    return combine64(torch.stack(outs), torch.stack(lses))


def in_base_2(pieces: Pieces) -> tuple[Tensor, Tensor]:
    out, lse = merged(pieces)
    return out, lse / math.log(2)


MISTAKES = (
    Misconception(
        "pieces-averaged",
        "The outputs over the prefixes and over the own keys were averaged. A piece counts by the sum of its exponentials: a prefix "
        "of a thousand tokens and three own ones are not worth the same.",
        "Say all scores are equal, the prefix has 99 keys and the request one. How heavy should the prefix be?",
        PrefixMistake(merge=averaged),
    ),
    Misconception(
        "pieces-added",
        "The outputs were added. Each was already divided by the sum of its own exponentials.",
        "What would a piece's output have to be multiplied by to undo its division?",
        PrefixMistake(merge=added),
    ),
    Misconception(
        "weights-swapped",
        "The pieces got each other's weights.",
        "Let one lse be far larger than the others. Which output should survive?",
        PrefixMistake(merge=swapped),
    ),
    Misconception(
        "own-key-missed",
        "The newest own key was left out. A query sees itself.",
        "With one own token and one query, how many own keys does it see?",
        PrefixMistake(own_last=lambda i, length, q_len, kv_len: i + length - q_len - 1),
    ),
    Misconception(
        "last-level-only",
        "Only one level of prefixes counted: each replaced what came of the one before it.",
        "With two levels, how many pieces does a request have?",
        PrefixMistake(merge=lambda pieces: merged(pieces[-2:])),
    ),
    Misconception(
        "first-level-only",
        "Only the first level of prefixes was looked at.",
        "With two levels, how many pieces does a request have?",
        PrefixMistake(merge=lambda pieces: merged([pieces[0], pieces[-1]])),
    ),
    Misconception(
        "prefix-left-out",
        "The prefixes did not count at all: this is attention over the own keys.",
        "Where do the levels enter your result?",
        PrefixMistake(merge=lambda pieces: pieces[-1]),
    ),
    Misconception(
        "own-keys-left-out",
        "The requests' own keys did not count: this is attention over the prefixes alone.",
        "A query sees itself. Is its own key among those you looked at?",
        PrefixMistake(merge=lambda pieces: merged(pieces[:-1])),
    ),
    Misconception(
        "lse-of-one-piece",
        "The lse stayed that of one piece, while the out is that of several. It weighs too little in the next merge, and is not what "
        "was asked for.",
        "After two pieces are merged, which lse belongs to the result?",
        PrefixMistake(merge=lambda pieces: (merged(pieces)[0], pieces[-1][1])),
    ),
    Misconception(
        "lse-of-one-piece",
        "The lse stayed that of one piece, while the out is that of several. It weighs too little in the next merge, and is not what "
        "was asked for.",
        "After two pieces are merged, which lse belongs to the result?",
        PrefixMistake(merge=own_lse_kept),
    ),
    Misconception(
        "lse-base-2",
        "lse is a logarithm to base 2. The natural one was asked for.",
        "log2(x) = ln(x) / ln(2).",
        PrefixMistake(merge=in_base_2),
    ),
    *(
        Misconception(
            "prefix-masked",
            "A causal mask was put over a prefix. All of it lies in the past of every query.",
            "Which token of the prefix comes after the first query?",
            PrefixMistake(prefix_last=last),
        )
        for last in (lambda i, q_len, length: i + length - q_len, lambda i, q_len, length: i)
    ),
    Misconception(
        "own-mask-forgotten",
        "Queries saw own keys behind them. Among the own keys attention is causal.",
        "Which own keys may the first of the Sq queries see?",
        PrefixMistake(own_last=lambda i, length, q_len, kv_len: 0 * i + length - 1),
    ),
    Misconception(
        "own-causal-top-left",
        "The queries were taken for the first of the own tokens. They are the last.",
        "With 5 own tokens and one query, how many own keys does it see?",
        PrefixMistake(own_last=lambda i, length, q_len, kv_len: i),
    ),
    Misconception(
        "own-lengths-ignored",
        "Every request was taken to have S own tokens. What lies behind lengths[b] is not part of it.",
        "At which own position does the last query of a request stand? It is not S - 1.",
        PrefixMistake(own_last=lambda i, length, q_len, kv_len: i + kv_len - q_len),
    ),
    Misconception(
        "members-ignored",
        "All requests were given the first prefix of a level.",
        "What does members[b] say?",
        PrefixMistake(member=lambda members, b: 0),
    ),
    replace(HEADS_MODULO, model=PrefixMistake(kv_head=lambda h, q_heads, kv_heads: h % kv_heads)),
    Misconception(
        "rows-misplaced",
        "The results over a prefix went to other requests and heads: rows packed as [Hkv, n, ...] were taken for [n, Hkv, ...]. Of the "
        "same size, but in another order.",
        "In which order lie the rows that you gave to the matrix product? Undo just that.",
        rows_misplaced,
    ),
)


def as_dense(q, levels, k, v, lengths) -> Dense:
    """Each request's prefixes followed by its own keys, as many as there is room for; those behind its length are absent."""
    group = q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat([*(level[side][level[2]] for level in levels), own], 2).repeat_interleave(group, 1)
        for side, own in ((0, k), (1, v))
    )
    before, key = keys.shape[2] - k.shape[2], torch.arange(keys.shape[2])
    total = before + lengths
    absent = (key >= total[:, None])[:, None, None]
    last = torch.arange(q.shape[2]) + total[:, None] - q.shape[2]
    sizes = (v.shape[-1], keys.shape[2], k.shape[2], q.shape[1], k.shape[1])
    return Dense(q, keys, values, q.shape[-1] ** -0.5, True, sizes, absent, (key > last[..., None])[:, None])


FORMULA_MISTAKES = formula_mistakes(
    as_dense, leave=("scale-ignored", "accumulated-in-half", "summed-in-half", "newest-key-missed")
)
ALL_MISTAKES = (*MISTAKES, *FORMULA_MISTAKES)
PADDING_READ = Misconception(
    "padding-read",
    "What lies behind a request's length reached the result: it held NaN, and 0 * NaN is NaN.",
    "A weight of 0 does not hide a value. How can a value be kept out of a sum without multiplying it?",
)
PREFIX_READ_AGAIN = Misconception(
    "prefix-read-per-request",
    "A prefix was read more than once. Sharing it saves memory; reading it once for all requests and heads saves the time.",
    "Is there a loop over requests, or over heads, around your products with the prefix?",
)
PREFIX_COPIED = Misconception(
    "prefix-copied",
    "A prefix was copied. Concatenation does so, and so do repeat_interleave, indexing by a list, and matmul where it has to "
    "broadcast an operand over a batch axis.",
    "Whose rows could be stacked, so that the prefix need not be repeated?",
)


def all_nan(q, levels, k, v, lengths) -> tuple[Tensor, None]:
    return torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=torch.float64), None


def nan_where_padded(q, levels, k, v, lengths) -> tuple[Tensor, None]:
    out, _ = exact(q, levels, k, v, lengths)
    out[lengths < k.shape[2]] = torch.nan
    return out, None


forward = Target(
    "shared_prefix_attention",
    oracle=exact,
    budget=budget,
    outputs={"out": torch.float32, "lse": torch.float32},
    misconceptions=ALL_MISTAKES,
)
forward_padded = replace(forward, misconceptions=(replace(PADDING_READ, model=nan_where_padded), *ALL_MISTAKES))
forward_spread = replace(forward, misconceptions=(replace(NO_MAXIMUM, model=all_nan), *ALL_MISTAKES))

# ---------------------------------------------------------------------------------------------------------- properties


@dataclass(frozen=True)
class Sizes:
    batch: int = 4
    q_heads: int = 4
    kv_heads: int = 2
    q_len: int = 2
    dim: int = 8
    v_dim: int = 6


def draw_level(t: Trial, sizes: Sizes, prefixes: int, tokens: int, members: Sequence[int] | None = None) -> Level:
    """Prefixes for the requests, one of them or as `members` says."""
    return (
        t.randn(prefixes, sizes.kv_heads, tokens, sizes.dim),
        t.randn(prefixes, sizes.kv_heads, tokens, sizes.v_dim),
        list(members or [0] * sizes.batch),
    )


def draw_own(t: Trial, sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, and own keys and values with room for so many tokens."""
    heads = {"heads": sizes.q_heads, "kv_heads": sizes.kv_heads}
    return draw(t, sizes.q_len, tokens, batch=sizes.batch, **heads, dim=sizes.dim, v_dim=sizes.v_dim)


def full(sizes: Sizes, tokens: int) -> Tensor:
    return torch.full((sizes.batch,), tokens)


@exercise.property(
    points=3,
    hints=[
        "Two pieces for each request: all of the prefix without a mask, and its own keys with one. Each needs its out and lse.",
        "The weight of a piece is exp(lse of the piece - lse of the whole).",
    ],
)
def one_prefix_for_all(t: Trial) -> None:
    """one prefix, which all requests share, and own keys: right out and lse"""
    for sizes in (Sizes(), Sizes(batch=3, q_heads=6, q_len=1), Sizes(batch=2, q_heads=3, kv_heads=3, q_len=5, v_dim=8)):
        q, k, v = draw_own(t, sizes, 7)
        t.check(forward, q, [draw_level(t, sizes, 1, 13)], k, v, full(sizes, 7))


@exercise.property(
    points=2,
    hints=[
        "The queries of request b stand at the own positions lengths[b] - Sq, ..., lengths[b] - 1.",
        "Query i of request b sees own key j if j <= lengths[b] - Sq + i.",
    ],
)
def own_lengths(t: Trial) -> None:
    """requests with different numbers of own tokens"""
    sizes = Sizes(q_len=3)
    q, k, v = draw_own(t, sizes, 9)
    lengths = torch.tensor([9, 3, t.integer(4, 8), t.integer(4, 8)])[t.permutation(4)]
    t.check(forward, q, [draw_level(t, sizes, 1, 6)], k, v, lengths)


@exercise.property(
    points=3,
    hints=[
        "Each level is one more piece for every request.",
        "Collect the requests of one prefix, attend for all of them at once, and put the results back where they belong.",
    ],
)
def several_levels(t: Trial) -> None:
    """several levels, with any members in any order, and prefixes that nobody has"""
    sizes = Sizes(batch=5)
    q, k, v = draw_own(t, sizes, 5)
    everyone, lengths = draw_level(t, sizes, 1, 8), full(sizes, 5)
    t.check(forward, q, [everyone, draw_level(t, sizes, 3, 11, [2, 1, 1, 2, 1])], k, v, lengths)
    members = t.permutation(4)[torch.tensor([0, 1, 1, 3, 0])].tolist()
    levels = [everyone, draw_level(t, sizes, 2, 6, [1, 0, 0, 1, 1]), draw_level(t, sizes, 4, 9, members)]
    t.check(forward, q, levels, k, v, lengths)


@exercise.property(
    points=2,
    hints=["What is 0 * NaN?", "masked_fill and where put another value in the place of one; a product does not."],
)
def padding_never_read(t: Trial) -> None:
    """what lies behind a request's own tokens may be NaN"""
    sizes = Sizes(q_len=2)
    q, k, v = draw_own(t, sizes, 8)
    lengths = torch.tensor([2, 8, 5, t.integer(3, 7)])
    k, v = (torch.stack([with_poisoned_tail(x[b], n) for b, n in enumerate(lengths.tolist())]) for x in (k, v))
    t.check(forward_padded, q, [draw_level(t, sizes, 1, 6)], k, v, lengths)


@exercise.property(
    points=2,
    hints=[
        "No exponent may be above 0, and not all of them far below it.",
        "logsumexp and logaddexp take the largest out by themselves. exp does not.",
    ],
)
def scores_far_apart(t: Trial) -> None:
    """right when prefix and own keys differ by hundreds in their scores"""
    sizes = Sizes()
    q, k, v = draw_own(t, sizes, 5)
    k_prefix, v_prefix, members = draw_level(t, sizes, 1, 10)
    for profile in (torch.full((10,), 150.0), ramp(10, 110, 130)):
        keys = torch.cat([k_prefix.expand(sizes.batch, -1, -1, -1), k], 2)
        doubled = keys.repeat_interleave(2, 1)
        q_new, keys = with_scores_along(q, doubled, torch.cat([profile, torch.zeros(5)]))
        keys = keys[:, ::2]
        level = keys[:1, :, :10].clone(), v_prefix, members
        t.check(forward_spread, q_new, [level], keys[:, :, 10:].clone(), v, full(sizes, 5))


@exercise.property(
    points=1,
    hints=[
        "A tensor in any memory layout has the same values. Do not rely on where they lie.",
        "x = x * y makes a new tensor. x *= y, x.mul_(y) and x[i] = y change the one that x names.",
    ],
)
def inputs_of_any_strides(t: Trial) -> None:
    """reads inputs of any strides right, and leaves them alone"""
    sizes = Sizes()
    q, k, v = draw_own(t, sizes, 6)
    levels, lengths = [draw_level(t, sizes, 2, 7, [1, 0, 1, 1])], full(sizes, 6)
    strided = [(transposed_in_poison(keys), transposed_in_poison(values), members) for keys, values, members in levels]
    own = [transposed_in_poison(x) for x in (q, k, v)]
    plain = q, levels, k, v, lengths
    t.check(forward, own[0], strided, *own[1:], lengths, if_it_raises=ASSUMES_CONTIGUOUS, but_not_on=plain)
    t.check_inputs_untouched(forward, q, levels, k, v, lengths)


@exercise.property(
    points=7,
    hints=[
        "All rows that look at one prefix, of all requests and of all heads of a group, can be the rows of one matrix.",
        "[n, Hkv, R, Sq, D] -> [Hkv, n * R * Sq, D]; then one product with k_prefix[g], which is [Hkv, P, D].",
    ],
)
def read_once(t: Trial) -> None:
    """each prefix is read once for all requests, and not copied"""
    few = Sizes()
    t.check(forward, *_one_level(t, few))  # who fails anyway is told so at less expense
    sizes = Sizes(q_len=1, dim=64, v_dim=64)
    q, k, v = draw_own(t, sizes, 4)
    levels = [draw_level(t, sizes, 1, 1024), draw_level(t, sizes, 2, 512, [1, 0, 1, 0])]
    arguments = q, levels, k, v, full(sizes, 4)
    prefixes = {
        "k_prefix of level 0": levels[0][0],
        "v_prefix of level 0": levels[0][1],
        "k_prefix of level 1": levels[1][0],
    }
    reply = t.ask("shared_prefix_attention", arguments, meter=prefixes)
    t.judge(forward, reply.value, *arguments)
    scores = sizes.batch * sizes.q_heads * 1024 * 4
    allowed, peak = 5 * scores, reply.meter["peak_bytes"]
    if peak > allowed:
        keys = levels[0][0].nbytes
        t.fail_as(
            PREFIX_COPIED, got=f"{peak} bytes alive at once", expected=f"at most {allowed}; the keys alone have {keys}"
        )
    for name, x in prefixes.items():
        times = reply.times_read(name, x)
        if times > 1:
            t.fail_as(PREFIX_READ_AGAIN, got=f"{name} read {times:.3g} times", expected="once")
    see_prefix_from_outside(t)


def _one_level(t: Trial, sizes: Sizes):
    q, k, v = draw_own(t, sizes, 5)
    return q, [draw_level(t, sizes, 2, 9, [1, 0, 0, 1])], k, v, full(sizes, 5)


def see_prefix_from_outside(t: Trial) -> None:
    """A prefix is handed out piece by piece, with room for its keys or its values: once, and no copy of it makes the process grow."""
    sizes, tokens = Sizes(batch=3, q_heads=4, kv_heads=2, q_len=1, dim=64, v_dim=64), 16_384
    q, k, v = draw_own(t, sizes, 4)
    level = draw_level(t, sizes, 1, tokens)
    arguments, first = (q, [level], k, v, full(sizes, 4)), (q, [draw_level(t, sizes, 1, 9)], k, v, full(sizes, 4))
    room = {name: (x, x.nbytes) for name, x in zip(("k_prefix", "v_prefix"), level[:2], strict=True)}
    limits = {"together": True, "memory": 7 * MIB, "copied": PREFIX_COPIED}
    reply = t.watch("shared_prefix_attention", *arguments, first=first, room=room, **limits)
    if reply is None:
        return
    out, lse = t.expect_tuple(reply.value, "out", "lse")
    out, lse = t.expect_tensor(out, "out", q.shape), t.expect_tensor(lse, "lse", q.shape[:3])
    last = slice(-1, None)  # the other requests see the same prefix
    t.judge(forward, (out[last], lse[last]), q[last], [(*level[:2], [0])], k[last], v[last], arguments[4][last])
    for name in room:
        if (times := reply.seen.times(name)) > 1.5:
            t.fail_as(PREFIX_READ_AGAIN, got=f"{name} read {times:.3g} times", expected="once")
    t.confirmed()
