"""The estimates held against recorded runs: every recorded cell of our kernels on a known GPU, and how far off each estimate is.

But for one that is named below, no figure of these records sets anything in the model. Its ceilings are data sheet figures and two measured ones that
:mod:`flashlib.cost.devices` names; what a program costs beside its tiles is :mod:`flashlib.inference.decode`'s, and what a kernel costs
a round figure. Three decisions were made while looking at figures: that products and exponentials of a tile are added up, that
decoding reads at the memory's rate and not in waves, and that a program alone on its multiprocessor takes 1.5 us for a tile of several queries.
The six cells that were looked at for them (16k tokens without a mask at both head_dims, forward and backward; decoding of 64 requests;
the check of guessed tokens of 4 requests, which was off by 37% before) are marked, and left out of the verdict. The worst point, a shared
prefix, was seen before the small kernel that zeroes the forward's counter was added to the launches, which brought it from 31% to 29%.

    python -m flashlib.cost.verdict
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from flashlib.cost.conventions import CONVENTIONS
from flashlib.cost.counts import Problem, formula, paper_flops
from flashlib.cost.devices import Device, device
from flashlib.cost.launches import shared_prefix_launches
from flashlib.cost.roofs import attention_time, launch_time, total
from flashlib.cost.visible import Visible
from flashlib.measure.racing.cases import Case
from flashlib.measure.racing.decoding import DecodeCase
from flashlib.measure.records.record import BENCHMARKS, load_record
from flashlib.measure.records.tables import Table, table

__all__ = ["Point", "Verdict", "points", "verdict"]

TRAINING = ("training_forward", "training_backward", "window", "varlen")
FURTHER = "cost_points"
PEERS = ("genz", "aiconfigurator")
DECODING = ("decode", "paged_decode", "ragged_decode", "shared_prefix")


@dataclass(frozen=True)
class Point:
    """One recorded cell of our own kernels.

    Attributes:
        topic: of the record. case: in words. kind: ``"forward"``, ``"backward"``, ``"decode"``, ``"shared prefix"``.
        measured_ms, predicted_ms: the record's median, and the estimate.
        bound: what the estimate says binds. looked_at: whether the model was decided on while looking at this cell.
        by_convention: milliseconds by other ways of counting: their FLOPs at the rate of a large matrix product.
        by_peer: milliseconds by other people's estimators, where they can answer (``benchmarks/cost_peers.py``).
    """

    topic: str
    case: str
    kind: str
    measured_ms: float
    predicted_ms: float
    bound: str
    looked_at: bool
    by_convention: dict[str, float]
    by_peer: dict[str, float]

    @property
    def error(self) -> float:
        """How much longer the estimate is than the measurement, as a share of the latter."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Verdict:
    """Errors over the points that the model was not decided on."""

    points: tuple[Point, ...]

    @property
    def judged(self) -> list[Point]:
        return [point for point in self.points if not point.looked_at]

    def errors(self, kind: str | None = None, way: str | None = None) -> list[float]:
        """Sizes of the errors, sorted: of all judged points or those of a kind; of our estimate, or of a convention's."""
        chosen = [point for point in self.judged if kind in (None, point.kind)]
        if way is None:
            return sorted(abs(point.error) for point in chosen)
        return sorted(abs(point.by_convention[way] / point.measured_ms - 1) for point in chosen)

    def summary(self) -> Table:
        """Median and worst error by kind, and those of the other ways of counting."""
        rows = []
        for kind in (None, *dict.fromkeys(point.kind for point in self.judged)):
            ours = self.errors(kind)
            rows.append(
                (kind or "all", len(ours), *_shares(ours), *(_shares(self.errors(kind, way))[0] for way in _ways(self)))
            )
        headers = ["points", "number", "median error", "worst error", *(f"median, {way}" for way in _ways(self))]
        looked_at = len(self.points) - len(self.judged)
        notes = [f"{looked_at} further cells were looked at when the model was made, and are left out."]
        return table(rows, headers, notes=notes)

    def peers(self) -> Table:
        """Other estimators on the points that they can answer, beside ours on the same points."""
        rows = []
        for name in dict.fromkeys(name for point in self.judged for name in point.by_peer):
            answered = [point for point in self.judged if name in point.by_peer]
            for kind in (None, *dict.fromkeys(point.kind for point in answered)):
                chosen = [point for point in answered if kind in (None, point.kind)]
                theirs = sorted(abs(point.by_peer[name] / point.measured_ms - 1) for point in chosen)
                ours = sorted(abs(point.error) for point in chosen)
                nearer = sum(abs(point.error) < abs(point.by_peer[name] / point.measured_ms - 1) for point in chosen)
                rows.append((name, kind or "all", len(chosen), *_shares(theirs), *_shares(ours), nearer))
        headers = [
            "estimator",
            "points",
            "answered",
            "its median",
            "its worst",
            "our median",
            "our worst",
            "ours is nearer",
        ]
        return table(
            rows,
            headers,
            notes=[
                f"Of {len(self.judged)} points; the record cost_peers says why not the others of the races. Those of cost_points were not asked. "
                "aiconfigurator's tables are of TensorRT-LLM's kernels."
            ],
        )

    def detail(self) -> Table:
        """Every point, the worst first."""
        ordered = sorted(self.points, key=lambda point: -abs(point.error))
        rows = [
            (point.case, point.topic, point.measured_ms, point.predicted_ms, f"{point.error:+.1%}", point.bound, "looked at" if point.looked_at else "")
            for point in ordered
        ]  # fmt: skip
        return table(rows, ["case", "record", "measured ms", "estimate ms", "error", "bound by", ""])


def _ways(verdict: Verdict) -> list[str]:
    return list(verdict.points[0].by_convention)


def _shares(errors: list[float]) -> tuple[str, str]:
    return f"{statistics.median(errors):.1%}", f"{errors[-1]:.1%}"


def points(folder: str = "h200", gpu: Device | None = None) -> Iterable[Point]:
    """Every timed cell of our own kernels in the records of a machine."""
    gpu, theirs = gpu or device(folder), _peers(folder)
    for topic in (*TRAINING, *DECODING):
        makes = _training if topic in TRAINING else _decoding
        for row in load_record(f"{folder}/{topic}").rows:
            # Beside the shared prefix is timed what it saves: plain decoding of caches that hold the prefix each.
            ours = row["peer"] == "triton" or row["peer"].startswith(
                "flashlib_" if topic == "shared_prefix" else "flashlib"
            )
            if ours and row["ms"]:
                yield replace(makes(topic, row, gpu), by_peer=theirs.get(_case_of(row), {}))
    if (BENCHMARKS / folder / f"{FURTHER}.json").is_file():  # what benchmarks/cost_points.py has timed, if it was run
        for row in load_record(f"{folder}/{FURTHER}").rows:
            yield further(row, gpu)


def _peers(folder: str) -> dict[tuple, dict[str, float]]:
    """What other estimators say, by case."""
    return {
        _case_of(row): {name: row[f"{name}_ms"] for name in PEERS if row[f"{name}_ms"]}
        for row in load_record(f"{folder}/cost_peers").rows
    }


def _case_of(row: dict) -> tuple:
    names = ("batch", "q_heads", "kv_heads", "length", "head_dim", "mask", "direction", "queries", "own", "cache", "dtype", "peer")  # fmt: skip
    return tuple(row.get(name) for name in names)


def verdict(folder: str = "h200") -> Verdict:
    """All points of a machine's records."""
    return Verdict(tuple(points(folder)))


def problem_of(case: Case) -> Problem:
    """The problem of a recorded training case."""
    batch, heads, length, head_dim = case.shapes[0]
    right = 0 if case.causal else None
    if case.sequences is None:
        mask = Visible.band(length, length, left=case.window, right=right)
    else:
        mask = Visible.packed(case.sequences, right=right)
    return Problem(batch, heads, case.kv_heads, length, length, head_dim, visible=(mask,), dtype=case.dtype)


def _training(topic: str, row: dict, gpu: Device) -> Point:
    case = Case.from_columns(row)
    problem = problem_of(case)
    backward = case.direction == "backward"
    estimate = attention_time(problem, gpu, direction=case.direction)
    looked_at = topic.startswith("training") and case.length == 16384 and case.mask == "full"
    return Point(topic, case.label, case.direction, row["ms"], 1e3 * estimate.seconds, estimate.bound, looked_at, _ways_of(problem, gpu, backward), {})  # fmt: skip


def _decoding(topic: str, row: dict, gpu: Device) -> Point:
    case = DecodeCase.from_columns(row)
    shapes = (case.batch, case.q_heads, case.kv_heads, case.queries, case.length + case.own, case.head_dim)
    problem = Problem.causal(*shapes, dtype=case.dtype)
    page = row["peer"].rpartition("_")[2]
    if case.cache == "prefix":
        sizes = (case.batch, case.q_heads, case.kv_heads, case.head_dim, case.length, case.own)
        launches = shared_prefix_launches(*sizes, gpu, queries=case.queries, dtype=case.dtype)
        estimate, kind = total(launch_time(launch, case.dtype, gpu) for launch in launches), "shared prefix"
    else:
        page_size = int(page) if page.isdigit() else None
        estimate = attention_time(problem, gpu, direction="decode", lengths=case.lengths, page_size=page_size)
        kind = "decode"
    label = f"{case.label}{f' pages of {page}' if page.isdigit() else ''}"
    looked_at = topic == "decode" and case.batch == 64
    ways = _ways_of(problem, gpu, False)
    return Point(topic, label, kind, row["ms"], 1e3 * estimate.seconds, estimate.bound, looked_at, ways, {})


def further(row: dict, gpu: Device) -> Point:
    """A row of ``benchmarks/cost_points.py``: chunks of a prompt, grouped heads, decoding in many shapes."""
    sizes = {name: row[name] for name in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim")}
    problem = Problem.causal(**sizes, dtype=row["dtype"])
    estimate = attention_time(problem, gpu, direction=row["kind"])
    kind = "chunked" if row["kind"] == "forward" and row["q_len"] < row["kv_len"] else row["kind"]
    label = f"{kind} {' '.join(f'{name}={value}' for name, value in sizes.items())}"
    ways = _ways_of(problem, gpu, row["kind"] == "backward")
    looked_at = kind == "decode" and row["q_len"] > 1 and row["batch"] == 4
    return Point(FURTHER, label, kind, row["ms"], 1e3 * estimate.seconds, estimate.bound, looked_at, ways, {})


def _ways_of(problem: Problem, gpu: Device, backward: bool) -> dict[str, float]:
    """Milliseconds by FLOPs alone."""
    rate = gpu.sustained(problem.dtype) / 1e3
    exact = formula(problem).products * (2.5 if backward else 1)
    ways = {"exact FLOPs": exact / rate, "papers' FLOPs": paper_flops(problem, backward=backward) / rate}
    for name, count in CONVENTIONS.items():
        ways[name] = count(problem).per_device * (2.5 if backward else 1) / rate
    return ways


if __name__ == "__main__":
    found = verdict()
    print(found.detail(), found.summary(), found.peers(), sep="\n\n")
