"""`import flashlib` costs next to nothing on top of `import torch`, and brings nothing that only some of its users need."""

import json
import subprocess
import sys

import pytest

# `import flashlib` on top of `import torch`. Counted, since what is timed depends on the machine; about twice what it is now.
MOST_OWN_MODULES = 40  # of flashlib
MOST_OTHER_MODULES = 140
MOST_OTHER_FILES = 8  # opened, beside the modules themselves
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
import json, sys, time
import torch
opened = []
before, start = set(sys.modules), time.process_time()
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
import flashlib
seconds, files = time.process_time() - start, list(opened)
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before), "files": files}))
"""


def _import_flashlib() -> dict:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def first_import() -> dict:
    return _import_flashlib()


def test_import_adds_little_to_torch(first_import: dict, record_property) -> None:
    """The time is in the report of the tests (``pytest --junitxml``); no verdict hangs on it."""
    record_property("seconds of import flashlib on top of torch", first_import["seconds"])
    modules = first_import["modules"]
    own = [module for module in modules if module.partition(".")[0] == "flashlib"]
    other = [module for module in modules if module not in own]
    assert len(own) <= MOST_OWN_MODULES, own
    assert len(other) <= MOST_OTHER_MODULES, other
    files = [file for file in first_import["files"] if "__pycache__" not in file and not file.endswith(".py")]
    assert len(files) <= MOST_OTHER_FILES, files


def test_import_brings_nothing_heavy(first_import: dict) -> None:
    modules = first_import["modules"]
    assert "flashlib.attention" in modules
    assert not {module for module in modules if module.partition(".")[0] in HEAVY}
