"""What people's programs do with attention, a file for each subject. Programs for Triton's interpreter share one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = ("large_windows", "large_batches", "threads", "empty_batches")
TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))  # for what the programs have in common with the tests here


@pytest.fixture(scope="session")
def in_the_interpreter() -> Callable[[str], None]:
    """Asserts that the program of this name ran, in Triton's interpreter, without an error."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(TESTS / "course/run_interpreted.py"), *(f"everyday.{program}" for program in PROGRAMS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    outcomes = {outcome["program"]: outcome for outcome in told}

    def expect_no_failure(program: str) -> None:
        outcome = outcomes[f"everyday.{program}"]
        assert not outcome["failure"], f"seed {outcome['seed']}: {outcome['failure']}"

    return expect_no_failure
