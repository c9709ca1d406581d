"""Chapter 00's map says what is there, and what is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flashlib import doctor
from flashlib.course.chapters.start import CHAPTERS, PARTS, course_map, machine_table
from flashlib.doctor import GPU

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_chapters_are_numbered_without_a_gap_and_lie_in_known_parts():
    assert [chapter.number for chapter in CHAPTERS] == [f"{number:02}" for number in range(len(CHAPTERS))]
    assert list(dict.fromkeys(chapter.part for chapter in CHAPTERS)) == list(PARTS)


def test_the_map_looks_into_the_folder(tmp_path):
    for name in ("00_start_here.ipynb", "07_x.ipynb", "03_notes.txt", "draft.ipynb"):
        (tmp_path / name).touch()
    rows = course_map(tmp_path).rows
    assert [row[1] for row in rows if row[-1] == "here"] == ["00", "07"]
    assert len(rows) == len(CHAPTERS)
    assert str(course_map(tmp_path)).endswith(f"2 of {len(CHAPTERS)} chapters are here.")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_each_notebook_opens_with_the_title_on_the_map(path):
    titles = {chapter.number: chapter.title for chapter in CHAPTERS}
    first_cell = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    heading = "".join(first_cell["source"]).splitlines()[0]
    assert heading == f"# {path.name[:2]} · {titles[path.name[:2]]}"


def test_the_machine_is_told_with_and_without_gpu_and_weights(monkeypatch):
    report = replace(doctor.examine(None), gpus=(), weights=None)
    monkeypatch.setattr(doctor, "examine", lambda weights: report)
    told = dict(machine_table().rows)
    assert told["GPU"].startswith("none")
    assert "flashlib weights" in told["weights of SmolLM2"]
    assert "reference" in told["backends of attention"]

    equipped = replace(report, gpus=(GPU("NVIDIA H200", "9.0", 140 * 2**30),), weights="/somewhere")
    monkeypatch.setattr(doctor, "examine", lambda weights: equipped)
    told = dict(machine_table().rows)
    assert told["GPU"] == "NVIDIA H200 (140 GiB)"
    assert told["weights of SmolLM2"] == "here"
