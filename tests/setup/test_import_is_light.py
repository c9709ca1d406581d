"""`import flashlib` brings not even PyTorch; its first use costs next to nothing on top of `import torch`, and brings nothing that only
some of its users need."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

# `import flashlib` on top of `import torch`. Counted, since what is timed depends on the machine; half as much again as it is now, or more.
MOST_OWN_MODULES = 60  # of flashlib
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
        "psutil",
        "tabulate",
        "typer",
        "rich",
    ),
}
USES = [
    "import flashlib; assert callable(flashlib.attention)",
    "from flashlib import attention; assert callable(attention)",
    "from flashlib.attention import attention; import flashlib; assert flashlib.attention is attention",
    "import flashlib.attention; assert callable(flashlib.attention)",
    "import flashlib; flashlib.masks.Causal(); assert callable(flashlib.attention)",
    "import flashlib.backends; import flashlib.attention; import flashlib; assert callable(flashlib.attention)",
    "import flashlib; flashlib.attention = print; assert flashlib.attention is print; flashlib.masks.Causal()",
    "from flashlib import *; assert callable(attention) and masks.Causal()",
    "import flashlib; assert set(flashlib.__all__) <= set(dir(flashlib)); assert not hasattr(flashlib, 'nothing')",
]
SCRIPT = """
import json, sys, time
import torch
opened = []
before, start = set(sys.modules), time.process_time()
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
import flashlib
flashlib.attention
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


def test_import_alone_does_not_bring_pytorch() -> None:
    modules = _modules_of("import flashlib, flashlib.cost")
    assert "flashlib.cost" in modules
    assert not {module for module in modules if module.partition(".")[0] in {"torch", "numpy", *HEAVY}}


@pytest.mark.parametrize("package", ["flashlib.cost", "flashlib.measure", "flashlib.course"])
def test_no_lazy_name_is_that_of_a_module(package: str) -> None:
    """Which of the two it stood for would depend on what was imported first."""
    module = importlib.import_module(package)
    names = {path.stem for path in Path(module.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & set(module._HOME)


def test_names_are_what_they_are_whatever_was_imported_first() -> None:
    """`flashlib.attention` is the function, and never the module that it lives in."""
    script = f"""
import sys, torch
for use in {USES!r}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashlib"]:
        del sys.modules[name]
    exec(use, {{}})
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def _modules_of(program: str) -> set[str]:
    script = f"import json, sys; {program}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))
