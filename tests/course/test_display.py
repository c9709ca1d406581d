"""How figures and tables enter a notebook."""

import base64
import io

import matplotlib.figure
import pytest

from flashlib.course import Figure, table
from flashlib.course.display import format_bytes, format_number, show, widgets_run


def a_plot():
    fig = matplotlib.figure.Figure(figsize=(4, 2))
    fig.add_subplot().plot([1, 2, 3])
    return fig


def test_a_figure_is_a_png_and_words():
    from PIL import Image

    figure = Figure(a_plot(), alt=" A rising line. ")
    data, metadata = figure._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"} and data["text/plain"] == "A rising line." == str(figure)
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    shown = metadata["image/png"]
    assert abs(image.width - 2 * shown["width"]) <= 1 and abs(image.height - 2 * shown["height"]) <= 1
    assert shown["alt"] == "A rising line."


def test_a_figure_can_be_saved(tmp_path):
    figure = Figure(a_plot(), alt="A rising line.")
    figure.save(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == figure.png


def test_pyplot_does_not_show_it_again():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    ax.plot([1, 2])
    Figure(fig, alt="A line.")
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize(
    "fig, alt, error, says",
    [
        ("plot", "x", TypeError, "fig must be a matplotlib Figure, got str"),
        (None, "", ValueError, "alt must describe"),
        (None, "  ", ValueError, "alt must describe"),
        (None, 3, TypeError, "alt must be a str, got int"),
    ],
)
def test_a_figure_needs_its_description(fig, alt, error, says):
    with pytest.raises(error, match=says):
        Figure(fig or a_plot(), alt=alt)
    with pytest.raises(TypeError):
        Figure(a_plot())


def test_a_table_in_text_and_html():
    shown = table([("naive", 1234567, 0.123456), ("tiled", 5, None)], ["method", "bytes", "time"], notes=["N = 4 < 5"])
    assert str(shown).splitlines() == [
        "method        bytes    time",
        "--------  ---------  ------",
        "naive     1,234,567  0.1235",
        "tiled             5",
        "N = 4 < 5",
    ]
    page = shown._repr_html_()
    assert page.startswith("<table>") and "1,234,567" in page and "<p>N = 4 &lt; 5</p>" in page


def test_table_cells():
    assert table([(True, "3", 2.0)], ["a", "b", "c"]).rows == (("yes", "3", "2"),)
    assert "a" in str(table([], ["a"]))
    with pytest.raises(ValueError, match=r"row 1 has 1 cells, expected one for each header of \['a', 'b'\]"):
        table([(1, 2), (3,)], ["a", "b"])


@pytest.mark.parametrize(
    "value, text",
    [(604.0, "604"), (1234567.0, "1,230,000"), (0.05, "0.05"), (2.5e13, "2.5e+13"), (0, "0"), (0.00001234, "1.23e-05"), (99.95, "100"),
     (-1.5, "-1.5"), (8, "8")],
)  # fmt: skip
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (512, "512 B"),
        (1000, "0.977 KiB"),
        (1536, "1.5 KiB"),
        (604 * 2**20, "604 MiB"),
        (2**40, "1 TiB"),
        (2**54, "16,400 TiB"),
    ],
)
def test_bytes(count, text):
    assert format_bytes(count) == text


def test_nobody_in_front_of_a_script(capsys):
    assert not widgets_run()
    show("words")
    assert capsys.readouterr().out == "words\n"


def test_a_kernel_can_be_told_that_nobody_is_there(reader, monkeypatch):
    assert widgets_run()
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "0")
    assert widgets_run()
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    assert not widgets_run()
