"""No cell of a notebook escapes comparison unnoticed: what nbval would let pass without a word is refused here."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks/answers").glob("*.ipynb"))

NOT_COMPARED = "nbval-ignore-output"
NBVAL_TAGS = {"nbval-skip", "nbval-check-output", "nbval-raises-exception", "pytest-validate-ignore-output"}
NBVAL_COMMENT = re.compile(r"^\s*#+\s*(NBVAL_\w+|PYTEST_VALIDATE_\w+)", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
DEFAULT_REPR = re.compile(r"^<[^<>]*( at 0x[0-9a-f]+| object|Figure size [^<>]*)[^<>]*>$")
DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")
TOP_FOLDERS = "home|root|Users|tmp|var|opt|mnt|srv|usr|private"
ABSOLUTE_PATH = re.compile(rf"(?<![\w.:/])/(?:{TOP_FOLDERS})/\w|\b[A-Z]:\\\w")


def problems(notebook: NotebookNode) -> Iterator[str]:
    """What is wrong with a notebook, a line each; nothing for a sound one."""
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not code_cells:
        yield "has no code cell"
    for number, cell in enumerate(code_cells, start=1):
        for problem in (*_run_problems(cell, number), *_marker_problems(cell), *_output_problems(cell)):
            yield f"code cell {number}: {problem}"


def _run_problems(cell: NotebookNode, number: int) -> Iterator[str]:
    if cell.execution_count != number:
        yield f"execution_count is {cell.execution_count}; run every cell once, from top to bottom (`make notebooks`)"
    for output in cell.outputs:
        if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
            yield f"holds a stored {output.ename}, and is not tagged raises-exception"


def _marker_problems(cell: NotebookNode) -> Iterator[str]:
    tags = set(cell.metadata.get("tags", []))
    reason = cell.metadata.get("flashlib", {}).get("not_compared", "")
    for tag in sorted(tags & NBVAL_TAGS):
        yield f"the tag {tag} is not allowed; {NOT_COMPARED} with a reason is"
    for comment in NBVAL_COMMENT.findall(cell.source):
        yield f"the comment {comment} hides what is not compared; use the tag {NOT_COMPARED} with a reason"
    if NOT_COMPARED in tags and not (isinstance(reason, str) and reason.strip()):
        yield f'is tagged {NOT_COMPARED}, but its metadata has no {{"flashlib": {{"not_compared": "reason"}}}}'
    if NOT_COMPARED not in tags and reason:
        yield f"gives a reason for not being compared, but is not tagged {NOT_COMPARED}"


def _output_problems(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        data = output.get("data", {})
        plain = data.get("text/plain", "").strip()
        if WIDGET in data:
            yield "holds a widget, which shows nothing where no kernel runs; execute with FLASHLIB_NONINTERACTIVE=1"
        if any(kind.startswith("image/") for kind in data) and (not plain or DEFAULT_REPR.match(plain)):
            yield f"holds a picture that nothing compares: its text/plain is {plain!r}, not a description"
        for text in _texts(output):
            if match := ABSOLUTE_PATH.search(text):
                yield f"its output holds a path of one machine: {text[match.start() : match.start() + 60]!r}"


def _texts(output: NotebookNode) -> Iterator[str]:
    yield from filter(None, (output.get("text"), output.get("evalue"), "\n".join(output.get("traceback", []))))
    for kind, content in output.get("data", {}).items():
        if isinstance(content, str) and not kind.startswith("image/"):
            yield DATA_URI.sub("", content)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_is_compared_or_says_why_not(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not list(problems(notebook))
    for machine_path in (str(REPOSITORY), str(Path.home()), sys.prefix):
        assert machine_path not in DATA_URI.sub("", path.read_text(encoding="utf-8")).replace("\\\\", "\\")


def _picture(plain: str | None) -> NotebookNode:
    data = {"image/png": "iVBORw0KGgo="} | ({"text/plain": plain} if plain is not None else {})
    return new_output("display_data", data=data)


def _cell(source: str = "1", *outputs: NotebookNode, count: int | None = 1, **metadata: object) -> NotebookNode:
    return new_code_cell(source, execution_count=count, outputs=list(outputs), metadata=metadata)


REASON = {"not_compared": "times of this machine"}
SOUND = {
    "plain output": _cell("print(1)", new_output("stream", text="1\n")),
    "described picture": _cell("1", _picture("Bars: naive 4 MiB, tiled 1 MiB")),
    "excused with a reason": _cell("1", tags=[NOT_COMPARED], flashlib=REASON),
    "expected error": _cell("1/0", new_output("error", ename="E", evalue="", traceback=[]), tags=["raises-exception"]),
    "a URL and a ratio": _cell("1", new_output("stream", text="https://a.org/home/x and 4/tmp/2 GB/s")),
}
UNSOUND = {
    "never run": (_cell(count=None), "execution_count is None"),
    "run out of order": (_cell(count=7), "execution_count is 7"),
    "stale error": (_cell("1", new_output("error", ename="KeyError", evalue="", traceback=[])), "stored KeyError"),
    "skipped": (_cell(tags=["nbval-skip"]), "nbval-skip is not allowed"),
    "excused without a reason": (_cell(tags=[NOT_COMPARED]), "no {"),
    "excused with a blank": (_cell(tags=[NOT_COMPARED], flashlib={"not_compared": " "}), "no {"),
    "reason without tag": (_cell(flashlib=REASON), "is not tagged"),
    "hidden comment": (_cell("# NBVAL_IGNORE_OUTPUT\n1"), "comment NBVAL_IGNORE_OUTPUT"),
    "old hidden comment": (_cell("x = 1\n  #PYTEST_VALIDATE_IGNORE_OUTPUT"), "comment PYTEST_VALIDATE_IGNORE_OUTPUT"),
    "undescribed picture": (_cell("1", _picture(None)), "picture that nothing compares"),
    "figure repr": (_cell("1", _picture("<Figure size 640x480 with 1 Axes>")), "picture that nothing compares"),
    "image repr": (_cell("1", _picture("<IPython.core.display.Image object>")), "picture that nothing compares"),
    "widget": (_cell("1", new_output("display_data", data={WIDGET: {}, "text/plain": "slider"})), "holds a widget"),
    "path": (_cell("1", new_output("stream", text="saved to /tmp/figure.png")), "path of one machine"),
    "path in HTML": (
        _cell("1", new_output("display_data", data={"text/html": "<b>/home/me/x</b>"})),
        "path of one machine",
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_cells_are_let_through(name: str) -> None:
    assert not list(problems(new_notebook(cells=[new_markdown_cell("Text"), SOUND[name]])))


@pytest.mark.parametrize("name", UNSOUND)
def test_each_way_to_escape_is_refused(name: str) -> None:
    cell, message = UNSOUND[name]
    found = list(problems(new_notebook(cells=[cell])))
    assert len(found) == 1 and message in found[0], found


def test_a_notebook_without_code_is_refused() -> None:
    assert list(problems(new_notebook(cells=[new_markdown_cell("Text")]))) == ["has no code cell"]
