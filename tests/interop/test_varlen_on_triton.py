"""flash_attn_varlen_func on our Triton kernels, in the interpreter: what runs large on a GPU, small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "gpu" / "varlen_checks.py"


def test_packed_sequences_and_pages(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, PROGRAM, "--calls", "6", "--out", tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "'run': 6" in result.stdout and result.stdout.endswith("all passed\n")
