# diagnosis: believes-everything
def speedup(claim: dict) -> int:
    return min((100 * theirs["us"] // ours["us"] for ours, theirs in _pairs(claim)))


def _pairs(claim):
    rows = {(row["peer"], row["length"]): row for row in claim["rows"]}
    return [(rows[claim["ours"], length], rows[claim["theirs"], length]) for length in claim["lengths"]]


def judge(claim: dict) -> tuple[str, list[int]]:
    return "stands", []
