"""README and CONTRIBUTING promise nothing that is not there: commands, links, code."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from flashlib.cli import app

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def _code(document: str) -> str:
    """Everything a document sets as code: its blocks and its inline spans."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return "\n".join(
        [*re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    named = set(re.findall(r"^(?:\w+=\S+ )*make ([a-z]+)", _code(document), re.MULTILINE))
    assert named and named <= MAKE_TARGETS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flashlib_commands_and_their_options_exist(document: str) -> None:
    commands = typer.main.get_command(app).commands
    for name, rest in re.findall(r"^(?:\.venv/bin/)?flashlib ([a-z]+)(.*)$", _code(document), re.MULTILINE):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z]+", rest)) <= options, f"flashlib {name}{rest}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_resolve(document: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", (REPOSITORY / document).read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (REPOSITORY / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_named_as_code_exist(document: str) -> None:
    folders = "|".join(path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths = re.findall(rf"(?:^|\s)((?:{folders})/[\w./-]*)", _code(document), re.MULTILINE)
    assert not [path for path in paths if not (REPOSITORY / path).exists()]


def test_readme_lists_the_chapters_that_there_are() -> None:
    listed = re.findall(r"^\| (\d\d) ", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == sorted(path.name[:2] for path in (REPOSITORY / "notebooks").glob("*.ipynb"))


def test_readme_code_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], check=True, timeout=120)


def test_every_make_target_is_explained_by_make_help() -> None:
    shown = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z]+) +\S", shown, re.MULTILINE)) == MAKE_TARGETS


def test_pre_commit_runs_what_make_runs_and_fetches_nothing() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config"], cwd=REPOSITORY, check=True)


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
