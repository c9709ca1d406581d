"""Hardware counters of a whole plan: every peer in every case, under Nsight Compute."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from flashlib.measure.counting.counters import NOTES, Counted, CountersUnavailableError, marked, read, why_not
from flashlib.measure.racing.contender import draw_inputs, prepared, witness_of
from flashlib.measure.racing.decoding import DecodeCase, decode_peers
from flashlib.measure.racing.peers import find_peers
from flashlib.measure.racing.plan import Plan, case_of, sources_of
from flashlib.measure.records.record import Record, new_record, save_record

__all__ = ["run_counters"]


def run_counters(plan: Plan, out: Path) -> Record:
    """Count what every peer of a plan does in every case, and write ``<out>/<topic>_counters.json``.

    A row has the columns of the case, ``peer``, ``kernels``, the figures of :data:`COUNTERS`, ``stalls`` and ``why_not``.

    Raises:
        CountersUnavailableError, RuntimeError: as :func:`flashlib.measure.counting.counters.read`.
    """

    jobs = [(case, peer) for case in plan.cases for peer in plan.peers]
    obstacle = why_not() if plan.device == "cuda" else f"hardware counters are a GPU's, and the device is {plan.device}"
    if obstacle:
        raise CountersUnavailableError(obstacle)
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "asked.json"), Path(folder, "told.json")
        tutorial = None if plan.tutorial is None else str(plan.tutorial)
        asked.write_text(
            json.dumps(
                {
                    "cases": [asdict(case) for case in plan.cases],
                    "peers": [peer.name for peer in plan.peers],
                    "tutorial": tutorial,
                    "seed": plan.seed,
                    "device": plan.device,
                }
            )
        )
        found = read([sys.executable, "-m", "flashlib.measure.racing.counted", str(asked), str(told)])
        obstacles = json.loads(told.read_text())
    rows = []
    for number, (case, peer) in enumerate(jobs):
        counted, obstacle = found.get(number), obstacles.get(str(number))
        if counted is None and obstacle is None:
            raise RuntimeError(f"ncu counted no kernel of {peer.name} in {case.label}")
        counted = counted or Counted()
        rows.append({**case.columns(), "peer": peer.name, "kernels": counted.kernels, **counted.figures, "stalls": counted.stalls, "why_not": obstacle})  # fmt: skip
    record = new_record(f"{plan.topic}_counters", rows, sources_of(plan), NOTES, device=plan.device, seed=plan.seed)
    save_record(record, out)
    return record


def main() -> None:
    """What ``ncu`` watches: every peer in every case once, under its number. Who cannot run, and why, is written into a file."""
    asked, obstacles, number = json.loads(Path(sys.argv[1]).read_text()), {}, 0
    rng, device = random.Random(asked["seed"]), torch.device(asked["device"])
    for columns in asked["cases"]:
        case = case_of(columns)
        tutorial = asked["tutorial"] and Path(asked["tutorial"])
        decodes = isinstance(case, DecodeCase)
        peers = decode_peers(asked["peers"]) if decodes else find_peers(asked["peers"], tutorial)
        drawn = draw_inputs(case, device, torch.Generator(device=device).manual_seed(rng.getrandbits(48)))[:1]
        witness = witness_of(case, drawn, rng)
        for peer in peers:
            try:
                comparison, _, (call,) = prepared(peer, case, drawn, witness)
                if comparison.passed:
                    call()
                    with marked(number):
                        call()
                else:
                    obstacles[number] = f"wrong: {comparison.message}"
            except Exception as error:  # other people's code may fail in any way
                obstacles[number] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            number += 1
        torch.cuda.empty_cache()
    Path(sys.argv[2]).write_text(json.dumps(obstacles))


if __name__ == "__main__":
    main()
