"""The kernels of chapter 06 compute what they say, and its mistakes go wrong as the chapter says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_first_kernels.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all as expected"
