"""Random problems through the Triton kernels in the interpreter, each batch in a process of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("interpreted.py")


@pytest.mark.parametrize("batch", range(2))
def test_random_problems(batch):
    seed = random.SystemRandom().getrandbits(40)
    answer = subprocess.run(
        [sys.executable, str(PROGRAM), "--seed", str(seed), "--problems", "10"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout == "10 problems within the budget\n"
