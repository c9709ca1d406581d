"""Checks of ex19: claims with the tables they rest on, drawn anew each time, of which half are flawed in a known way."""

from __future__ import annotations

from collections.abc import Callable

from flashlib.course.grader.exercise import Exercise, Misconception
from flashlib.course.grader.trial import Trial

exercise = Exercise(
    name="ex19",
    file="ex19_claims.py",
    title="Ten claims",
    chapter="18_claims_checked",
    difficulty=2,
    importance=4,
    minutes=45,
)

FLAWS = ("other-work", "over-budget", "warm-cache", "no-difference", "picked-length")
LENGTHS = (512, 1024, 2048, 4096, 8192)
CACHE = 60 << 20
BUDGETS = {"fp32": 20, "bf16": 9000}
PAIR = ("mask", "dtype")

# ------------------------------------------------------------------------------------------------------------ the truth


def pairs(claim: dict, lengths: list[int] | None = None) -> list[tuple[dict, dict]]:
    rows = {(row["peer"], row["length"]): row for row in claim["rows"]}
    return [(rows[claim["ours"], n], rows[claim["theirs"], n]) for n in lengths or claim["lengths"]]


def true_speedup(claim: dict) -> int:
    return min(100 * theirs["us"] // ours["us"] for ours, theirs in pairs(claim))


RULES: dict[str, Callable[[dict, dict, dict], bool]] = {
    "other-work": lambda claim, ours, theirs: any(ours[name] != theirs[name] for name in PAIR),
    "over-budget": lambda claim, ours, theirs: any(row["error"] > row["budget"] for row in (ours, theirs)),
    "warm-cache": lambda claim, ours, theirs: any(row["inputs"] < 3 * row["cache"] for row in (ours, theirs)),
    "no-difference": lambda claim, ours, theirs: ours["low"] <= theirs["high"] and theirs["low"] <= ours["high"],
    "picked-length": lambda claim, ours, theirs: 100 * theirs["us"] < claim["times"] * ours["us"],
}


def judged_by(rules: dict[str, Callable], *, every_length: bool = False, unordered: bool = False) -> Callable[[dict], tuple[str, list[int]]]:  # fmt: skip
    """`judge` by these rules; with mistakes in what it says of the lengths."""

    def model(claim: dict) -> tuple[str, list[int]]:
        for name, shows in rules.items():
            found = [ours["length"] for ours, theirs in pairs(claim) if shows(claim, ours, theirs)]
            if found:
                found = list(claim["lengths"]) if every_length else found
                return name, found if unordered else sorted(found)
        return "stands", []

    return model


true_verdict = judged_by(RULES)

# ------------------------------------------------------------------------------------------------------------- the data


def draw(t: Trial, flaw: str | None, *, variant: int = 0) -> dict:
    """A claim with one flaw, or none. ``variant`` chooses among the ways in which the flaw comes about."""
    dtype, mask = ("fp32", "bf16")[t.integer(0, 1)], ("full", "causal")[t.integer(0, 1)]
    order = [LENGTHS[int(n)] for n in t.permutation(len(LENGTHS))]
    lengths, unsaid = order[:3], order[3:]
    times = t.integer(120, 300)
    rows = []
    for length in order:
        ours = length * t.integer(20, 30)
        factor = times + t.integer(5, 40) if length in lengths else times - t.integer(10, 40)
        theirs = -(-ours * factor // 100)
        rows += [row(t, "ours", length, ours, mask, dtype), row(t, "theirs", length, theirs, mask, dtype)]
    claim = {"ours": "ours", "theirs": "theirs", "times": times, "lengths": lengths, "rows": rows}
    flawed = [lengths[int(n)] for n in t.permutation(3)][: t.integer(1, 2)]
    for ours, theirs in pairs(claim, flawed) if flaw else []:
        spoil(t, claim, ours, theirs, flaw, variant)
    # What is not spoken of may be as flawed as it likes.
    for ours, theirs in pairs(claim, unsaid):
        ours["error"], theirs["inputs"], theirs["mask"] = 3 * ours["budget"], CACHE, "window"
    rows += [row(t, "another", length, 10, "full", "fp16") | {"error": 10**6, "budget": 1} for length in lengths]
    claim["rows"] = [rows[int(n)] for n in t.permutation(len(rows))]
    names = (("flashlib", "cudnn"), ("triton", "naive"), ("new", "old"))[t.integer(0, 2)]
    return renamed(claim, dict(zip(("ours", "theirs"), names, strict=True)))


def row(t: Trial, peer: str, length: int, us: int, mask: str, dtype: str) -> dict:
    budget = BUDGETS.get(dtype, 100) * t.integer(1, 3)
    return {
        "peer": peer, "length": length, "mask": mask, "dtype": dtype, "us": us, "low": us - us // 50, "high": us + us // 40,
        "inputs": (3 + t.integer(0, 4)) * CACHE, "cache": CACHE,
        "error": budget - t.integer(0, budget // 2), "budget": budget, "tolerance": 10 * budget,
    }  # fmt: skip


def spoil(t: Trial, claim: dict, ours: dict, theirs: dict, flaw: str, variant: int) -> None:
    one = (ours, theirs)[variant % 2]
    if flaw == "other-work":
        name, value = (("mask", {"full": "causal", "causal": "full"}), ("dtype", {"fp32": "bf16", "bf16": "fp32"}))[variant // 2 % 2]  # fmt: skip
        one[name] = value[one[name]]
    elif flaw == "over-budget":
        one["error"] = one["budget"] + t.integer(1, one["budget"])
    elif flaw == "warm-cache":
        one["inputs"] = (3 * CACHE - t.integer(1, CACHE), CACHE // 4)[variant // 2 % 2]
    elif flaw == "no-difference":
        # The medians keep their distance; the ranges meet in one point, or one lies inside the other.
        if variant % 2:
            ours["high"] = theirs["low"]
        else:
            theirs["low"], theirs["high"] = ours["low"] - 1, theirs["high"]
    elif flaw == "picked-length":
        theirs["us"] = ours["us"] * (claim["times"] - t.integer(1, 15)) // 100
        theirs["low"], theirs["high"] = theirs["us"] - 1, theirs["us"] + 1
        ours["low"], ours["high"] = ours["us"] - 1, ours["us"] + 1


def renamed(claim: dict, names: dict[str, str]) -> dict:
    rows = [one | {"peer": names.get(one["peer"], one["peer"])} for one in claim["rows"]]
    return claim | {"ours": names["ours"], "theirs": names["theirs"], "rows": rows}


# ------------------------------------------------------------------------------------------------------------- mistakes


def mean_speedup(claim: dict) -> int:
    found = [100 * theirs["us"] // ours["us"] for ours, theirs in pairs(claim)]
    return sum(found) // len(found)


def of_all_rows(claim: dict) -> int:
    lengths = sorted({one["length"] for one in claim["rows"]})
    return min(100 * theirs["us"] // ours["us"] for ours, theirs in pairs(claim, lengths))


SPEEDUP_MISTAKES = [
    Misconception(
        "mean-of-lengths",
        "A mean over the lengths was taken. A claim about each of them is as strong as its weakest.",
        "Twice as fast at one length and as fast at another: what may be said of both?",
        mean_speedup,
    ),
    Misconception(
        "best-length",
        "The largest of the factors was taken.",
        "At which length is it least?",
        lambda claim: max(100 * theirs["us"] // ours["us"] for ours, theirs in pairs(claim)),
    ),
    Misconception(
        "upside-down",
        "Our time was divided by theirs. Half the time is twice as fast.",
        "Which of the two is larger, if ours is faster?",
        lambda claim: min(100 * ours["us"] // theirs["us"] for ours, theirs in pairs(claim)),
    ),
    Misconception(
        "other-lengths-counted",
        "Lengths were counted that the claim does not speak of.",
        "Which rows does the claim rest on?",
        of_all_rows,
    ),
]


def without(name: str) -> dict[str, Callable]:
    return {flaw: rule for flaw, rule in RULES.items() if flaw != name}


def instead(name: str, rule: Callable[[dict, dict, dict], bool]) -> dict[str, Callable]:
    return {**RULES, name: rule}


JUDGE_MISTAKES = [
    Misconception(
        "lengths-not-found",
        "The flaw is right, the lengths are not: named are those at which it shows, ascending.",
        "At which of the claim's lengths do the two rows have the flaw?",
        judged_by(RULES, every_length=True),
    ),
    Misconception(
        "lengths-not-found",
        "The flaw is right, the lengths are not: named are those at which it shows, ascending.",
        "In which order should they come?",
        judged_by(RULES, unordered=True),
    ),
    Misconception(
        "tolerance-believed",
        "The error was compared with the tolerance of the test. Whoever picks that can pass anything.",
        "What does the budget rest on, and what the tolerance?",
        judged_by(instead("over-budget", lambda claim, ours, theirs: any(r["error"] > r["tolerance"] for r in (ours, theirs)))),
    ),
    Misconception(
        "their-error-ignored",
        "Only our own error was looked at. What theirs computes wrongly it may compute quickly as well.",
        "Does the comparison hold if theirs is wrong?",
        judged_by(instead("over-budget", lambda claim, ours, theirs: ours["error"] > ours["budget"])),
    ),
    Misconception(
        "cache-filled-once",
        "Inputs that fill the cache once were taken for cold. Wanted are three times the cache.",
        "What of a cache that holds nine tenths of all sets?",
        judged_by(instead("warm-cache", lambda claim, ours, theirs: any(r["inputs"] <= r["cache"] for r in (ours, theirs)))),
    ),
    Misconception(
        "one-cache-ignored",
        "Only one side's inputs were looked at.",
        "Who gains if theirs is timed cold and ours warm? And the other way round?",
        judged_by(instead("warm-cache", lambda claim, ours, theirs: ours["inputs"] < 3 * ours["cache"])),
    ),
    Misconception(
        "dtype-ignored",
        "Results in different types were compared as if they were the same work.",
        "How many bytes does bf16 move, and how many fp32?",
        judged_by(instead("other-work", lambda claim, ours, theirs: ours["mask"] != theirs["mask"])),
    ),
    Misconception(
        "mask-ignored",
        "A causal mask was compared with none. That is half of the work.",
        "How many pairs does a causal mask leave?",
        judged_by(instead("other-work", lambda claim, ours, theirs: ours["dtype"] != theirs["dtype"])),
    ),
    Misconception(
        "spread-ignored",
        "Two medians were compared, and not the ranges around them.",
        "If the ranges overlap, what would another run have said?",
        judged_by(without("no-difference")),
    ),
    Misconception(
        "touching-ranges",
        "Ranges that have one point in common were taken for apart.",
        "What does the docstring say of a point in common?",
        judged_by(instead("no-difference", lambda claim, ours, theirs: ours["low"] < theirs["high"] and theirs["low"] < ours["high"])),
    ),
    Misconception(
        "weakest-length-ignored",
        "The claim was held against a mean over its lengths. It is made of each of them.",
        "Is what holds on average true of each?",
        judged_by(instead("picked-length", lambda claim, ours, theirs: mean_speedup(claim) < claim["times"])),
    ),
    Misconception(
        "believes-everything",
        "Every claim was believed.",
        "Take the first flaw of the list: which two numbers of a row tell it?",
        lambda claim: ("stands", []),
    ),
]  # fmt: skip


def verdicts_on(t: Trial, claims: list[dict]) -> None:
    """Every verdict is right. If one is not, further claims tell which mistake it is: on a few, several mistakes say the same."""
    got = [asked(t, claim) for claim in claims]
    if got == [true_verdict(claim) for claim in claims]:
        return
    claims = claims + [draw(t, flaw, variant=variant) for flaw in FLAWS for variant in range(4)] + [draw(t, None)]
    got += [asked(t, claim) for claim in claims[len(got) :]]
    expected = [true_verdict(claim) for claim in claims]
    for mistake in JUDGE_MISTAKES:
        if got == [mistake.model(claim) for claim in claims]:
            wrong = next(n for n, verdict in enumerate(got) if verdict != expected[n])
            t.fail_as(mistake, got=str(got[wrong]), expected=str(expected[wrong]))
    t.expect_equal(got, expected, "A verdict")


def asked(t: Trial, claim: dict) -> tuple[str, list[int]]:
    got = t.call("judge", claim)
    if not (isinstance(got, (tuple, list)) and len(got) == 2 and isinstance(got[1], (list, tuple))):
        t.fail(
            "wrong-type", "judge returns a flaw and a list of lengths.", got=repr(got)[:80], expected='("stands", [])'
        )
    t.tried = f"judge on a claim of {claim['times'] / 100:g} times at {claim['lengths']}"
    return got[0], list(got[1])


# ----------------------------------------------------------------------------------------------------------- properties


@exercise.property(
    points=2, hints=["One length first: which time by which?", "Then the least over the lengths of the claim."]
)
def speedups(t: Trial) -> None:
    """speedup is what holds at every length of the claim"""
    for _ in range(6):
        claim = draw(t, None)
        t.expect_equal(t.call("speedup", claim), true_speedup(claim), "The factor", SPEEDUP_MISTAKES, claim)


@exercise.property(points=2, hints=["Look at mask and dtype of the two rows of a length."])
def work_that_differs(t: Trial) -> None:
    """judge finds comparisons of different work, and says at which lengths"""
    verdicts_on(t, [draw(t, "other-work", variant=variant) for variant in range(4)])


@exercise.property(points=2, hints=["Error against budget, for both rows."])
def results_that_are_wrong(t: Trial) -> None:
    """judge finds results outside of their budget, whatever tolerance they passed"""
    verdicts_on(t, [draw(t, "over-budget", variant=variant) for variant in range(4)])


@exercise.property(points=2, hints=["Inputs against three times the cache, for both rows."])
def caches_that_were_warm(t: Trial) -> None:
    """judge finds inputs that lay in the cache"""
    verdicts_on(t, [draw(t, "warm-cache", variant=variant) for variant in range(4)])


@exercise.property(
    points=2, hints=["Two ranges have a point in common if each begins before the other ends, or where it ends."]
)
def differences_that_are_none(t: Trial) -> None:
    """judge finds differences that drown in the spread"""
    verdicts_on(t, [draw(t, "no-difference", variant=variant) for variant in range(4)])


@exercise.property(points=2, hints=["The claim is made of each of its lengths."])
def lengths_that_were_picked(t: Trial) -> None:
    """judge finds lengths at which less is true than is said"""
    verdicts_on(t, [draw(t, "picked-length", variant=variant) for variant in range(4)])


@exercise.property(points=3, hints=["Which claims did you reject that have no flaw? Which flaw did you see?"])
def ten_claims(t: Trial) -> None:
    """of ten claims, five flawed, each gets the right verdict"""
    flaws = [*FLAWS, *[None] * 5]
    verdicts_on(t, [draw(t, flaws[int(n)], variant=t.integer(0, 3)) for n in t.permutation(len(flaws))])
