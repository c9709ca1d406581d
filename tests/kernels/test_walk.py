"""How far it is from the door to a kernel: the files that a reader opens to follow q, counted while a call runs in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_MOVES = 8


@pytest.fixture(scope="module")
def walks() -> dict[str, list[str]]:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, Path(__file__).with_name("interpreted_walk.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("door", "first"),
    [
        ("attention", "attention.py"),
        ("attention, with a gradient", "attention.py"),
        ("decode_attention", "inference/decode.py"),
    ],
)
def test_q_reaches_the_store_of_a_kernel_in_few_moves(walks, door: str, first: str, record_property) -> None:
    files = walks[door]
    record_property("files", " > ".join(files))
    assert files[0] == first and files[-1].startswith("kernels/")
    assert len(files) - 1 <= MOST_MOVES, " > ".join(files)
