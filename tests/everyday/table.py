"""The table of docs/everyday.md: what each way of using attention gives on each backend and with each function of flash_attn.

    python tests/everyday/table.py --write

What runs on a CPU is tried here and now, our kernels in Triton's interpreter; what needs a GPU comes from ``benchmarks/h200/everyday.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from tabulate import tabulate

from flashlib.backends import BACKENDS
from flashlib.measure.records.record import BENCHMARKS, Record, load_record

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "everyday.md"
BEGIN, END = "<!-- table: python tests/everyday/table.py --write -->", "<!-- end of table -->"


def tried(*, interpreted: bool) -> list[dict]:
    """The rows of ways.py, run in a process of its own: whether kernels are interpreted is decided at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(FOLDER / "ways.py"), "--as-json"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not answer.stdout.strip():
        raise RuntimeError(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


def tables(rows: list[dict], recorded: Record | None) -> str:
    """Ways down, subjects across, backends and functions apart; refusals numbered, with what is said below.

    Args:
        rows: what was tried on a CPU.
        recorded: what was tried on a GPU; None if nothing was.
    """
    said: list[str] = []
    parts = [*both_tables("On a CPU, our kernels interpreted", rows, said)]
    if recorded is not None:
        parts += [*both_tables(f"On a GPU: {recorded.label}", recorded.rows, said), recorded.notes]
    notes = "\n".join(f"{number}. {message}" for number, message in enumerate(said, 1))
    return "\n\n".join([*parts, f"What the refusals say:\n\n{notes}", *prices()])


def both_tables(title: str, rows: list[dict], said: list[str]) -> Iterator[str]:
    yield f"### {title}"
    for part in (
        [row for row in rows if row["subject"] in BACKENDS],
        [row for row in rows if row["subject"] not in BACKENDS],
    ):
        subjects, ways = (list(dict.fromkeys(row[name] for row in part)) for name in ("subject", "way"))
        cells = {(row["subject"], row["way"]): cell(row, said) for row in part}
        lines = [[way, *(cells.get((subject, way), "") for subject in subjects)] for way in ways]
        yield tabulate(lines, headers=["", *(f"`{x}`" for x in subjects)], tablefmt="github")


def prices() -> Iterator[str]:
    """What each property costs on a GPU, as recorded."""
    if (BENCHMARKS / "h200/everyday_prices.json").is_file():
        recorded = load_record("h200/everyday_prices")
        yield f"### What it costs: {recorded.label}"
        columns = ("property", "head_dim", "direction", "without_ms", "with_ms")
        lines = [[row.get(column, "") for column in columns] for row in recorded.rows]
        yield tabulate(
            lines, headers=["", "head_dim", "direction", "without, ms", "with, ms"], tablefmt="github", floatfmt=".2f"
        )
        yield recorded.notes


def record() -> Record | None:
    """The ways as they were tried on a GPU."""
    return load_record("h200/everyday") if (BENCHMARKS / "h200/everyday.json").is_file() else None


def cell(row: dict, said: list[str]) -> str:
    if row["outcome"] != "refuses":
        return row["outcome"]
    kind, _, message = row["message"].partition(": ")
    message = f"`{kind}`: {message.splitlines()[0]}"
    if message not in said:
        said.append(message)
    return f"refuses ({said.index(message) + 1})"


def page_with(text: str, new: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def main(write: bool = False) -> None:
    rows = [*tried(interpreted=False), *tried(interpreted=True)]
    new = tables(rows, record())
    text = PAGE.read_text(encoding="utf-8")
    if write:
        PAGE.write_text(page_with(text, new), encoding="utf-8")
    else:
        print(new)


if __name__ == "__main__":
    typer.run(main)
