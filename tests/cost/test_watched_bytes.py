"""Counted bytes against what the kernels load in Triton's interpreter. It is chosen at import: a process of its own runs it."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_move_the_bytes_that_are_counted() -> None:
    program, seed = Path(__file__).with_name("watched_bytes.py"), secrets.randbits(24)
    done = subprocess.run(
        [sys.executable, str(program), "--seed", str(seed), "--problems", "4"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    assert "4 problems: every byte as counted" in done.stdout
