"""The comparison of notebooks notices a change: in small notebooks run by nbval, and in each stored output of the real ones."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval.plugin import IPyNbCell, IPyNbFile, coalesce_streams, get_sanitize_patterns

HERE = Path(__file__).resolve().parent
SANITIZE = HERE / "sanitize.cfg"
NOTEBOOKS = sorted((HERE.parents[1] / "notebooks/answers").glob("*.ipynb"))

SOURCE = """\
from IPython.display import display
print("took ~3.2 ms")
display({"image/png": "iVBORw0KGgo=", "text/plain": "Bars: 4 and 1"}, raw=True)
6 * 7"""


def _stored(stream: str = "took ~4.8 ms\n", alt: str = "Bars: 4 and 1", result: str = "42") -> list[NotebookNode]:
    """The outputs of SOURCE as a notebook stores them; by default right ones, from a machine of another speed."""
    return [
        new_output("stream", text=stream),
        new_output("display_data", data={"image/png": "AAAA", "text/plain": alt}),
        new_output("execute_result", data={"text/plain": result}, execution_count=1),
    ]


UNCHANGED = {"sound": _stored()}
CHANGED = {
    "unit": _stored(stream="took ~4.8 s\n"),
    "unmarked-time": _stored(stream="took 3.3 ms\n"),
    "description": _stored(alt="Bars: 4 and 2"),
    "result": _stored(result="43"),
    "missing": _stored()[:2],
    "surplus": [*_stored(), new_output("stream", name="stderr", text="warning\n")],
    "empty": [],
}


@pytest.fixture(scope="module")
def nbval_run(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One run of nbval, set up as `make nbcheck` does it, over a small notebook for each change; a second is too slow."""
    folder = tmp_path_factory.mktemp("nbval")
    for name, outputs in (UNCHANGED | CHANGED).items():
        cell = new_code_cell(SOURCE, execution_count=1, outputs=outputs)
        nbformat.write(new_notebook(cells=[cell]), folder / f"{name}.ipynb")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text("import notebook_report\nnotebook_report.SECONDS_PER_NOTEBOOK = 0\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "notebook_report", "--nbval", "--nbval-current-env"]
    command += [f"--nbval-sanitize-with={SANITIZE}", "."]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(folder)
    return result


@pytest.mark.parametrize("name", UNCHANGED)
def test_nbval_accepts_what_has_not_changed(nbval_run: subprocess.CompletedProcess[str], name: str) -> None:
    assert f"PASSED {name}.ipynb::" in nbval_run.stdout, nbval_run.stdout + nbval_run.stderr


@pytest.mark.parametrize("name", CHANGED)
def test_nbval_notices_each_change(nbval_run: subprocess.CompletedProcess[str], name: str) -> None:
    assert nbval_run.returncode == pytest.ExitCode.TESTS_FAILED
    assert f"FAILED {name}.ipynb::" in nbval_run.stdout, nbval_run.stdout + nbval_run.stderr


def test_slow_notebooks_are_named(nbval_run: subprocess.CompletedProcess[str]) -> None:
    assert re.search(r"^ +\d+\.\d  sound\.ipynb  OVER the 0 s", nbval_run.stdout, re.MULTILINE), nbval_run.stdout


def _mutations(outputs: list[NotebookNode]) -> Iterator[list[NotebookNode]]:
    """``outputs`` with one thing changed: an output left out or added, or one character of one text."""
    yield [*outputs, new_output("stream", text="one line more\n")]
    for index, output in enumerate(outputs):
        yield outputs[:index] + outputs[index + 1 :]
        for holder, key in _texts(output):
            mutated = deepcopy(outputs)
            target = mutated[index] if holder is None else mutated[index][holder]
            middle = len(target[key]) // 2
            target[key] = f"{target[key][:middle]}#{target[key][middle:]}"
            yield mutated


def _texts(output: NotebookNode) -> Iterator[tuple[str | None, str]]:
    """Where an output holds text that must be compared: ``(None, key)`` in itself, or ``("data", kind)``."""
    yield from ((None, key) for key in ("text", "ename", "evalue") if key in output)
    yield from (
        ("data", kind)
        for kind, content in output.get("data", {}).items()
        if isinstance(content, str) and kind not in ("image/png", "image/jpeg")
    )


def _compared_cells(session: pytest.Session, path: Path) -> Iterator[IPyNbCell]:
    notebook = IPyNbFile.from_parent(session, path=path)
    notebook.compare_outputs = True
    notebook.sanitize_patterns.update(get_sanitize_patterns(SANITIZE.read_text()))
    return (cell for cell in notebook.collect() if cell.options["check"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_change_to_any_stored_output_is_noticed(request: pytest.FixtureRequest, path: Path) -> None:
    for item in _compared_cells(request.session, path):
        stored = coalesce_streams(item.cell.outputs)
        assert item.compare_outputs(stored, stored)
        for mutated in _mutations(stored):
            assert not item.compare_outputs(stored, mutated), f"{item.name} holds an output that nothing compares"
