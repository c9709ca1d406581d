"""Source views: the package's own text, whole or in part."""

import functools
import inspect
import json

import pytest

import flashlib.tiled
from flashlib.backends.pytorch import tiled_attention
from flashlib.course import show_source
from flashlib.course.source import Source, _without_docstrings
from flashlib.masks import Causal, RowIntervals
from flashlib.tiled import tiled_forward


def test_a_function_is_shown_as_it_is():
    shown = show_source(tiled_forward)
    assert shown.code == inspect.getsource(tiled_forward).rstrip("\n")
    assert (shown.path, shown.name) == ("flashlib/tiled.py", "tiled_forward")
    assert str(shown).startswith("# flashlib/tiled.py · tiled_forward\ndef tiled_forward(")


def test_the_html_is_self_contained_and_stable():
    page = show_source(tiled_forward)._repr_html_()
    assert page == show_source(tiled_forward)._repr_html_()
    assert "flashlib/tiled.py" in page and "<span style=" in page
    assert "href" not in page and "class=" not in page.replace('class="highlight"', "")


def test_a_method_and_a_property_lose_their_indentation():
    assert show_source(RowIntervals.dense).code.startswith("def dense(self)")
    assert show_source(RowIntervals.q_len).code.startswith("@property\ndef q_len(self)")
    assert show_source(RowIntervals.q_len).name == "RowIntervals.q_len"


def test_a_class_and_a_module():
    assert show_source(Causal).code.startswith("class Causal(Window):")
    module = show_source(flashlib.tiled)
    assert (module.path, module.name) == ("flashlib/tiled.py", "")
    assert str(module).startswith("# flashlib/tiled.py\n")


def test_under_a_decorator_and_a_kernel_object():
    @functools.wraps(tiled_forward)
    def wrapped(*args):
        return tiled_forward(*args)

    class Kernel:  # as a Triton kernel holds its function
        fn = tiled_forward

    assert show_source(wrapped).code == show_source(tiled_forward).code
    kernel = Kernel()
    kernel.fn = tiled_forward
    assert show_source(kernel).code == show_source(tiled_forward).code


def test_docstrings_can_be_left_out():
    short = show_source(tiled_attention, docstring=False)
    assert '"""' in show_source(tiled_attention).code and '"""' not in short.code
    assert "return (out, lse) if return_lse else out" in short.code
    compile(short.code, "shown", "exec", flags=__import__("__future__").annotations.compiler_flag)
    everything = show_source(flashlib.tiled, docstring=False).code
    assert '"""' not in everything
    compile(everything, "shown", "exec")


def test_a_body_that_is_only_a_docstring_stays():
    assert _without_docstrings('def f():\n    """Nothing else."""') == 'def f():\n    """Nothing else."""'


def test_between_texts():
    part = show_source(tiled_attention, between=("spec = AttentionSpec", "return (out"))
    lines = part.code.splitlines()
    assert lines[0].startswith("spec = AttentionSpec") and lines[-1].startswith("return (out"), (
        "dedented, ends included"
    )
    assert (
        part.code in show_source(tiled_attention, docstring=False, between=("spec = AttentionSpec", "return (out")).code
    )


def test_highlighted_lines():
    shown = show_source(tiled_attention, highlight="return_lse")
    lines = shown.code.splitlines()
    assert [lines[at] for at in shown.highlighted] == [line for line in lines if "return_lse" in line]
    both = show_source(tiled_attention, highlight=["block_q", "return_lse"])
    assert len(both.highlighted) > len(shown.highlighted)
    assert both._repr_html_() != show_source(tiled_attention)._repr_html_()


def test_special_characters_survive():
    shown = Source("flashlib/x.py", "<f>", "a < b & c  # ☃", ())
    assert "&lt;f&gt;" in shown._repr_html_() and "☃" in shown._repr_html_()


@pytest.mark.parametrize(
    "obj, options, error, says",
    [
        (3, {}, TypeError, "obj must be a function, method, class or module with Python source, got 3"),
        ("flashlib.tiled", {}, TypeError, "got 'flashlib.tiled'"),
        (len, {}, TypeError, "got <built-in function len>"),
        (json.loads, {}, ValueError, "obj must be part of flashlib"),
        (int, {}, TypeError, "obj must have Python source"),
        (tiled_forward, {"between": ("nowhere", "x")}, ValueError, "between: 'nowhere' is on no line"),
        (
            tiled_forward,
            {"between": ("spec", "x")},
            ValueError,
            "between: 'spec' is on . lines, so it does not say where",
        ),
        (
            tiled_forward,
            {"between": ("def tiled_forward", "nowhere")},
            ValueError,
            "'nowhere' is on no line from 'def tiled",
        ),
        (tiled_forward, {"highlight": "nowhere"}, ValueError, "highlight: 'nowhere' is on no line shown"),
    ],
)
def test_bad_input(obj, options, error, says):
    with pytest.raises(error, match=says):
        show_source(obj, **options)
