"""`flashlib bench` in a terminal: progress while it runs, a table at the end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from flashlib.measure.racing.bench import run, summary, told
from flashlib.measure.racing.plan import Plan
from flashlib.measure.records.record import Record

__all__ = ["print_record", "run_with_progress"]


def run_with_progress(plan: Plan, out: Path) -> Record:
    """:func:`flashlib.measure.racing.bench.run`, with a progress bar and a line for each case."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(plan.topic, total=len(plan.cases))

        def report(case, rows):
            progress.console.print(f"[bold]{escape(case.label)}[/]  {escape(told(rows))}", highlight=False)
            progress.advance(task)

        return run(plan, out, report)


def print_record(record: Record) -> None:
    """The table of a record, our own backend set off, and where it comes from."""
    told = summary(record)
    shown = RichTable(title=record.topic.replace("_", " "), caption=record.label, caption_justify="left")
    for header, align in zip(told.headers, told.align, strict=True):
        style = "bold" if header in ("triton", "flashlib") else None
        shown.add_column(
            header, justify="left" if header == "case" and align == "left" else "right", style=style, overflow="fold"
        )
    for row in told.rows:
        shown.add_row(*(escape(cell) for cell in row))
    console = Console()
    console.print(shown)
    for note in told.notes:
        console.print(escape(note), highlight=False, style="dim")
