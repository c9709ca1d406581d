"""Ten claims of the kind "ours is faster", each with the table it rests on. Which of them does the table carry?

A claim is a dict:

* ``"ours"``, ``"theirs"``: names of two implementations;
* ``"times"``: how many times as fast ours is said to be, in hundredths: 150 says one and a half times;
* ``"lengths"``: the lengths for which that is said, a list;
* ``"rows"``: the table, a list of dicts in which the keys of the next paragraph are.

A row is one measurement: ``"peer"`` and ``"length"`` say of what; ``"mask"`` and ``"dtype"`` what was computed, and in which type; ``"us"`` the
median in microseconds, ``"low"`` and ``"high"`` the 20th and 80th percentile of its runs; ``"inputs"`` the bytes of all sets of inputs that took turns, and
``"cache"`` those that the last cache before memory holds; ``"error"`` the largest error of the result, ``"budget"`` the largest that is allowed for its
type, and ``"tolerance"`` the one that the test was run with. All numbers are whole. For each name and each length of the claim there is one row;
there may be rows of other names and lengths, which say nothing.
"""


def speedup(claim: dict) -> int:
    """How many times as fast ours is, in hundredths and rounded down, at that length of the claim at which it is least. Times are medians.

    Args:
        claim: as above. What is wrong with the table does not matter here.
    """
    # BEGIN SOLUTION
    return min(100 * theirs["us"] // ours["us"] for ours, theirs in _pairs(claim))


def _pairs(claim):
    """The two rows of each length of the claim."""
    rows = {(row["peer"], row["length"]): row for row in claim["rows"]}
    return [(rows[claim["ours"], length], rows[claim["theirs"], length]) for length in claim["lengths"]]
    # END SOLUTION


def judge(claim: dict) -> tuple[str, list[int]]:
    """The flaw of a claim, and the lengths at which it shows, ascending: ``("stands", [])`` if there is none.

    A claim has one flaw at most. A flaw shows at a length if, of the two rows of that length,

    * ``"other-work"``: one has another mask or another dtype than the other;
    * ``"over-budget"``: either has an error above its budget, whatever tolerance its test was run with;
    * ``"warm-cache"``: either has inputs of less than 3 times the cache, so that a set may still lie there when its turn comes again;
    * ``"no-difference"``: the ranges from low to high have a point in common, and so nothing was shown;
    * ``"picked-length"``: ours is less times as fast than is said. The claim was made of the lengths at which it holds.
    """
    # BEGIN SOLUTION
    flaws = {
        "other-work": lambda ours, theirs: (ours["mask"], ours["dtype"]) != (theirs["mask"], theirs["dtype"]),
        "over-budget": lambda ours, theirs: any(row["error"] > row["budget"] for row in (ours, theirs)),
        "warm-cache": lambda ours, theirs: any(row["inputs"] < 3 * row["cache"] for row in (ours, theirs)),
        "no-difference": lambda ours, theirs: ours["low"] <= theirs["high"] and theirs["low"] <= ours["high"],
        "picked-length": lambda ours, theirs: 100 * theirs["us"] < claim["times"] * ours["us"],
    }
    for name, shows in flaws.items():
        lengths = sorted(ours["length"] for ours, theirs in _pairs(claim) if shows(ours, theirs))
        if lengths:
            return name, lengths
    return "stands", []
    # END SOLUTION
