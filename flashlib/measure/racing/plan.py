"""What a run is made of: its cases, who takes part, and which files its record depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashlib.measure.racing.cases import Case
from flashlib.measure.racing.decoding import DecodeCase
from flashlib.measure.racing.peers import Peer
from flashlib.measure.records.sources import cpu_sources, decode_sources, kernel_sources

__all__ = ["AnyCase", "Plan", "case_of", "sources_of"]

AnyCase = Case | DecodeCase


@dataclass(frozen=True)
class Plan:
    """What to run. :func:`plan` makes one from a preset's name or a grid.

    Attributes:
        topic: of the record, and its file's name. cases, peers: what is run, and by whom; all cases of one kind.
        device: ``"cuda"`` or ``"cpu"``.
        measures: ``"speed"``, ``"memory"`` (of forward and backward, at its peak) or ``"protocol"`` (:mod:`flashlib.measure.racing.protocol`).
        seconds: how long to time each peer in each case. seed: of inputs, samples and orders.
        limit_s: begin no case later than this; None for no limit.
        tutorial: as in :func:`plan`.
    """

    topic: str
    cases: Sequence[AnyCase]
    peers: list[Peer]
    device: str
    measures: str = "speed"
    seconds: float = 0.3
    seed: int = 0
    limit_s: float | None = None
    tutorial: Path | None = None

    @property
    def decodes(self) -> bool:
        return any(isinstance(case, DecodeCase) for case in self.cases)


def case_of(row: dict) -> AnyCase:
    """The case of a record's row."""
    return (DecodeCase if "cache" in row else Case).from_columns(row)


def sources_of(plan: Plan) -> list[str]:
    """Files that decide how fast our own peers in a plan are."""
    if plan.device == "cpu":
        return cpu_sources(decoding=plan.decodes)
    if not plan.decodes:
        return kernel_sources()
    if any(isinstance(case, DecodeCase) and case.about_memory for case in plan.cases):
        return [*kernel_sources(), *decode_sources(), "inference/prefix.py", "inference/injection.py"]
    return decode_sources()
