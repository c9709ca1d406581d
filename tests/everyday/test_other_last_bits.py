"""No verdict hangs on the last bits of the machine at hand: where products come out as on others, it is the same.

`make test-bits` runs all tests of numbers and grades so; here, what that mode does, and the grades that once hung on it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MACHINES = ("alike", "1")

PRODUCTS = """
import json, numpy, torch
from triton.runtime import interpreter
a, b, bits = torch.randn(64, 48), torch.randn(48, 32), lambda x: x.view(torch.int32)
product, exact = a @ b, a.double() @ b.double()
whole = torch.randint(-9, 9, (64, 48)).float()
x, y = a.numpy(), b.numpy()
tile = interpreter.np.matmul(x, y, dtype=numpy.float32)
eps = torch.finfo(torch.float32).eps
print(json.dumps({
    "differs": not torch.equal(bits(product), bits(torch.mm(a, b, out=torch.empty(64, 32)))),
    "tile differs": not numpy.array_equal(tile, numpy.matmul(x, y)),
    "close": bool((product - exact).abs().max() < 64 * eps * 48 ** 0.5),
    "tile close": bool((torch.from_numpy(tile) - exact).abs().max() < 64 * eps * 48 ** 0.5),
    "repeats": torch.equal(product, a @ b),
    "rows alike": torch.equal(product[7:20], a[7:20] @ b),
    "exact stays": torch.equal(whole @ whole.T, (whole.long() @ whole.T.long()).float()),
    "one row": torch.allclose((a[:1] @ b)[0], b.T @ a[0], rtol=1e-3, atol=1e-4),
    "batched": torch.allclose(torch.baddbmm(a[None, :, :32], a[None], b[None])[0], a[:, :32] + product, atol=1e-4),
    "empty": [list((a[:0] @ b).shape), list((a[:, :0] @ b[:0]).shape)],
}))
"""
GRADES = """
import json
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.engine import sandbox_for
from flashlib.course.grader.matrix import WRONG, grade_file
from flashlib.course.grader.sandbox.session import REPOSITORY
exercise = load_exercise("ex07")
files = WRONG / "ex07/rows_not_in_blocks.py", REPOSITORY / "solutions" / exercise.file
with sandbox_for(exercise) as sandbox:
    print(json.dumps([sorted(set(grade_file(exercise, file, sandbox).diagnoses)) for file in files]))
"""


def on_machine(machine: str, program: str):
    environment = {**os.environ, "FLASHLIB_PERTURB": machine, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(TESTS / "perturbed")
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("machine", MACHINES)
def test_products_differ_in_last_bits_alone(machine):
    pytest.importorskip("triton")
    said = on_machine(machine, PRODUCTS)
    assert said.pop("rows alike") is (machine == "alike")
    assert said.pop("empty") == [[0, 32], [64, 32]]
    assert all(said.values()), said


@pytest.mark.parametrize("machine", MACHINES)
def test_grades_are_the_same(machine):
    """Two programs store one row: where its bits do not depend on its place in the block, both store the same number."""
    pytest.importorskip("triton")
    assert on_machine(machine, GRADES) == [["race"], []]


def test_a_machine_that_is_not_there_is_an_error():
    environment = {**os.environ, "PYTHONPATH": str(TESTS / "perturbed"), "FLASHLIB_PERTURB": "other"}
    done = subprocess.run([sys.executable, "-c", ""], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError" in done.stderr
