"""Show what was recorded on GPUs, whatever there is."""

from __future__ import annotations

from dataclasses import replace

from flashlib.course.display import Figure
from flashlib.course.figures.charts import line_chart
from flashlib.measure import load_record
from flashlib.measure.racing.bench import summary
from flashlib.measure.records.record import BENCHMARKS, Record
from flashlib.measure.records.tables import Table, table

__all__ = ["recorded_races", "recorded_split_counts"]


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


def recorded_split_counts() -> list[Figure | Table]:
    """What `benchmarks/split_counts.py` recorded: time over the number of splits, and what the choices cost, for each device.

    Where nothing was recorded, a table that says how to do so.
    """
    paths = sorted(BENCHMARKS.glob("*/split_counts.json"))
    shown = [part for path in paths for part in _split_counts(load_record(f"{path.parent.name}/split_counts"))]
    command = "python benchmarks/split_counts.py --out benchmarks/<your GPU>"
    return shown or [table([], ["splits"], notes=[f"Not recorded yet. On a machine with a GPU: {command}"])]


def _split_counts(record: Record) -> tuple[Figure, Table]:
    batches = list(dict.fromkeys(row["batch"] for row in record.rows))
    by_count = {
        batch: {row["num_splits"]: row["ms"] for row in record.select(batch=batch) if row["num_splits"]}
        for batch in batches
    }
    counts = list(by_count[batches[0]])
    length, kv_heads = record.rows[0]["length"], record.rows[0]["kv_heads"]
    chart = line_chart(
        counts,
        {f"batch {batch}": [1e3 * times[count] for count in counts] for batch, times in by_count.items()},
        xlabel="splits of each request and KV head",
        ylabel="time (µs)",
        title=f"Measured: {kv_heads} KV heads, {length:,} keys",
        log_y=True,
        source=record.label,
    )
    rows = []
    for batch, times in by_count.items():
        best, chosen = min(times, key=times.get), record.select(batch=batch)[0]["chosen"]
        nearest = min(times, key=lambda count: abs(count - chosen))  # not every number was measured
        fixed = {row["split_size"]: row["ms"] / times[best] for row in record.select(batch=batch) if row["split_size"]}
        told = (f"{times[1] / times[best]:.2f}", f"{times[nearest] / times[best]:.2f}")
        rows.append((batch, best, chosen, *told, *(f"{ratio:.2f}" for ratio in fixed.values())))
    header = ["batch", "best number", "chosen", "unsplit", "as chosen", *(f"splits of {size}" for size in fixed)]
    notes = ["Times in units of the best number's.", f"{record.label}."]
    return chart, table(rows, header, notes=notes)
