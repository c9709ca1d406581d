"""How long `flashlib cost` takes from a cold start: a fresh interpreter each time, by the clock.

python benchmarks/cost_start.py --out benchmarks/cpu
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib.measure.records.record import PACKAGE, new_record, save_record

RUNS = 9
COMMAND = "cost --model llama-3-8b --phase decode --batch 64 --context 32768 --gpu h200"


def seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "flashlib", *COMMAND.split()], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    seconds()  # byte code is written once, when a package is installed
    taken = [seconds() for _ in range(RUNS)]
    row = {"command": f"flashlib {COMMAND}", "seconds": statistics.median(taken), "slowest": max(taken), "runs": RUNS}
    sources = sorted(f"cost/{path.name}" for path in (PACKAGE / "cost").glob("*.py"))
    record = new_record(
        "cost_start", [row], [*sources, "cli.py"], "By the clock, the interpreter's start included; the median."
    )
    print(save_record(record, parser.parse_args().out), row)


if __name__ == "__main__":
    main()
