"""`flashlib new-exercise` lays out an exercise that grades: its solution passes, its wrong one is named, its stub gets nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashlib.cli import app
from flashlib.course import new_exercise
from flashlib.course.new_exercise import lay_out

REPOSITORY = Path(__file__).resolve().parents[2]
CHAPTER = "05_heads_positions_cache"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy with no exercise but the one that is to come."""
    none = shutil.ignore_patterns("__pycache__", "ex[0-9][0-9]*.py")
    shutil.copytree(REPOSITORY / "flashlib", tmp_path / "flashlib", ignore=none)
    for folder in ("solutions", "exercises", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notebooks" / f"{CHAPTER}.ipynb").touch()
    return tmp_path


def test_what_is_laid_out_grades_and_is_formatted(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_exercise, "REPOSITORY", repository)
    monkeypatch.setattr(lay_out, "__defaults__", (repository,))
    told = CliRunner().invoke(app, ["new-exercise", "ex21", "--topic", "rope_scaling", "--chapter", CHAPTER])
    assert told.exit_code == 0, told.output
    written = [line for line in told.output.splitlines() if line.endswith(".py")]
    assert written[:2] == ["solutions/ex21_rope_scaling.py", "flashlib/course/exercises/ex21.py"]
    assert len(written) == 4 and all((repository / name).is_file() for name in written)

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("flashlib.course.stubs") == "wrote exercises/ex21_rope_scaling.py\n"
    assert run("flashlib.course.grader.matrix", "ex21").splitlines()[4:8] == [
        "| not_scaled | rejected | not-scaled |",
        "| right/by_einsum | full marks |  |",
        "| solution | full marks |  |",
        "| stub | rejected | not-implemented |",
    ]
    shutil.copy(REPOSITORY / "pyproject.toml", repository)
    run("ruff", "check", "--no-cache", *written)
    run("ruff", "format", "--check", "--no-cache", *written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ex1", "rope", CHAPTER, "Rope"), "name must be ex and two digits, such as ex21; got 'ex1'"),
        (
            ("ex21", "Rope scaling", CHAPTER, "Rope"),
            "topic must be a word for a file's name, such as rope_scaling; got 'Rope scaling'",
        ),
        (
            ("ex21", "rope", "05_heads", "Rope"),
            "there is no chapter '05_heads'; there are 00_start_here, 01_naive_attention",
        ),
        (("ex21", "rope", CHAPTER, 'A "rope"'), "title must be one line without double quotes"),
        (
            ("ex01", "rope", CHAPTER, "Rope"),
            "ex01 is taken: solutions/ex01_softmax.py, flashlib/course/exercises/ex01.py",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        lay_out(*arguments)
    assert not list((REPOSITORY / "solutions").glob("ex21_*"))
