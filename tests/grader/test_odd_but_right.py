"""Right solutions written in odd ways: they get their marks, or are told what is in the way."""

from dataclasses import replace

import pytest

from flashlib.course.grader.engine import Submission, grade
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.sandbox.session import REPOSITORY


def solution(name: str) -> str:
    return (REPOSITORY / "solutions" / load_exercise(name).file).read_text()


def after(lines: str) -> str:
    """`tiled_attention` as it is, and then wrapped."""
    return f"{solution('ex03')}\n\n_tiled = tiled_attention\n\n\n{lines}\n"


FILES = {
    "lines as Windows ends them": solution("ex01").replace("\n", "\r\n").encode(),
    "a mark of byte order": b"\xef\xbb\xbf" + solution("ex01").encode(),
    "another encoding, named": ("# -*- coding: latin-1 -*-\n# caf\xe9\n" + solution("ex01")).encode("latin-1"),
    "tabs": solution("ex01").replace("    ", "\t").encode(),
    "tests of its own": (solution("ex01") + "\n\nif __name__ == '__main__':\n    raise SystemExit('tests')\n").encode(),
}
# How the function of a right file may be made. What counts is met with all of them.
FORMS = {
    "a list": "def tiled_attention(*args, **kwargs):\n    return list(_tiled(*args, **kwargs))",
    "a named tuple": "from typing import NamedTuple\n\n\nclass Both(NamedTuple):\n    out: torch.Tensor\n    lse: torch.Tensor\n\n\n"
    "def tiled_attention(*args, **kwargs):\n    return Both(*_tiled(*args, **kwargs))",
    "a module": "class Attention(torch.nn.Module):\n    def forward(self, *args, **kwargs):\n        return _tiled(*args, **kwargs)\n\n\n"
    "tiled_attention = Attention()",
    "inference mode": "tiled_attention = torch.inference_mode()(_tiled)",
    "arguments of its own": "def tiled_attention(q, k, v, block_q, block_k, scale=None, *, verbose=True, **more):\n    print(q.shape)\n"
    "    return _tiled(q, k, v, block_q, block_k, scale)",
}


@pytest.mark.parametrize("way", FILES)
def test_files_of_any_kind_are_read(sandbox_of, way):
    exercise = load_exercise("ex01")
    report = grade(exercise, Submission("odd", FILES[way]), sandbox_of(exercise))
    assert report.passed, report


def test_a_file_that_python_cannot_read_is_told_to_be_none_of_its_own(sandbox_of):
    exercise = load_exercise("ex01")
    report = grade(exercise, Submission("odd", solution("ex01").encode("utf-16")), sandbox_of(exercise))
    assert report.earned == 0 and set(report.diagnoses) <= {"syntax", "exception"}  # which Python says so
    assert "valid Python" in str(report) or "null byte" in str(report)


@pytest.mark.parametrize("form", FORMS)
def test_functions_of_any_form_are_called_and_counted(sandbox_of, form):
    exercise = load_exercise("ex03")
    some = [each for each in exercise.properties if each.name in ("whole-tiles", "half-precision", "memory-traffic")]
    report = grade(
        replace(exercise, properties=some), Submission("odd", after(FORMS[form]).encode()), sandbox_of(exercise)
    )
    assert report.passed, report


def test_more_precision_than_is_asked_for_is_no_traffic(sandbox_of):
    exercise = load_exercise("ex03")
    source = solution("ex03").replace(".float()", ".double()")
    assert source.count(".double()") > 2
    report = grade(exercise, Submission("odd", source.encode()), sandbox_of(exercise))
    assert report.passed, report
