"""Where others are faster, or we pay for something: every such cell of the records, and the worst of each kind.

Nothing is chosen by hand: a cell in which another peer won is here, whichever peer and by however little.
"""

from __future__ import annotations

from flashlib.measure.racing.plan import case_of
from flashlib.measure.records.record import load_record
from flashlib.measure.records.tables import Table, table

__all__ = ["PRICES", "losses", "lost_cells", "prices"]

# Races of ours against others, and the peers that are ours in them. What is slower by far and written to be read is not raced.
RACES = {
    "h200/training_forward": ("triton",), "h200/training_backward": ("triton",), "h200/window": ("triton",), "h200/varlen": ("triton",),
    "h200/decode": ("flashlib",), "h200/ragged_decode": ("flashlib", "flashlib_page_16"), "h200/shared_prefix": ("flashlib_prefix",),
    "cpu/cpu_forward": ("cpu",), "cpu/cpu_backward": ("cpu",), "cpu/cpu_decode": ("flashlib",),
}  # fmt: skip


def lost_cells(name: str) -> list[tuple[str, str, float]]:
    """Of a race: case, the fastest other, and its time as a share of our best one; the worst first. And how many cells there are."""
    cells: dict[str, dict[str, float]] = {}
    for row in load_record(name).rows:
        if row["ms"]:
            cells.setdefault(case_of(row).label, {})[row["peer"]] = row["ms"]
    lost = []
    for label, times in cells.items():
        ours = [times[peer] for peer in RACES[name] if peer in times]
        others = {peer: ms for peer, ms in times.items() if peer not in RACES[name] and not peer.startswith("flashlib")}
        if ours and others:
            fastest = min(others, key=others.get)
            if others[fastest] < min(ours):
                lost.append((label, fastest, others[fastest] / min(ours)))
    return sorted(lost, key=lambda cell: cell[2])


def losses() -> Table:
    """A line for each race: how many cells others won, and the one that we lost by most."""
    rows = []
    for name in RACES:
        lost, cells = lost_cells(name), {case_of(row).label for row in load_record(name).rows}
        worst = lost[0] if lost else None
        told = ("", "", "") if worst is None else (worst[0], worst[1], f"{worst[2]:.2f}")
        rows.append((name, f"{len(lost)} of {len(cells)}", *told))
    notes = ["The last column: the time of the fastest other in the time of ours."]
    return table(rows, ["race", "cells lost", "the worst", "won by", "its time in ours"], notes=notes)


def prices() -> Table:
    """What features cost beside the same call without them, as recorded."""
    injection = {row["peer"]: row["ms"] for row in load_record("h200/chunked_injection").rows}
    rows = [
        (
            "injection in chunks of 4,096, memory in the host's RAM",
            f"{injection['inject_chunked_4096'] / injection['inject']:.2f}",
        )
    ]
    for row in load_record("h200/everyday_prices").rows:
        if row.get("ratio"):
            rows.append((f"{row['property']}, D {row['head_dim']}, {row['direction']}", f"{row['ratio']:.2f}"))
    labels = [load_record(name).label for name in PRICES]
    return table(
        rows, ["what", "times as long"], notes=[f"{name}: {label}." for name, label in zip(PRICES, labels, strict=True)]
    )


PRICES = ("h200/chunked_injection", "h200/everyday_prices")
