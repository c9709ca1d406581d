"""Grade one student in the container of an autograder, and build what Gradescope wants for it.

`build("autograder.zip", ["ex03"])` makes the zip to upload: `setup.sh` installs this package into the container, `run_autograder`
runs this module there, which reads the submission's folder and writes `results.json`, whatever happens.
Source: https://gradescope-autograders.readthedocs.io/en/latest/specs/ and .../manual_docker/.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashlib.course.grader.engine import GRADER_ERROR
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.sandbox.session import PACKAGE, REPOSITORY
from flashlib.course.grader.text import clean

FOLDER = Path("/autograder")  # where Gradescope puts everything

SETUP = """\
#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image.
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential
python3 -m venv /autograder/venv
cd /autograder/source
/autograder/venv/bin/pip install --no-cache-dir ${PIP_FLAGS:-} -c constraints.txt ".[course]"
"""

RUN = """\
#!/usr/bin/env bash
# Gradescope runs this for each submission.
cd /autograder/source
exec /autograder/venv/bin/python -m flashlib.course.grader.autograder {exercises}
"""

FIELDS = {
    "score": (int, float),
    "execution_time": (int, float),
    "output": str,
    "output_format": str,
    "test_output_format": str,
    "test_name_format": str,
    "visibility": str,
    "stdout_visibility": str,
    "extra_data": dict,
    "tests": list,
    "leaderboard": list,
}
TEST_FIELDS = {
    "score": (int, float),
    "max_score": (int, float),
    "status": str,
    "name": str,
    "name_format": str,
    "number": str,
    "output": str,
    "output_format": str,
    "tags": list,
    "visibility": str,
    "extra_data": dict,
}
CHOICES = {
    "visibility": {"hidden", "after_due_date", "after_published", "visible"},
    "stdout_visibility": {"hidden", "after_due_date", "after_published", "visible"},
    "status": {"passed", "failed"},
    "output_format": {"text", "html", "simple_format", "md", "ansi"},
    "test_output_format": {"text", "html", "simple_format", "md", "ansi"},
    "name_format": {"text", "html", "simple_format", "md", "ansi"},
    "test_name_format": {"text", "html", "simple_format", "md", "ansi"},
}


def problems_of(results: Any) -> list[str]:
    """What in a results.json is not as Gradescope publishes it: unknown fields, wrong types, values that are no choice."""
    if not isinstance(results, dict):
        return ["not an object"]
    found = _problems(results, FIELDS, "")
    if "score" not in results and not results.get("tests"):
        found.append("neither score nor tests")
    for at, test in enumerate(results.get("tests", [])):
        found += (
            _problems(test, TEST_FIELDS, f"tests[{at}].") if isinstance(test, dict) else [f"tests[{at}] is no object"]
        )
    return found


def _problems(entry: dict[str, Any], fields: dict[str, Any], where: str) -> list[str]:
    found = [f"{where}{name} is not a field" for name in entry if name not in fields]
    for name, kind in fields.items():
        if name in entry and (not isinstance(entry[name], kind) or isinstance(entry[name], bool)):
            found.append(f"{where}{name} is {type(entry[name]).__name__}")
        elif name in entry and name in CHOICES and entry[name] not in CHOICES[name]:
            found.append(f"{where}{name} is {entry[name]!r}")
    return found


def grade_folder(submission: Path, names: Sequence[str], *, hints: int = 1) -> dict[str, Any]:
    """The results.json of one student, whose files lie in a folder: in folders and archives in it, too, or as one file."""
    from flashlib.course.grader.classroom import grade_class
    from flashlib.course.grader.report import as_gradescope
    from flashlib.course.grader.submissions import read_student

    exercises = [load_exercise(name) for name in names]
    student = read_student(submission, "you", exercises)
    # The container holds one student's files and nothing else of value: it is the fence where the kernel has none.
    (graded,) = grade_class([student], exercises, hidden=(FOLDER / "results",), hints=hints, allow_unfenced=True)
    results = as_gradescope(graded.reports)
    if any(GRADER_ERROR in report.diagnoses for report in graded.reports):
        results["output"] = f"A check failed of itself; your instructor should look at it.\n{results['output']}"
    return results


def failed(error: BaseException) -> dict[str, Any]:
    """The results.json where nothing could be graded."""
    said = "".join(traceback.format_exception_only(type(error), error)).strip()
    return {
        "score": 0,
        "output": clean(f"The grader failed, not your code. Please tell your instructor: {said}", 2000),
        "output_format": "text",
        "visibility": "visible",
        "tests": [],
    }


def main(arguments: Sequence[str]) -> int:
    """Grade `--submission` and write `--results`. The exit status is 0 whenever that was written."""
    parser = argparse.ArgumentParser(prog="python -m flashlib.course.grader.autograder", description=__doc__)
    parser.add_argument("exercises", nargs="+", help="such as ex03")
    parser.add_argument("--submission", type=Path, default=FOLDER / "submission")
    parser.add_argument("--results", type=Path, default=FOLDER / "results/results.json")
    parser.add_argument("--hints", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        results = grade_folder(options.submission, options.exercises, hints=options.hints)
    except Exception as error:  # of whatever kind: a submission without results is worth nothing to anybody
        results = failed(error)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2, allow_nan=False), encoding="ascii")
    return 0


def build(file: Path, names: Sequence[str]) -> None:
    """Write the zip to upload to Gradescope as the autograder of an assignment that asks for these exercises.

    Raises:
        ValueError: there is no such exercise, or this package is installed without its sources.
    """
    for name in names:
        load_exercise(name)
    if not (REPOSITORY / "pyproject.toml").exists():
        raise ValueError(f"the zip is made from a checkout of the repository; {REPOSITORY} is none")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, "setup.sh", SETUP.encode(), executable=True)
        _add(archive, "run_autograder", RUN.format(exercises=" ".join(names)).encode(), executable=True)
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            _add(archive, name, (REPOSITORY / name).read_bytes())
        for source in sorted(PACKAGE.rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                _add(archive, f"flashlib/{source.relative_to(PACKAGE).as_posix()}", source.read_bytes())


def _add(archive: zipfile.ZipFile, name: str, content: bytes, *, executable: bool = False) -> None:
    info = zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0))
    info.external_attr = (0o755 if executable else 0o644) << 16
    archive.writestr(info, content, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
