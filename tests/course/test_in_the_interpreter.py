"""The kernels of the chapters, and KernelWatch, in Triton's interpreter. It is chosen at import: a process of its own runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAMS = (
    "watched_kernels",
    "interpreted_first_kernels",
    "interpreted_growing_kernels",
    "interpreted_mask_kernels",
    "interpreted_gradients",
)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    """What the runner says of each program."""
    runner = Path(__file__).with_name("run_interpreted.py")
    done = subprocess.run(
        [sys.executable, str(runner), *PROGRAMS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FLASHLIB_NONINTERACTIVE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {outcome["program"]: outcome for outcome in told}


@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_do_what_is_said_of_them(outcomes, program):
    outcome = outcomes[program]
    assert not outcome["failure"], f"seed {outcome['seed']}: {outcome['failure']}"
