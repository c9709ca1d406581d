"""README and CONTRIBUTING promise nothing that is not there: commands, links, code."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from PIL import Image

from flashlib import __version__
from flashlib.cli import app
from flashlib.course.figures import moving
from flashlib.course.figures.tiles import tile_steps
from flashlib.masks import Causal

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def _code(document: str) -> str:
    """Everything a document sets as code: its blocks and its inline spans."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return "\n".join(
        [*re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    named = set(re.findall(r"^(?:\w+=\S+ )*make ([a-z-]+)", _code(document), re.MULTILINE))
    assert named and named <= MAKE_TARGETS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flashlib_commands_and_their_options_exist(document: str) -> None:
    commands = typer.main.get_command(app).commands
    for name, rest in re.findall(r"^(?:\.venv/bin/)?flashlib ([a-z-]+)(.*)$", _code(document), re.MULTILINE):
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


def test_readme_links_each_chapter_and_says_how_long_it_takes() -> None:
    """The minutes in README are those at the top of the chapter."""
    rows = re.findall(
        r"^\| (\d\d) \[[^\]]+\]\((\S+)\) \| [^|]+ \| ([\d +]+) \|$",
        (REPOSITORY / "README.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == len(list((REPOSITORY / "notebooks").glob("*.ipynb")))
    for number, path, minutes in rows:
        assert Path(path).name.startswith(number)
        first = "".join(json.loads((REPOSITORY / path).read_text(encoding="utf-8"))["cells"][0]["source"])
        told = re.search(r"\*\*Time\*\* \| (.*?) \|", first)[1].replace("two to three hours", "150")
        assert re.findall(r"\d+", told) == re.findall(r"\d+", minutes), path


def test_the_moving_picture_shows_each_tile() -> None:
    with Image.open(moving.PICTURE) as committed, Image.open(io.BytesIO(moving.stepping_tiles())) as made:
        assert committed.n_frames == made.n_frames == len(tile_steps(32, 32, 8, 8, Causal())) == 10
        assert committed.size == made.size
    assert moving.PICTURE.stat().st_size < 400_000


def test_the_citation_has_the_version() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and f"version = {{{__version__}}}" in (REPOSITORY / "README.md").read_text()


def test_readme_code_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], check=True, timeout=120)


def test_pre_commit_runs_what_make_runs_and_fetches_nothing() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config"], cwd=REPOSITORY, check=True)
