"""SmolLM2 on the exercises as they are solved, through the very cells of the chapters; and what those cells say of stubs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHAPTERS = {
    "01": "01_naive_attention",
    "03": "03_tiling",
    "05": "05_heads_positions_cache",
    "07": "07_flash_attention_in_triton",
    "09": "09_backward",
}
CELLS = {
    'own.write("ex01"': "01",
    'own.meter("ex03"': "03",
    'own.write("ex03"': "03",
    'own.write("ex05"': "05",
    'own.write("ex07"': "07",
    'own.train("ex09"': "09",
}
# One process for all, in which Triton interprets. The model is loaded once, as a chapter loads it.
PROGRAM = """
import json, os, sys
import torch
torch.set_num_threads(1)
from flashlib.course import capture_qkv, load_smollm2, own, sample_text
model, tokenizer = load_smollm2()
alice = capture_qkv(model, sample_text(tokens=1000), layer=0)
one_head = lambda n: tuple(x[:, :1, :n].clone() for x in (alice.q, alice.k, alice.v))
before = model.config._attn_implementation
for folder in ("solved", "stubs"):
    os.chdir(folder)
    for source in json.loads(sys.argv[1]):
        rows = eval(source).rows
        print("##" + json.dumps([[str(cell) for cell in row] for row in rows]))
    os.chdir("..")
assert model.config._attn_implementation == before
assert not any(parameter.requires_grad for parameter in model.parameters())
"""

pytestmark = pytest.mark.weights


def _cell(start: str) -> str:
    chapter = nbformat.read(REPOSITORY / "notebooks" / f"{CHAPTERS[CELLS[start]]}.ipynb", as_version=4)
    (found,) = [cell.source for cell in chapter.cells if cell.cell_type == "code" and cell.source.startswith(start)]
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[list[str]]]]:
    """What the cells show where the exercises are solved, and where they are stubs."""
    folder = tmp_path_factory.mktemp("own")
    for name, source in (("solved", "solutions"), ("stubs", "exercises")):
        (folder / name / "exercises").mkdir(parents=True)
        for file in (REPOSITORY / source).glob("ex*.py"):
            shutil.copy(file, folder / name / "exercises")
    environment = os.environ | {"TRITON_INTERPRET": "1", "FLASHLIB_NONINTERACTIVE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps([_cell(start) for start in CELLS])]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("##")]
    assert len(tables) == 2 * len(CELLS)
    return {
        "solved": dict(zip(CELLS, tables, strict=False)),
        "stubs": dict(zip(CELLS, tables[len(CELLS) :], strict=True)),
    }


@pytest.mark.parametrize("start", [start for start in CELLS if "write" in start])
def test_the_model_writes_on_a_solved_exercise(shown, start):
    told = dict(row[:2] for row in shown["solved"][start])
    assert told["the same tokens"] == "yes" and told["with yours"] == told["with PyTorch's"]
    assert "The" in told["with yours"] and int(told["calls of your function"]) >= 60


def test_a_solved_tiled_forward_moves_what_the_theorem_allows(shown):
    (yours, ours, formula) = shown["solved"]['own.meter("ex03"']
    assert [yours[0], ours[0], formula[0]] == ["yours", "flashlib's", "the formula"]
    assert yours[2:4] == formula[2:4], "K and V are read once for each block of rows"


def test_the_model_learns_through_solved_kernels(shown):
    before, after, apart = shown["solved"]['own.train("ex09"']
    assert before[1] == before[2] and after[1] == after[2] and float(after[1]) < float(before[1])
    assert apart[2] == "yes"


def test_a_stub_is_said_to_be_one(shown):
    for start, rows in shown["stubs"].items():
        assert rows[0][0] == "not written yet" and "write " in rows[0][1] and "exercises/ex" in rows[0][1], start
