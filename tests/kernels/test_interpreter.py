"""Random problems through the Triton kernels in the interpreter, in a process of their own."""

import os
import random
import subprocess
import sys
from pathlib import Path

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


def test_random_problems():
    seed = random.SystemRandom().getrandbits(40)
    assert interpreted("interpreted.py", "--seed", str(seed), "--problems", "20") == "20 problems within the budget\n"


def test_what_is_prepared_for_the_hopper_kernels():
    seed = random.SystemRandom().getrandbits(40)
    assert interpreted("prepared.py", "--seed", str(seed), "--problems", "20") == "20 masks looked up\n"


def test_parts_of_a_group_are_added_up():
    seed = random.SystemRandom().getrandbits(40)
    assert interpreted("summed_parts.py", "--seed", str(seed), "--problems", "20") == "20 sums of parts\n"


def test_operators_hold_and_compile_without_a_break():
    assert interpreted("operators.py") == "operators hold\n"
