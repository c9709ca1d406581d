"""A program written for flash_attn runs here by changing its import."""

import re
import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = Path(__file__).with_name("flash_attn_program.py")


def test_a_program_runs_by_changing_its_import(tmp_path):
    source = PROGRAM.read_text(encoding="utf-8")
    changed, count = re.subn("^from flash_attn", "from flashlib.interop.flash_attn", source, flags=re.MULTILINE)
    assert count == 2
    (tmp_path / "program.py").write_text(changed, encoding="utf-8")
    command = [sys.executable, "program.py", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    numbers = re.fullmatch(
        r"loss (\S+) -> (\S+)\ndifference (\S+)\nlse \(4, 5\)\nserving (\S+) \(4, 9\)\n", result.stdout
    )
    first, last, difference, serving = map(float, numbers.groups())
    # Counting is learnt at once, from about ln 16 to nearly nothing, if gradients reach the weights.
    assert first > 2 and last < 0.3
    # Rounding of fp32, through two blocks. A sequence that sees another one, or a wrong window, changes logits by whole numbers.
    assert difference < 1e3 * torch.finfo(torch.float32).eps
    assert serving < 1e3 * torch.finfo(torch.float32).eps
