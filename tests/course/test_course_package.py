"""`from flashlib.course import ...`: everything is there, and nothing heavy comes before it is used."""

import subprocess
import sys

import pytest

HEAVY = ["matplotlib", "ipywidgets", "IPython", "transformers", "jupyterlab", "triton", "pandas"]


def in_fresh_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_course_is_light():
    loaded = in_fresh_python(
        "import sys, flashlib.course; from flashlib.course import TrafficMeter, predict, show_source, figures, widgets; "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_names_stay_what_they_are_however_they_are_imported():
    kinds = in_fresh_python(
        "from flashlib.course import predict, scoreboard, table; import flashlib.course.predictions, flashlib.course.source\n"
        "from flashlib.course import predict, show_source, figures\n"
        "print(callable(predict), callable(show_source), figures.__name__)"
    )
    assert kinds == "True True flashlib.course.figures"


def test_every_public_name_resolves():
    import flashlib.course

    missing = []
    for name in flashlib.course.__all__:
        try:
            assert getattr(flashlib.course, name).__doc__, f"{name} has no docstring"
        except ImportError as problem:
            missing.append(f"{name}: {problem}")
    assert missing == []
    assert set(flashlib.course.__all__) <= set(dir(flashlib.course))


def test_unknown_names_are_attribute_errors():
    import flashlib.course

    with pytest.raises(AttributeError, match="has no attribute 'prediction'"):
        flashlib.course.prediction  # noqa: B018
