"""The Makefile and .ci/run: which Pythons fit, what `make test` runs, and that continuous integration runs the same."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_make_target_is_explained_by_make_help() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    shown = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z-]+) +\S", shown, re.MULTILINE)) == targets


@pytest.mark.parametrize("broken", [None, "lint", "unit", "nbcheck"])
def test_make_test_runs_every_step_and_fails_if_one_does(tmp_path: Path, broken: str | None) -> None:
    """With stand-ins for the programs of .venv, which note down that they ran."""
    note = 'step=lint; case "$*" in *--nbval*) step=nbcheck;; *pytest*) step=unit;; esac\necho "ran $step"\n'
    for program in ("python", "ruff", "lint-imports", "mypy"):
        _script(tmp_path / program, f'{note}[ "$step" != "{broken}" ]')
    _script(tmp_path / "flashlib", 'echo "ran flashlib $*"')
    (tmp_path / "stamp").touch()
    command = ["make", "test", f"BIN={tmp_path}", f"STAMP={tmp_path / 'stamp'}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    steps = [line.removeprefix("ran ") for line in result.stdout.splitlines() if line.startswith("ran ")]
    assert list(dict.fromkeys(steps)) == ["flashlib weights", "lint", "unit", "nbcheck"], result.stderr
    assert (result.returncode == 0) == (broken is None)


@pytest.mark.parametrize(("version", "fits"), [("3.9.18", False), ("3.14.0", False), ("3.12.1", True)])
def test_make_names_the_pythons_that_fit(tmp_path: Path, version: str, fits: bool) -> None:
    """With a stand-in for python3 that has a version and answers `-c` with it, and cannot build an environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    major, minor, _ = version.split(".")
    python = _script(
        tmp_path / "python",
        f'[ "$1" = --version ] && echo "Python {version}" && exit\n'
        '[ "$1" = -c ] || { echo "asked for: $*"; exit 1; }\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = ({major}, {minor}); exec(sys.argv[1])" "$2"\n',
    )
    result = subprocess.run(
        ["make", "lab", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert ("flashlib needs Python 3.10 to 3.13" in result.stdout) == (not fits)
    assert (f"is: Python {version}\nName another interpreter" in result.stdout) == (not fits)
    assert ("asked for: -m venv .venv" in result.stdout) == fits
    assert not (tmp_path / ".venv").exists()


def test_the_files_that_come_first_are_there() -> None:
    order = re.findall(r'^    "(.+)",$', (REPOSITORY / "tests" / "conftest.py").read_text(), re.MULTILINE)
    assert len(order) > 10 and all((REPOSITORY / "tests" / name).is_file() for name in order)


def test_continuous_integration_calls_make_test(tmp_path: Path) -> None:
    _script(tmp_path / "make", 'echo "make $* in $PWD"; exit 7')
    run = REPOSITORY / ".ci" / "run"
    assert run.stat().st_mode & stat.S_IXUSR
    result = subprocess.run(
        ["bash", str(run)],
        cwd="/",
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (7, f"make test in {REPOSITORY}\n")


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
