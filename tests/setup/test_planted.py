"""`make lint` fails on what it is there for: an import that runs upwards, a circle. Each is planted in a copy of the package."""

import os
import shutil
import subprocess
import sys
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
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """`make lint`, with the programs of this environment."""
    programs = Path(sys.executable).parent
    command = ["make", "lint", f"BIN={programs}", f"STAMP={folder / 'stamp'}"]
    return subprocess.run(
        command, cwd=folder, env=dict(os.environ, COLUMNS="200"), capture_output=True, text=True, check=False
    )


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
def test_an_import_that_must_not_be_is_found(copy: Path, file: str, line: str, said: str) -> None:
    planted = copy / "flashlib" / file
    text = planted.read_text(encoding="utf-8")
    try:
        planted.write_text(
            f"{text}\n\ndef planted():\n    {line}\n\n    return {line.split()[-1].partition('.')[0]}\n",
            encoding="utf-8",
        )
        found = lint(copy)
        assert found.returncode != 0 and said in found.stdout, found.stdout + found.stderr
    finally:
        planted.write_text(text, encoding="utf-8")
