"""The figure of a program's lanes says which addresses are loaded and which are only pointed to."""

import pytest

from flashlib.course import figures, widgets


def test_lanes_and_addresses_are_those_of_the_strides():
    contiguous = figures.program_lanes((5, 3, 6, 1), 6, (6, 1), 3)
    assert "Program 3: 8 lanes, 1 load, 7 are masked" in contiguous.alt
    assert "loads addresses [18]; masked lanes point to [19, 20, 21, 22, 23, 24, 25]" in contiguous.alt
    assert "of which 2 are no element of x" in contiguous.alt
    transposed = figures.program_lanes((5, 3, 6, 1), 6, (1, 4), 1, layout="transposed")
    assert "Strides (1, 4), transposed. It loads addresses [1, 5, 9]" in transposed.alt
    full = figures.program_lanes((4, 4), 4, (4, 1), 0)
    assert full.alt.endswith("It loads addresses [0, 1, 2, 3].")
    assert contiguous.png != transposed.png


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="program must be from 0 to 1, got 2"):
        figures.program_lanes((1, 2), 3, (3, 1), 2)
    with pytest.raises(ValueError, match="lengths must be at most cols, 3; got 4"):
        figures.program_lanes((1, 4), 3, (3, 1), 0)


def test_explorer_without_widgets_is_the_figure_of_its_first_values(monkeypatch):
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    assert "Program 1: 8 lanes, 3 load" in str(widgets.program_explorer())
