"""Random problems through the Triton kernels in the interpreter, each batch in a process of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def interpreted(program: str, *arguments: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / program), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.parametrize("batch", range(2))
def test_random_problems(batch):
    seed = random.SystemRandom().getrandbits(40)
    assert interpreted("interpreted.py", "--seed", str(seed), "--problems", "10") == "10 problems within the budget\n"


def test_operators_hold_and_compile_without_a_break():
    assert interpreted("operators.py") == "operators hold\n"
