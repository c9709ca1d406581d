"""Attention against its peers: speed and memory, in one run, checked and recorded.

python -m flashlib.measure.bench training-forward --out results

``flashlib bench`` is the same with a progress bar and figures. Each case is a race: every peer's result is first held against
the float64 oracle, then they are timed in turns. What is done is written down after every case, so a run that is killed keeps it.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from flashlib.measure.cases import PRESETS, Case, parse_grid
from flashlib.measure.contender import Contender, Inputs, Witness, draw_inputs, inputs_for
from flashlib.measure.machine import matmul_flops_per_s, stream_bytes_per_s
from flashlib.measure.memory import peak_bytes
from flashlib.measure.peers import Peer, PeerUnavailableError, default_peers, find_peers
from flashlib.measure.record import PACKAGE, Record, new_record, save_record
from flashlib.measure.tables import Table, format_bytes, format_number, table
from flashlib.measure.timing import Timing, time_in_turns

__all__ = ["Plan", "kernel_sources", "plan", "race", "run", "summary"]

NOTES = (
    "Peers take turns in shuffled order. GPU time by device events around CUDA graphs, with enough input sets to miss the L2 "
    "cache; median of the rounds, 20th and 80th percentile. TFLOP/s by the papers' count: 4 B H S^2 D, half if causal, 2.5 times "
    "for the backward, visible pairs for windows. Masks are laid out and kernels compiled beforehand. Every result was within "
    "the error budget against float64 on sampled rows."
)
MEMORY_NOTES = "Peak memory of one forward and backward beyond q, k, v and the gradient of out: the allocator's count."
Report = Callable[[Case, list[dict]], None]


@dataclass(frozen=True)
class Plan:
    """What to run. :func:`plan` makes one from a preset's name or a grid.

    Attributes:
        topic: of the record, and its file's name. cases, peers: what is run, and by whom.
        device: ``"cuda"`` or ``"cpu"``. memory: measure peak memory instead of time.
        seconds: how long to time each peer in each case. seed: of inputs, samples and orders.
        limit_s: begin no case later than this; None for no limit.
    """

    topic: str
    cases: list[Case]
    peers: list[Peer]
    device: str
    memory: bool = False
    seconds: float = 0.3
    seed: int = 0
    limit_s: float | None = None


def plan(
    what: str,
    *,
    peers: Iterable[str] = (),
    device: str | None = None,
    tutorial: Path | None = None,
    seconds: float = 0.3,
    seed: int | None = None,
    limit_s: float | None = None,
) -> Plan:
    """A plan from the name of a preset, or from a grid such as ``"length=4096 mask=full,causal"``.

    Args:
        what: a name of :data:`flashlib.measure.cases.PRESETS`, or a grid of :func:`flashlib.measure.cases.parse_grid`.
        peers: by name; none for those worth racing on the device.
        device: ``"cuda"`` or ``"cpu"``; None for the GPU if there is one.
        tutorial: a copy of Triton's tutorial ``06-fused-attention.py``, to be a peer.

    Raises:
        ValueError: there is no such preset, field, peer, device or file; says which there are.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU here")
    if what not in PRESETS and "=" not in what:
        raise ValueError(
            f"there is no preset {what!r}; presets are {', '.join(PRESETS)}; or name a grid: length=4096 ..."
        )
    return Plan(
        topic=what.replace("-", "_") if what in PRESETS else "bench",
        cases=parse_grid(PRESETS.get(what, what), device=device, preset=what in PRESETS),
        peers=find_peers(list(peers), tutorial) if peers else default_peers(device, tutorial),
        device=device,
        memory=what == "memory",
        seconds=seconds,
        seed=random.SystemRandom().getrandbits(31) if seed is None else seed,
        limit_s=limit_s,
    )


def run(plan: Plan, out: Path, report: Report = lambda case, rows: None) -> Record:
    """Run all cases, and write ``<out>/<topic>.json`` after each.

    Args:
        report: called after each case with the rows it gave.

    Returns:
        the record. Its ``extra["complete"]`` is False as long as cases are missing.
    """
    started, rows = time.monotonic(), []
    machine = {} if plan.memory else ceilings(plan.device)
    measure = _Memory(plan) if plan.memory else _Speed(plan)
    for number, case in enumerate(plan.cases, start=1):
        if plan.limit_s is not None and time.monotonic() - started > plan.limit_s:
            break
        new = measure(case)
        rows += new
        record = _record(plan, rows, number == len(plan.cases), machine)
        save_record(record, out)
        report(case, new)
    return record


def _record(plan: Plan, rows: list[dict], complete: bool, machine: dict) -> Record:
    extra = {"complete": complete, "cases": len(plan.cases), "seed": plan.seed, "device": plan.device, **machine}
    notes = MEMORY_NOTES if plan.memory else NOTES
    return new_record(plan.topic, rows, kernel_sources(), notes, **extra)


def kernel_sources() -> list[str]:
    """Files that decide how fast our own backends are, as :func:`flashlib.measure.record.sources_hash` takes them."""
    kernels = [path for path in (PACKAGE / "kernels").glob("*.py") if path.stem not in ("__init__", "inspect")]
    return sorted(str(path.relative_to(PACKAGE)) for path in [*kernels, PACKAGE / "backends" / "triton.py"])


def ceilings(device: str) -> dict[str, float]:
    """What this machine can do at best, in the same run: a large matrix product, and memory read and written."""
    matmul, stream = (8192, 2**32) if device == "cuda" else (1024, 2**26)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {
        "matmul_flops_per_s": matmul_flops_per_s(matmul, dtype=dtype, device=device),
        "stream_bytes_per_s": stream_bytes_per_s(stream, device=device),
    }


class _Speed:
    """Races; draws its randomness from the plan's seed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rng = plan, random.Random(plan.seed)

    def __call__(self, case: Case) -> list[dict]:
        return race(case, self.plan.peers, device=self.plan.device, seconds=self.plan.seconds, rng=self.rng)


def race(case: Case, peers: Iterable[Peer], *, device: str, seconds: float, rng: random.Random) -> list[dict]:
    """Check and time all peers on one case: one row for each, with its figures or the reason why there are none.

    Columns: the case's own; ``peer``, ``peer_dtype``; ``ms``, ``p20_ms``, ``p80_ms``, ``rounds``, ``tflops``; ``error`` and
    ``budget`` by result; ``no_graph``; ``why_not``.
    """
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    drawn = draw_inputs(case, target, torch.Generator(device=target).manual_seed(rng.getrandbits(48)))
    witness = Witness(case, rng)
    rows, contenders = [], {}
    for peer in peers:
        row = {**case.columns(), "peer": peer.name, "peer_dtype": peer.dtype or case.dtype, "ms": None, "why_not": None}
        contender, row["why_not"] = _enter(peer, case, drawn, witness)
        rows.append(row)
        if contender is not None:
            row |= {"error": contender.comparison.error, "budget": contender.comparison.budget}
            if contender.comparison.passed:
                contenders[peer.name] = contender
            else:
                row["why_not"] = f"wrong: {contender.comparison.message}"
    bursts = {name: contender.burst for name, contender in contenders.items()}
    timings = time_in_turns(bursts, device=device, budget_s=seconds, rng=rng)
    for row in rows:
        if row["peer"] in timings:
            row |= _figures(case, contenders[row["peer"]], timings[row["peer"]])
    del contenders, bursts, contender
    _free()
    return rows


def _enter(peer: Peer, case: Case, drawn: list[Inputs], witness: Witness) -> tuple[Contender | None, str | None]:
    """The contender, or why there is none."""
    try:
        return Contender(peer, case, drawn, witness), None
    except PeerUnavailableError as error:
        return None, str(error)
    except torch.AcceleratorError:
        raise  # the device itself is in doubt, and with it everything measured from here on
    except Exception as error:  # other people's code may fail in any way, and the race goes on
        return None, _told(error)


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]} ({Path(where.filename).name}:{where.lineno})"


def _figures(case: Case, contender: Contender, timing: Timing) -> dict:
    median, low, high = (ms / contender.calls for ms in (timing.median_ms, timing.p20_ms, timing.p80_ms))
    figures = {
        "ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "rounds": timing.repeats,
        "tflops": case.flops / median / 1e9,
    }
    return {**figures, "input_sets": contender.calls, "no_graph": contender.no_graph}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Memory:
    """Peak memory of forward and backward. A peer that ran out of memory is not asked for longer sequences."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rng = plan, random.Random(plan.seed)
        self.walls: dict[str, int] = {}

    def __call__(self, case: Case) -> list[dict]:
        return [{**case.columns(), "peer": peer.name, **self._peak(peer, case)} for peer in self.plan.peers]

    def _peak(self, peer: Peer, case: Case) -> dict:
        if peer.name in self.walls:
            return {"peak_bytes": None, "why_not": f"out of memory at length {self.walls[peer.name]}"}
        try:
            return {"peak_bytes": self._measured(peer, case), "why_not": None}
        except PeerUnavailableError as error:
            return {"peak_bytes": None, "why_not": str(error)}
        except torch.OutOfMemoryError:
            self.walls[peer.name] = case.length
            return {"peak_bytes": None, "why_not": "out of memory"}
        except Exception as error:
            return {"peak_bytes": None, "why_not": _told(error)}
        finally:
            _free()

    def _measured(self, peer: Peer, case: Case) -> int:
        device = torch.device(self.plan.device)
        generator = torch.Generator(device=device).manual_seed(self.rng.getrandbits(48))
        inputs = inputs_for(peer, case, draw_inputs(case, device, generator)[0])
        qkv = (inputs.q, inputs.k, inputs.v)
        attend = peer.prepare(case, *qkv)

        def forward_and_backward():
            out = attend(*qkv)
            return torch.autograd.grad(out, qkv, inputs.grad_out.to(out.dtype))

        forward_and_backward()  # compiles, tunes, and sets up workspaces, none of which is the algorithm's memory
        _free()
        return peak_bytes(forward_and_backward, device)


def summary(record: Record) -> Table:
    """A record as a table: a line for each case, a column for each peer, and below it who could not run and why."""
    value, show, unit = (
        ("peak_bytes", format_bytes, "") if "peak_bytes" in record.rows[0] else ("tflops", _tflops, "TFLOP/s")
    )
    peers = list(dict.fromkeys(row["peer"] for row in record.rows))
    ran = [peer for peer in peers if any(row.get(value) for row in record.select(peer=peer))]
    lines: dict[str, dict[str, str]] = {}
    for row in record.rows:
        line = lines.setdefault(_case_of(row).label, {})
        line[row["peer"]] = show(row[value]) if row.get(value) else "-"
    rows = [(label, *(line.get(peer, "") for peer in ran)) for label, line in lines.items()]
    notes = [unit] if unit else []
    for peer in peers:
        reasons = dict.fromkeys(row["why_not"] for row in record.select(peer=peer) if row["why_not"])
        notes += [f"{peer}: {reason}" for reason in reasons]
    return table(rows, ["case", *ran], notes=notes)


def _tflops(value: float) -> str:
    return format_number(value, digits=3)


def _case_of(row: dict) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help=f"a preset ({', '.join(PRESETS)}) or a grid: 'length=4096 mask=full,causal'")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the record")
    parser.add_argument("--peers", nargs="*", default=[], help="by name; none for those worth racing here")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--tutorial", type=Path, help="a copy of Triton's 06-fused-attention.py")
    parser.add_argument("--seconds", type=float, default=0.3, help="to time each peer in each case")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--limit", type=float, dest="limit_s", help="begin no case after so many seconds")
    options = vars(parser.parse_args())
    out, what = options.pop("out"), options.pop("what")
    record = run(plan(what, **options), out, report=_print_case)
    print(summary(record))


def _print_case(case: Case, rows: list[dict]) -> None:
    told = [
        f"{row['peer']} {row['tflops']:.4g}"
        if row.get("tflops")
        else f"{row['peer']} {format_bytes(row['peak_bytes'])}"
        for row in rows
        if row.get("tflops") or row.get("peak_bytes")
    ]
    print(f"{case.label}: {', '.join(told) or 'no peer could run it'}", flush=True)


if __name__ == "__main__":
    main()
