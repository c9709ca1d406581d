"""``install()`` stands in for the package flash_attn, for transformers too: padded and packed batches, windows, generation, continuous batching, training."""

import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from flashlib.interop.flash_attn import install, uninstall

PROGRAM = Path(__file__).with_name("stand_in_program.py")


@pytest.mark.parametrize("order", [[], ["--transformers-first"]], ids=["before transformers", "after transformers"])
def test_transformers_runs_on_the_stand_in(order):
    command = [sys.executable, str(PROGRAM), *order]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.endswith("all of it\n")


def test_an_installed_flash_attn_is_not_hidden(monkeypatch):
    other = types.ModuleType("flash_attn")
    other.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    with pytest.raises(RuntimeError, match="flash_attn is installed, and install\\(\\) would hide it"):
        install()
    uninstall()  # which was not installed: nothing happens
    assert sys.modules["flash_attn"] is other
