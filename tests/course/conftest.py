"""A reader in front of the notebook, or nobody: both are played here, whatever runs the tests."""

import pytest

from flashlib.course import display, predictions


class _Kernel:
    kernel = object()


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """Widgets run, and the reader's record is kept in an empty directory."""
    monkeypatch.delenv("FLASHLIB_NONINTERACTIVE", raising=False)
    monkeypatch.setenv("FLASHLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("IPython.get_ipython", lambda: _Kernel())
    monkeypatch.setattr("IPython.display.display", lambda value: None)
    assert display.widgets_run()
    return tmp_path / "data"


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No reader: a script, or a notebook executed by a machine."""
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    monkeypatch.setenv("FLASHLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(predictions, "_settled_here", {})
    return tmp_path / "data"
