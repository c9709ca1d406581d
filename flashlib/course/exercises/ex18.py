"""Checks of ex18: ring attention on several ranks, whose network is played here.

The student's ranks are generators that ask. What is sent passes through this side, where it is counted, and where it shows at once that all of them wait for one
another. No rank has a process or a connection of its own: the fence around a submission allows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashlib.course.chapters.many_gpus import BadRequest, Deadlock, Network, seen_keys
from flashlib.course.grader.exercise import Exercise, Misconception, Target
from flashlib.course.grader.trial import Remote, Trial
from flashlib.masks import Intervals, RowIntervals
from flashlib.parallel.layout import part_positions
from flashlib.reference import error_budget, oracle

exercise = Exercise(
    name="ex18",
    file="ex18_ring_attention.py",
    title="Ring attention",
    chapter="17_many_gpus",
    difficulty=4,
    importance=4,
    minutes=90,
)

MOST_REQUESTS = 200  # of one rank
MIB = 1 << 20
Places = list[list[int]]

# -------------------------------------------------------------------------------------------------------- what is right


def visible(rows: Sequence[int], keys: Sequence[int]) -> Intervals:
    """Rows at some positions see the keys at positions up to their own; both ascending."""
    stop = torch.searchsorted(torch.tensor(keys, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64), right=True)[
        None
    ]
    return Intervals(RowIntervals(torch.zeros_like(stop), stop, len(keys)))


def true_part(q: Tensor, k: Tensor, v: Tensor, rows: list[int], keys: list[int]) -> tuple[Tensor, Tensor]:
    out, lse = oracle(q[None], k[None], v[None], mask=visible(rows, keys))
    return out[0], lse[0]


def part_budget(q: Tensor, k: Tensor, v: Tensor, rows: list[int], keys: list[int]) -> tuple[float, float]:
    budget = error_budget(q[None], k[None], v[None], mask=visible(rows, keys))
    return budget.out, budget.lse


def true_whole(q: Tensor, k: Tensor, v: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    every = list(range(q.shape[1]))
    return true_part(q, k, v, every, every)


def whole_budget(q: Tensor, k: Tensor, v: Tensor, places: Places) -> tuple[float, float]:
    every = list(range(q.shape[1]))
    return part_budget(q, k, v, every, every)


# ---------------------------------------------------------------------------------------------------------- misconceptions


Pair = tuple[Tensor, Tensor]  # out and lse


def causal(q: Tensor, k: Tensor, rows: Sequence[int], keys: Sequence[int]) -> Tensor:
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.tensor(keys) > torch.tensor(rows)[:, None], float("-inf"))


def of_scores(scores_of: Callable) -> Callable:
    """`attend` with other scores."""

    def model(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], keys: Sequence[int]) -> Pair:
        scores = scores_of(q, k, rows, keys)
        return torch.softmax(scores, -1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1)

    return model


right_part = of_scores(causal)
by_index = of_scores(lambda q, k, rows, keys: causal(q, k, range(len(rows)), range(len(keys))))
not_causal = of_scores(lambda q, k, rows, keys: causal(q, k, [max(keys, default=0)] * len(rows), keys))
itself_hidden = of_scores(lambda q, k, rows, keys: causal(q, k, [row - 1 for row in rows], keys))
not_scaled = of_scores(lambda q, k, rows, keys: causal(q * q.shape[-1] ** 0.5, k, rows, keys))


def without_maximum(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], keys: Sequence[int]) -> Pair:
    out, lse = right_part(q, k, v, rows, keys)
    if not keys:
        return out, lse
    top = causal(q, k, rows, keys).amax(-1)
    return out, torch.where(lse.isinf(), lse, lse - top.masked_fill(top.isinf(), 0.0))


def around(part: Callable, merge: Callable) -> Callable:
    """`ring_attention` of all ranks: ``part`` computes a piece, ``merge`` takes what there is and one piece more."""

    def model(q: Tensor, k: Tensor, v: Tensor, places: Places) -> Pair:
        out, lse = torch.zeros_like(q).double(), torch.zeros(q.shape[:2], dtype=torch.float64)
        for rank, rows in enumerate(places):
            if not rows:
                continue
            found = part(q[:, rows], k[:, rows], v[:, rows], rows, rows)
            for step in range(1, len(places)):
                keys = seen_keys(places, rank, (rank - step) % len(places))
                if keys:
                    found = merge(found, part(q[:, rows], k[:, keys], v[:, keys], rows, keys), step)
            out[:, rows], lse[:, rows] = found
        return out, lse

    return model


def merged(a: Pair, b: Pair, step: int = 0) -> Pair:
    lse = torch.logaddexp(a[1], b[1])
    shares = [torch.exp(x - lse.masked_fill(lse.isinf(), 0.0))[..., None] for _, x in (a, b)]
    return shares[0] * a[0] + shares[1] * b[0], lse


def with_lse(of_both: Callable) -> Callable:
    """The right out of two pieces, and a wrong lse of both, with which the next merge goes on."""

    def merge(a: Pair, b: Pair, step: int) -> Pair:
        both = ~(a[1].isinf() | b[1].isinf())
        return merged(a, b)[0], torch.where(both, of_both(a[1], b[1]), torch.maximum(a[1], b[1]))

    return merge


def replaced(a: Pair, b: Pair, step: int) -> Pair:
    seen = ~b[1].isinf()
    return torch.where(seen[..., None], b[0], a[0]), torch.where(seen, b[1], a[1])


def averaged(q: Tensor, k: Tensor, v: Tensor, places: Places) -> Pair:
    out, lse = around(right_part, lambda a, b, step: (a[0] + b[0], merged(a, b)[1]))(q, k, v, places)
    for rank, rows in enumerate(places):
        pieces = 1 + sum(bool(seen_keys(places, rank, other)) for other in range(len(places)) if other != rank)
        out[:, rows] /= pieces
    return out, lse


def twice(slug: str, says: str, hint: str, part: Callable) -> tuple[Misconception, Misconception]:
    """A mistake in `attend`, as it shows there and, in a solution that uses it, in the whole ring."""
    return Misconception(slug, says, hint, part), Misconception(slug, says, hint, around(part, merged))


PART_MISTAKES = [
    twice(
        "masked-by-index",
        "What a row sees was decided by its number among the rows that are here, not by its position.",
        "Row 0 of a rank may be the last of the sequence. Where does it say so?",
        by_index,
    ),
    twice(
        "not-causal",
        "A row sees keys behind its own position.",
        "Which of the keys that are here come after a row?",
        not_causal,
    ),
    twice(
        "itself-hidden", "A row does not see the key at its own position.", "Up to i: is i among them?", itself_hidden
    ),
    twice(
        "not-scaled",
        "The scores were not divided by sqrt(D).",
        "How large is a product of two vectors of D normal numbers?",
        not_scaled,
    ),
    twice(
        "lse-without-maximum",
        "The lse lacks what was taken from the scores before the exponential.",
        "log(sum exp(s - m)) is log(sum exp(s)) less what?",
        without_maximum,
    ),
]
ATTEND_MISTAKES = [part for part, _ in PART_MISTAKES]
RING_MISTAKES = [
    Misconception(
        "averaged",
        "The results of the pieces were averaged. A piece in which a row sees much weighs more than one in which it sees little.",
        "What does chapter 2 give along with each piece, so that two can be merged?",
        averaged,
    ),
    Misconception(
        "added-up",
        "The results of the pieces were added up, each already divided by its own sum.",
        "By what is each piece divided, and by what should the whole be?",
        around(right_part, lambda a, b, step: (a[0] + b[0], merged(a, b)[1])),
    ),
    Misconception(
        "own-keys-only",
        "A row sees no keys but those of its own rank.",
        "Which keys came, and where does their piece go?",
        around(right_part, lambda a, b, step: a),
    ),
    Misconception(
        "last-piece-only",
        "Each piece replaces the one before.",
        "What does a row know of the pieces before when the next one comes?",
        around(right_part, replaced),
    ),
    Misconception(
        "lse-added",
        "The logarithms of the pieces were added. Their exponentials add up.",
        "lse is log(a + b). What are log(a) + log(b)?",
        around(right_part, with_lse(lambda a, b: a + b)),
    ),
    Misconception(
        "lse-is-the-largest",
        "The lse is the largest of the pieces'.",
        "Two pieces with equal sums: how much larger is the logarithm of both together?",
        around(right_part, with_lse(torch.maximum)),
    ),
    *(whole for _, whole in PART_MISTAKES),
]
OUTPUTS = {"out": None, "lse": None}
attend = Target("attend", true_part, part_budget, OUTPUTS, ATTEND_MISTAKES)
ring = Target("ring_attention", true_whole, whole_budget, OUTPUTS, RING_MISTAKES)

# ----------------------------------------------------------------------------------------------------------- balanced

CONTIGUOUS = Misconception(
    "contiguous",
    "Each rank took one run of the sequence. The last one has nearly twice the mean to do, and all others wait for it.",
    "The first positions have few keys to look at, the last ones many. Which of them make a fair share together?",
)
UNBALANCED = Misconception(
    "unbalanced", "A rank has more than a tenth above the mean to do.", "Add up i + 1 over the positions of each rank."
)
UNEQUAL = Misconception(
    "unequal-parts",
    "A rank has more than 2 positions more than another one, and so much more memory to find.",
    "Where do the positions go that are left over?",
)


def parts_of(t: Trial, length: int, ranks: int) -> Places:
    """What the student's balanced gives, if it is a partition."""
    got = t.call("balanced", length, ranks)
    if not (isinstance(got, list) and len(got) == ranks and all(isinstance(part, list) and all(type(at) is int for at in part) for part in got)):  # fmt: skip
        t.fail(
            "wrong-type",
            "balanced returns a list of whole numbers for each rank.",
            got=str(got)[:80],
            expected=f"{ranks} lists",
        )
    if any(part != sorted(part) for part in got):
        t.fail(
            "not-ascending",
            "The positions of a rank are not in their order.",
            got=str(got)[:80],
            hint="Which order do the runs of a rank stand in?",
        )
    if sorted(at for part in got for at in part) != list(range(length)):
        t.fail("not-a-partition", "A position lies on no rank, or on several, or there is no such position.", got=str(got)[:80], expected=f"each of 0 to {length - 1} once", hint="Try a length that the ranks do not divide.")  # fmt: skip
    return got


@exercise.property(
    points=2,
    hints=["Cut the sequence into runs: which runs go to whom?", "length * n // parts are cuts that fit any length."],
)
def each_position_once(t: Trial) -> None:
    """balanced gives each position to one rank, in ascending order, at any length"""
    for ranks in (1, 2, 3, 4, 8):
        for length in (0, 1, ranks - 1, ranks, 2 * ranks + 1, t.integer(40, 90)):
            parts = parts_of(t, length, ranks)
            sizes = sorted(map(len, parts))
            if sizes[-1] - sizes[0] > 2:
                t.fail_as(UNEQUAL, got=str(sizes), expected="sizes that differ by 2 at most")


@exercise.property(points=2, hints=["A part from the front and its mirror image from the back."])
def work_is_balanced(t: Trial) -> None:
    """no rank of balanced has more than a tenth above the mean of visible pairs"""
    for ranks in (2, 3, 4, 8):
        length = 32 * ranks + t.integer(0, 50)
        parts = parts_of(t, length, ranks)
        pairs = [sum(at + 1 for at in part) for part in parts]
        over = max(pairs) * ranks / sum(pairs)
        if over > 1.1:
            contiguous = all(part == list(range(part[0], part[-1] + 1)) for part in parts if part)
            t.fail_as(
                CONTIGUOUS if contiguous else UNBALANCED, got=f"{over:.2f} times the mean", expected="at most 1.1"
            )


# ------------------------------------------------------------------------------------------------------------- attend


def drawn(t: Trial, length: int, *, heads: int = 2, dim: int = 8, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.randn(heads, length, dim) for _ in range(3))
    return size * q, k, v


def chosen(t: Trial, length: int, count: int) -> list[int]:
    return sorted(t.permutation(length)[:count].tolist())


@exercise.property(
    points=3, hints=["Compare positions, not indices.", "A mask: key position > row position is hidden."]
)
def attend_over_some_keys(t: Trial) -> None:
    """attend computes causal attention and its lse over the keys that are here, by their positions"""
    for rows, keys in ((8, 8), (5, 9), (12, 4)):
        here, there = chosen(t, 24, rows), sorted({0, *chosen(t, 24, keys)})
        q, k, v = t.randn(2, rows, 8), t.randn(2, len(there), 8), t.randn(2, len(there), 8)
        t.check(attend, q, k, v, here, there)
    q, k, v = drawn(t, 10)
    t.check(attend, q, k, v, list(range(10)), list(range(10)))


@exercise.property(
    points=2, hints=["exp(-inf - -inf) is NaN.", "Which sum is 0 for such a row, and what is divided by it?"]
)
def attend_rows_that_see_nothing(t: Trial) -> None:
    """attend gives 0 and -inf to rows that see no key, and takes no rows and no keys"""
    q, k, v = t.randn(2, 6, 8), t.randn(2, 4, 8), t.randn(2, 4, 8)
    t.check(attend, q, k, v, [0, 1, 2, 9, 10, 11], [3, 5, 9, 10])
    t.check(attend, q, k, v, [0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    t.check(attend, q, k[:, :0], v[:, :0], [0, 1, 2, 3, 4, 5], [])
    t.check(attend, q[:, :0], k, v, [], [6, 7, 8, 9])


@exercise.property(points=1, hints=["Take the largest score of a row from all of them before the exponential."])
def attend_to_large_scores(t: Trial) -> None:
    """attend overflows at no size of its scores"""
    q, k, v = drawn(t, 12, size=300.0)
    t.check(attend, q, k, v, list(range(12)), list(range(12)))


# --------------------------------------------------------------------------------------------------------------- ring


def rank_parts(x: Tensor, places: Places) -> list[Tensor]:
    return [x[:, part] for part in places]


def driven(t: Trial, q: Tensor, k: Tensor, v: Tensor, places: Places, *, keep: bool = True) -> tuple[list, Network]:
    """What each rank returned, and the network on which they ran. ``keep=False`` drops the results."""
    network = Network(len(places))
    sides = [rank_parts(x, places) for x in (q, k, v)]
    ranks: list[Remote] = [t.make("Rank", rank, *(side[rank] for side in sides), places) for rank in range(len(places))]
    results: list = [None] * len(places)
    ready: dict[int, Tensor | None] = dict.fromkeys(range(len(places)))
    asked = 0
    while ready or network.waiting:
        for rank, answer in ready.items():
            said = ranks[rank].call("send", answer)
            asked += 1
            t.tried = f"ring_attention of {len(places)} ranks with {[len(part) for part in places]} positions"
            if not (isinstance(said, list) and len(said) == 2 and said[0] in ("request", "done")):
                t.fail("wrong-type", "Rank was changed: its answers are not what they were.", got=str(said)[:80])
            if said[0] == "done":
                results[rank] = said[1] if keep else None
                continue
            if asked > MOST_REQUESTS * len(places):
                t.fail(
                    "never-ends",
                    f"After {asked:,} requests the ranks still wanted more.",
                    hint="How often does your loop run?",
                )
            try:
                network.ask(rank, said[1])
            except BadRequest as error:
                t.fail("wrong-request", "A request is one of the three that the docstring names.", got=str(error)[:120])
        try:
            ready = network.answers() if network.waiting else {}
        except Deadlock as error:
            t.fail(
                "deadlock",
                "All ranks that have not ended wait for one another, and would for ever.",
                got=str(error)[:300],
                expected="ranks that end",
                hint="Draw who waits for whom. A rank that sends waits until the other one receives.",
            )
    return results, network


def whole(t: Trial, results: Sequence, q: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """The results of all ranks in the order of the sequence."""
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2])
    for rank, part in enumerate(places):
        pair = t.expect_tuple(results[rank], "out", "lse")
        out[:, part] = t.expect_tensor(
            pair[0], f"out of rank {rank}", (q.shape[0], len(part), q.shape[2]), torch.float32
        )
        lse[:, part] = t.expect_tensor(pair[1], f"lse of rank {rank}", (q.shape[0], len(part)), torch.float32)
    return out, lse


def judged(t: Trial, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Network:
    results, network = driven(t, q, k, v, places)
    t.judge(ring, whole(t, results, q, places), q, k, v, places)
    return network


def layout(length: int, ranks: int, name: str) -> Places:
    return [part.tolist() for part in part_positions(length, ranks, name)]


@exercise.property(points=4, hints=["Step by step: whose keys do I have now?", "In step s, send to rank + s and receive from rank - s.", "Merge as in chapter 2: by the two lses."])  # fmt: skip
def ring_of_four(t: Trial) -> None:
    """four ranks compute what one would, forward, out and lse"""
    length = 40 + t.integer(0, 7)
    judged(t, *drawn(t, length), layout(length, 4, "zigzag"))


@exercise.property(
    points=3,
    hints=[
        "Nothing says that a rank with a higher number has later positions.",
        "What does a rank do that has no rows?",
    ],
)
def ring_of_any_arrangement(t: Trial) -> None:
    """positions lie on the ranks in any arrangement, on any number of ranks, and some have none"""
    length = 21 + t.integer(0, 6)
    for ranks, name in ((1, "contiguous"), (2, "contiguous"), (3, "striped"), (4, "contiguous")):
        judged(t, *drawn(t, length), layout(length, ranks, name))
    owner = torch.randint(0, 4, (length,), generator=t.generator).tolist()
    scattered = [[at for at in range(length) if owner[at] == rank] for rank in (2, 0, 3, 1)]
    judged(t, *drawn(t, length), scattered)
    judged(t, *drawn(t, length), [[], layout(length, 2, "zigzag")[1], [], layout(length, 2, "zigzag")[0]])


@exercise.property(points=2, hints=["Merging takes exponentials, too: of which differences?"])
def ring_of_large_scores(t: Trial) -> None:
    """pieces whose lses lie hundreds apart are merged, too"""
    length = 24
    q, k, v = drawn(t, length, size=200.0)
    judged(t, q, k, v, layout(length, 4, "striped"))


UNSEEN = Misconception(
    "sends-unseen",
    "A rank was sent keys that none of its rows sees.",
    "What does the first rank of a contiguous arrangement need of the last one?",
)
MISSING = Misconception(
    "sends-too-much",
    "A rank was sent more than keys and values that its rows see, each once.",
    "Which numbers does the other rank need, and how many bytes are they?",
)


@exercise.property(
    points=3,
    hints=[
        "The last row of a rank says which keys it sees at all.",
        "Both sides know the places: who has nothing to say sends nothing.",
    ],
)
def nothing_unseen_is_sent(t: Trial) -> None:
    """from rank to rank go keys and values that a row there sees, each once, and nothing else"""
    length, heads, dim = 48, 1, 8
    for name in ("contiguous", "zigzag"):
        places = layout(length, 4, name)
        network = judged(t, *drawn(t, length, heads=heads, dim=dim), places)
        for sender in range(4):
            for receiver in range(4):
                if sender == receiver:
                    continue
                sent = network.sent.get((sender, receiver), 0)
                need = len(seen_keys(places, receiver, sender)) * 2 * heads * dim * 4
                whole_part = len(places[sender]) * 2 * heads * dim * 4
                if sent > need:
                    told = {"got": f"{sent:,} bytes from rank {sender} to rank {receiver}", "expected": f"{need:,}"}
                    t.fail_as(UNSEEN if sent <= whole_part else MISSING, **told)


GATHERED = Misconception(
    "all-parts-held",
    "A rank held keys and values of several others at once. That is what a sequence was spread over ranks to avoid.",
    "When a part has been merged, who still needs it?",
)


@exercise.property(points=3, hints=["Merge each part when it comes, and let it go."])
def one_other_part_at_a_time(t: Trial) -> None:
    """a rank holds its own keys and values, and those of one other rank"""
    ranks, rows, dim = 12, 24, 8192  # keys and values of a rank: 1.5 MiB
    part = 2 * rows * dim * 4
    places = [list(range(rank, ranks * rows, ranks)) for rank in range(ranks)]  # striped: all see something of all
    q, k, v = drawn(t, ranks * rows, heads=1, dim=dim)
    small = drawn(t, 16, heads=1)
    grown = t.grown_by(
        lambda: driven(t, *small, layout(16, 4, "striped"), keep=False), lambda: driven(t, q, k, v, places, keep=False)
    )
    # Of each rank q, k, v, a result and one part more; of the one that is at work a few times as much again.
    most = ranks * (part * 3 // 2 + part // 2 + part) + 8 * part
    held = most + ranks * (ranks - 1) * part // 2  # halfway to all parts
    if grown > held:
        t.fail_as(
            GATHERED,
            got=f"a process of all ranks that grew by {grown // MIB} MiB",
            expected=f"at most {held // MIB} MiB",
        )
