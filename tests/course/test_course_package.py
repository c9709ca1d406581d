"""`from flashlib.course import ...`: everything is there, and nothing heavy comes before it is used."""

import subprocess
import sys

import pytest

HEAVY = ["matplotlib", "ipywidgets", "IPython", "transformers", "jupyterlab", "triton", "pandas"]


IN_FRESH_PYTHON = f"""
import sys
import flashlib.course
from flashlib.course import predict, show_source, figures, widgets
print([name for name in {HEAVY} if name in sys.modules])
import flashlib.course.predictions, flashlib.course.source
from flashlib.course import predict, show_source, figures
print(callable(predict), callable(show_source), figures.__name__)
"""


def test_importing_is_light_and_names_stay_what_they_are():
    """A submodule of a function's name would take the function's place once it is imported."""
    run = subprocess.run([sys.executable, "-c", IN_FRESH_PYTHON], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["[]", "True True flashlib.course.figures"]


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
