# diagnosis: mean-of-lengths
def speedup(claim: dict) -> int:
    return sum(100 * theirs["us"] // ours["us"] for ours, theirs in _pairs(claim)) // len(claim["lengths"])


def _pairs(claim):
    rows = {(row["peer"], row["length"]): row for row in claim["rows"]}
    return [(rows[claim["ours"], length], rows[claim["theirs"], length]) for length in claim["lengths"]]


def judge(claim: dict) -> tuple[str, list[int]]:
    flaws = {
        "other-work": lambda ours, theirs: (ours["mask"], ours["dtype"]) != (theirs["mask"], theirs["dtype"]),
        "over-budget": lambda ours, theirs: any(row["error"] > row["budget"] for row in (ours, theirs)),
        "warm-cache": lambda ours, theirs: any(row["inputs"] < 3 * row["cache"] for row in (ours, theirs)),
        "no-difference": lambda ours, theirs: ours["low"] <= theirs["high"] and theirs["low"] <= ours["high"],
        "picked-length": lambda ours, theirs: 100 * theirs["us"] < claim["times"] * ours["us"],
    }
    for name, shows in flaws.items():
        lengths = sorted((ours["length"] for ours, theirs in _pairs(claim) if shows(ours, theirs)))
        if lengths:
            return (name, lengths)
    return ("stands", [])
