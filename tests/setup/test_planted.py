"""`make lint` fails on what it is there for: an import that runs upwards, a circle, a type error. Each is planted in a copy of the package."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, and what says how it is looked at."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(REPOSITORY / "flashlib", folder / "flashlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    (folder / "stamp").touch()
    # What mypy knows of PyTorch, if it was asked before: it takes half a minute to find out.
    if (REPOSITORY / ".mypy_cache").is_dir():
        shutil.copytree(REPOSITORY / ".mypy_cache", folder / ".mypy_cache")
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """`make lint`, with the programs of this environment."""
    programs = Path(sys.executable).parent
    command = ["make", "lint", f"BIN={programs}", f"STAMP={folder / 'stamp'}"]
    return subprocess.run(
        command, cwd=folder, env=dict(os.environ, COLUMNS="200"), capture_output=True, text=True, check=False
    )


@pytest.fixture
def plant(copy: Path) -> Iterator[Callable[[str, str], subprocess.CompletedProcess[str]]]:
    """What `make lint` says with so much more at the end of a file."""
    original: dict[Path, str] = {}

    def planted(file: str, code: str) -> subprocess.CompletedProcess[str]:
        path = copy / "flashlib" / file
        original[path] = path.read_text(encoding="utf-8")
        path.write_text(f"{original[path]}\n\n{code}", encoding="utf-8")
        return lint(copy)

    yield planted
    for path, text in original.items():
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        (
            "masks.py",
            "from flashlib.attention import attention",
            "flashlib.masks is not allowed to import flashlib.attention",
        ),
        ("kernels/common.py", "import flashlib.spec", "flashlib.kernels is not allowed to import flashlib.spec"),
        (
            "cost/conventions.py",
            "from flashlib.cost.report import Report",
            "No cycles are allowed in flashlib.cost",
        ),
    ],
    ids=["upward", "out of the kernels", "circle"],
)
def test_an_import_that_must_not_be_is_found(plant, file: str, line: str, said: str) -> None:
    name = line.split()[-1].partition(".")[0]
    found = plant(file, f"def planted():\n    {line}\n\n    return {name}\n")
    assert found.returncode != 0 and said in found.stdout, found.stdout + found.stderr


@pytest.mark.timeout(900)  # where mypy was never asked before, it reads all of PyTorch first
def test_a_type_error_is_found(plant) -> None:
    found = plant("cost/conventions.py", 'def planted(pairs: int) -> int:\n    return f"{pairs} pairs"\n')
    assert found.returncode != 0, found.stdout + found.stderr
    assert "flashlib/cost/conventions.py" in found.stdout and "[return-value]" in found.stdout
    assert "Found 1 error in 1 file" in found.stdout
