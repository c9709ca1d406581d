def _find(claim, peer, length):
    for row in claim["rows"]:
        if row["peer"] == peer and row["length"] == length:
            return row
    raise KeyError(peer, length)


def speedup(claim):
    least = None
    for length in claim["lengths"]:
        ours, theirs = (_find(claim, claim[side], length)["us"] for side in ("ours", "theirs"))
        factor = (100 * theirs) // ours
        least = factor if least is None else min(least, factor)
    return least


def _flaw_at(claim, length):
    ours, theirs = (_find(claim, claim[side], length) for side in ("ours", "theirs"))
    if ours["mask"] != theirs["mask"] or ours["dtype"] != theirs["dtype"]:
        return "other-work"
    if ours["error"] > ours["budget"] or theirs["error"] > theirs["budget"]:
        return "over-budget"
    if min(ours["inputs"] / ours["cache"], theirs["inputs"] / theirs["cache"]) < 3:
        return "warm-cache"
    if max(ours["low"], theirs["low"]) <= min(ours["high"], theirs["high"]):
        return "no-difference"
    return "picked-length" if theirs["us"] / ours["us"] < claim["times"] / 100 else None


def judge(claim):
    found = {length: _flaw_at(claim, length) for length in claim["lengths"]}
    shown = {length: flaw for length, flaw in found.items() if flaw}
    if not shown:
        return "stands", []
    return next(iter(shown.values())), sorted(shown)
