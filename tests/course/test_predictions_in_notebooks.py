"""A prediction must be able to fail: its answer is computed by the notebook, and it is asked before and settled after."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def problems(chapter: str, cells: list[str]) -> list[str]:
    """What is wrong with the predictions in the code cells of a chapter."""
    found, asked = [], {}
    for number, source in enumerate(cells):
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        for node in ast.walk(ast.parse("\n".join(lines))):
            match node:
                case ast.Assign(targets=[ast.Name(id=variable)], value=ast.Call(func=ast.Name(id="predict")) as call):
                    id = ast.literal_eval(call.args[0])
                    if not id.startswith(f"{chapter}-"):
                        found.append(f"{id}: belongs to chapter {chapter}")
                    if id in [entry["id"] for entry in asked.values()]:
                        found.append(f"{id}: asked twice")
                    if variable in asked:
                        found.append(f"{id}: {variable} still holds {asked[variable]['id']}")
                    if len(source.strip().splitlines()) > 1:
                        found.append(f"{id}: does not have its cell to itself, which is shown without its code")
                    asked[variable] = {"id": id, "cell": number, "settled": False}
                case ast.Call(func=ast.Attribute(value=ast.Name(id=variable), attr="settle")) as call if (
                    variable in asked
                ):
                    actual = call.args[0]
                    names = [n for n in ast.walk(actual) if isinstance(n, (ast.Name, ast.Attribute, ast.Call))]
                    if not names:
                        found.append(
                            f"{asked[variable]['id']}: the answer {ast.unparse(actual)} is typed in, not computed"
                        )
                    if asked[variable]["cell"] == number:
                        found.append(f"{asked[variable]['id']}: settled in the cell that asks")
                    asked[variable]["settled"] = True
                case ast.Expr(value=ast.Call(func=ast.Name(id="predict"))):
                    found.append(f"cell {number}: a prediction that no variable keeps cannot be settled")
    return found + [f"{entry['id']}: never settled" for entry in asked.values() if not entry["settled"]]


@pytest.mark.parametrize(
    "cells, says",
    [
        (['p = predict("01-a")', "p.settle(x)"], None),
        (['p = predict("01-a")', "%timeit f()\np.settle(7 * x.nbytes)"], None),
        (['p = predict("01-a")', "p.settle(604)"], "typed in"),
        (['p = predict("01-a")', "p.settle(9 * 64 * 2**20)"], "typed in"),
        (['p = predict("01-a")', "p.settle('rows')"], "typed in"),
        (['p = predict("01-a")'], "never settled"),
        (['predict("01-a")'], "cannot be settled"),
        (['p = predict("01-a")\np.settle(x)'], "settled in the cell that asks"),
        (['x = 5\np = predict("01-a")', "p.settle(x)"], "to itself"),
        (['p = predict("02-a")', "p.settle(x)"], "belongs to chapter 01"),
        (['p = predict("01-a")', "p.settle(x)", 'q = predict("01-a")', "q.settle(x)"], "twice"),
        (['p = predict("01-a")', 'p = predict("01-b")', "p.settle(x)"], "still holds"),
    ],
)
def test_the_guard_sees(cells, says):
    found = problems("01", cells)
    assert (found == []) if says is None else any(says in problem for problem in found)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_predictions_of_a_chapter_can_fail(notebook):
    cells = [
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert problems(notebook.name[:2], cells) == []
