"""`import flashlib` costs next to nothing on top of `import torch`, and brings nothing that only some of its users need."""

import json
import subprocess
import sys

import pytest

LIMIT_SECONDS = 0.2
TRIES = 5
HEAVY = {
    *("triton", "transformers", "huggingface_hub", "matplotlib", "pandas", "scipy"),
    *(
        "IPython",
        "ipykernel",
        "ipywidgets",
        "jupyter_client",
        "jupyter_core",
        "jupyterlab",
        "nbformat",
        "typer",
        "rich",
    ),
}
SCRIPT = """
import gc, json, sys, time
import torch
gc.freeze()  # looking through all that torch has made is no work of ours, and may fall into our import or behind it
before, start = set(sys.modules), time.process_time()
import flashlib
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def _import_flashlib() -> dict:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def first_import() -> dict:
    return _import_flashlib()


def test_import_adds_little_to_torch(first_import: dict) -> None:
    """In processor time, at best: on a quiet machine that is what a clock shows, and other tests do not disturb it."""
    tries: list[float] = [first_import["seconds"]]
    while len(tries) < TRIES and min(tries) >= LIMIT_SECONDS:
        tries.append(_import_flashlib()["seconds"])
    assert min(tries) < LIMIT_SECONDS, f"import flashlib took {tries} s on top of import torch"


def test_import_brings_nothing_heavy(first_import: dict) -> None:
    modules = first_import["modules"]
    assert "flashlib.attention" in modules
    assert not {module for module in modules if module.partition(".")[0] in HEAVY}
