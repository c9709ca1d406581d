"""How fast backends were in the recorded race of forwards, in words. The records lie beside the package in the repository."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

__all__ = ["recorded_speeds"]

RECORD = Path(__file__).parents[2] / "benchmarks" / "h200" / "training_forward.json"
LENGTH, HEAD_DIM = 16384, 128


@cache
def recorded_speeds() -> dict[str, str]:
    """By backend, such as ``"644 / 593 TFLOP/s full / causal on NVIDIA H200"``; empty where the package is installed without its records."""
    if not RECORD.is_file():
        return {}
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    found: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        if (row["length"], row["head_dim"]) == (LENGTH, HEAD_DIM) and row.get("tflops"):
            found.setdefault(row["peer"], {})[row["mask"]] = row["tflops"]
    return {
        peer: f"{speed['full']:.0f} / {speed['causal']:.0f} TFLOP/s full / causal on {record['device']}"
        for peer, speed in found.items()
        if {"full", "causal"} <= speed.keys()
    }
