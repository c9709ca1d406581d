from dataclasses import dataclass
from fractions import Fraction


@dataclass
class Pair:
    length: int
    ours: dict
    theirs: dict

    @property
    def factor(self):
        return Fraction(self.theirs["us"], self.ours["us"])

    def flaw(self, times):
        both = (self.ours, self.theirs)
        overlap = range(max(row["low"] for row in both), min(row["high"] for row in both) + 1)
        checks = [
            ("other-work", len({(row["mask"], row["dtype"]) for row in both}) == 2),
            ("over-budget", any(row["budget"] < row["error"] for row in both)),
            ("warm-cache", any(row["inputs"] // row["cache"] < 3 for row in both)),
            ("no-difference", len(overlap) > 0),
            ("picked-length", self.factor < Fraction(times, 100)),
        ]
        return next((name for name, shows in checks if shows), None)


def _pairs(claim):
    for length in sorted(claim["lengths"]):
        rows = {row["peer"]: row for row in claim["rows"] if row["length"] == length}
        yield Pair(length, rows[claim["ours"]], rows[claim["theirs"]])


def speedup(claim):
    return int(100 * min(pair.factor for pair in _pairs(claim)))


def judge(claim):
    flaws = [(pair.flaw(claim["times"]), pair.length) for pair in _pairs(claim)]
    names = {name for name, _ in flaws if name}
    if not names:
        return "stands", []
    (name,) = names
    return name, [length for found, length in flaws if found == name]
