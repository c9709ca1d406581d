"""A model of transformers on our Triton kernels by ``set_attention(model, "triton")``, in the interpreter where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("interpreted_models.py")


@pytest.mark.parametrize("model, calls", [("tiny", 2), pytest.param("smollm2", 6, marks=pytest.mark.weights)])
def test_padded_and_packed_batches(model, calls):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, PROGRAM, model]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(f"{calls} calls within the budget\n")
