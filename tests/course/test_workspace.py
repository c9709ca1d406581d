"""A reader's own copy: running it changes nothing that git tracks, and what is new in the course comes into it."""

import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from flashlib.course.workspace import CHANGED_HERE, COPY, REPOSITORY, bring_up_to_date

EXERCISE = '"""Softmax."""\n\n\ndef softmax(x):\n    """Of a row."""\n    raise NotImplementedError("write softmax here")\n\n\ndef second(x):\n    """Another."""\n    raise NotImplementedError("write second here")\n'


def _chapter(*sources: str) -> str:
    cells = [
        new_markdown_cell(source, id=f"m{i}") if source[0] == "#" else new_code_cell(source, id=f"c{i}")
        for i, source in enumerate(sources)
    ]
    return nbformat.writes(new_notebook(cells=cells))


def _read(folder: Path, name: str = "01_a.ipynb"):
    return nbformat.read(folder / COPY / "notebooks" / name, as_version=4)


@pytest.fixture
def course(tmp_path: Path) -> Path:
    for name, text in {
        "notebooks/01_a.ipynb": _chapter("# One", "a = 1", "b = 2", "c = 3"),
        "exercises/ex01_s.py": EXERCISE,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def _ran(course: Path, change=lambda cells: None) -> None:
    """The reader runs all cells, and changes some."""
    notebook = _read(course)
    for count, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [new_output("stream", text=f"ran {cell.source}")], count
    change(notebook.cells)
    nbformat.write(notebook, course / COPY / "notebooks/01_a.ipynb")


def test_the_copy_is_made_once_and_then_left_alone(course):
    assert bring_up_to_date(course) == [f"new: {COPY}/notebooks/01_a.ipynb", f"new: {COPY}/exercises/ex01_s.py"]
    _ran(course)
    before = (course / COPY / "notebooks/01_a.ipynb").read_text()
    assert bring_up_to_date(course) == []
    assert (course / COPY / "notebooks/01_a.ipynb").read_text() == before


def test_what_is_new_comes_in_and_what_the_reader_did_stays(course):
    bring_up_to_date(course)
    _ran(course, lambda cells: cells.append(new_code_cell("mine = 7", id="own")))
    (course / "notebooks/01_a.ipynb").write_text(_chapter("# One, better told", "a = 1", "b = 2", "c = 33"))
    assert bring_up_to_date(course) == [
        f"brought up to date: {COPY}/notebooks/01_a.ipynb; where you changed it too, both versions stand"
    ]
    cells = _read(course).cells
    assert cells[0].source == "# One, better told"
    assert [cell.outputs[0].text for cell in cells[1:3]] == ["ran a = 1", "ran b = 2"]
    assert "mine = 7" in [cell.source for cell in cells] and "c = 33" in [cell.source for cell in cells]
    assert bring_up_to_date(course) == []


def test_where_both_changed_the_same_cell_both_versions_stand(course):
    bring_up_to_date(course)

    def change(cells):
        cells[2].source = "b = 20"

    _ran(course, change)
    (course / "notebooks/01_a.ipynb").write_text(_chapter("# One", "a = 1", "b = 200", "c = 3"))
    (line,) = bring_up_to_date(course)
    assert line.endswith("; where you changed it too, both versions stand")
    notebook = _read(course)
    nbformat.validate(notebook)
    assert [cell.source for cell in notebook.cells] == ["# One", "a = 1", "b = 20", CHANGED_HERE, "b = 200", "c = 3"]
    assert len({cell.id for cell in notebook.cells}) == 6


def test_a_solution_begun_is_merged_or_kept(course):
    bring_up_to_date(course)
    mine = course / COPY / "exercises/ex01_s.py"
    mine.write_text(EXERCISE.replace('raise NotImplementedError("write softmax here")', "return x"))
    (course / "exercises/ex01_s.py").write_text(EXERCISE.replace("Another.", "Another one."))
    assert bring_up_to_date(course) == [f"brought up to date: {COPY}/exercises/ex01_s.py"]
    assert "return x" in mine.read_text() and "Another one." in mine.read_text()
    (course / "exercises/ex01_s.py").write_text(EXERCISE.replace("write softmax here", "write it here"))
    (line,) = bring_up_to_date(course)
    assert (
        line
        == f"kept as you have it: {COPY}/exercises/ex01_s.py; the course's new version lies beside it as ex01_s.new.py"
    )
    assert "return x" in mine.read_text() and "write it here" in mine.with_suffix(".new.py").read_text()


def test_a_copy_of_unknown_origin_is_not_written_over(course):
    (course / COPY / "notebooks").mkdir(parents=True)
    (course / COPY / "notebooks/01_a.ipynb").write_text("mine")
    with pytest.raises(FileExistsError, match="not from this course"):
        bring_up_to_date(course)


def test_git_pull_finds_nothing_in_its_way(course, tmp_path_factory):
    """Upstream changes the chapter that a reader has run and the exercise that a reader has solved."""

    def git(folder: Path, *arguments: str) -> str:
        who = [
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "-c",
            "init.defaultBranch=main",
            "-c",
            "commit.gpgsign=false",
        ]
        return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout

    (course / ".gitignore").write_text((REPOSITORY / ".gitignore").read_text())
    git(course, "init", "-q")
    git(course, "add", "-A")
    git(course, "commit", "-qm", "one")
    reader = tmp_path_factory.mktemp("reader") / "course"
    git(course, "clone", "-q", str(course), str(reader))
    bring_up_to_date(reader)
    _ran(reader)
    (reader / COPY / "exercises/ex01_s.py").write_text(
        EXERCISE.replace('raise NotImplementedError("write softmax here")', "return x")
    )
    assert git(reader, "status", "--porcelain") == ""
    (course / "notebooks/01_a.ipynb").write_text(_chapter("# One", "a = 1", "b = 2", "new = 5", "c = 3"))
    git(course, "commit", "-qam", "two")
    git(reader, "pull", "-q", "--ff-only")
    bring_up_to_date(reader)
    assert "new = 5" in [cell.source for cell in _read(reader).cells]
    assert "return x" in (reader / COPY / "exercises/ex01_s.py").read_text()
