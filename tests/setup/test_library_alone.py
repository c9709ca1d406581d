"""The library without what only the command line needs: it computes, explains itself, and the command says what is missing."""

import subprocess
import sys

import pytest

from flashlib.__main__ import NEEDED
from flashlib.backends import Explanation

BLOCKED = (
    f"import sys; sys.modules.update(dict.fromkeys({NEEDED}))\n"  # importing them fails, as if they were not there
)
WITHOUT_SPEC = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {NEEDED} else real(name, package)
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_attention_and_explain_need_no_command_line():
    done = _run(
        BLOCKED + "import torch, flashlib\n"
        "q = torch.randn(1, 2, 5, 8, requires_grad=True)\n"
        "flashlib.attention(q, q, q, causal=True).sum().backward()\n"
        "print(flashlib.explain(flashlib.AttentionSpec.from_tensors(q, q, q)))\n"
        "from flashlib.inference import decode_attention\n"
        "print(flashlib.__version__)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["backend", "runs", "why,", "or", "why", "not"]


def test_the_command_says_what_it_lacks():
    done = _run(WITHOUT_SPEC + "from flashlib.__main__ import main\nmain()")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "flashlib: the command line needs typer, rich, psutil, tabulate, not installed here: pip install 'flashlib[cli]'\n"
    )


@pytest.mark.parametrize("rows", [(), (("triton", False, "no <GPU> & 'none'"), ("torch_sdpa_math", True, "a formula"))])
def test_an_explanation_is_laid_out_as_tables_are(rows):
    from tabulate import tabulate

    found = Explanation(rows, "torch_sdpa_math")
    cells = [("->" if name == found.chosen else "", name, "yes" if runs else "no", why) for name, runs, why in rows]
    assert str(found) == tabulate(cells, headers=("", "backend", "runs", "why, or why not"), tablefmt="simple")
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + len(rows) and "<GPU>" not in shown
