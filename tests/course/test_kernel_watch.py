"""KernelWatch against kernels whose traffic and faults are known. The interpreter is chosen at import: a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from flashlib.measure.counting.kernel_watch import KernelWatch

pytest.importorskip("triton")


def test_bad_operands_are_named():
    with pytest.raises(TypeError, match="operand 'x' must be a torch.Tensor, got list"):
        KernelWatch(x=[1.0])
    with pytest.raises(ValueError, match="'elsewhere' is the watch's own heading"):
        KernelWatch(elsewhere=torch.ones(1))


def test_without_the_interpreter_it_says_so():
    code = "from flashlib.measure.counting.kernel_watch import KernelWatch\nwith KernelWatch(): pass"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and "set TRITON_INTERPRET=1 before triton is imported" in done.stderr
