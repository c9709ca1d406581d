"""Show what was recorded on GPUs, whatever there is."""

from __future__ import annotations

from dataclasses import replace

from flashlib.measure import load_record
from flashlib.measure.bench import summary
from flashlib.measure.record import BENCHMARKS
from flashlib.measure.tables import Table, table

__all__ = ["recorded_races"]


def recorded_races(preset: str) -> list[Table]:
    """The recorded runs of `flashlib bench <preset>`, one table for each device, with date, versions and whether it is stale.

    Where there is none, the one table says how to make one: a chapter never shows a figure that nobody measured.
    """
    topic = preset.replace("-", "_")
    records = [load_record(f"{path.parent.name}/{topic}") for path in sorted(BENCHMARKS.glob(f"*/{topic}.json"))]
    if not records:
        return [table([], ["case"], notes=[f"Not recorded yet. On a machine with a GPU: flashlib bench {preset}"])]
    tables = [(summary(record), record) for record in records]
    return [replace(shown, notes=(*shown.notes, f"{record.label}.")) for shown, record in tables]
