"""Triton exercises: kernels run in the interpreter in a fenced process, and errors in them point at the student's lines."""

import importlib.util

import pytest
import torch

from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.front_door import check
from flashlib.course.grader.sandbox.outcome import Limits, StudentError
from flashlib.course.grader.sandbox.session import REPOSITORY

KERNELS = b"""import torch
import triton
import triton.language as tl


@triton.jit
def total(values):
    return tl.sum(values.mistyped, 0)


@triton.jit
def kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(p_x + offsets, mask=offsets < n, other=0.0)
    tl.store(p_out, total(values))


@triton.jit
def not_written(p_x):
    raise NotImplementedError


def launch(x, block):
    out = torch.empty(1)
    kernel[(1,)](x, out, x.numel(), BLOCK=block)
    return out


@triton.jit
def shifted(p_x, p_out, n, LOADS: tl.constexpr, STORES: tl.constexpr):
    offsets = tl.program_id(0) * 4 + tl.arange(0, 4)
    values = tl.load(p_x + offsets, mask=offsets < n + LOADS)
    tl.store(p_out + offsets, values, mask=offsets < n + STORES)


@triton.jit
def summed(p_x, p_out):
    total = tl.load(p_out) + tl.load(p_x + tl.program_id(0))
    tl.store(p_out, total)


def launch_shifted(x, loads, stores):
    out = torch.empty_like(x)
    shifted[(3,)](x, out, x.numel(), LOADS=loads, STORES=stores)
    return out


def launch_summed(x):
    out = torch.zeros(1)
    summed[(x.numel(),)](x, out)
    return out


def only_allocate(x):
    return torch.empty_like(x)


def launch_not_written(x):
    not_written[(1,)](x)


def launch_with_own_words(x):
    try:
        return launch(x, 16)
    except Exception as error:
        raise RuntimeError("my own words") from error


def launch_with_endless_causes(x):
    error = ValueError("circle")
    error.__cause__ = error
    raise error
"""


@pytest.fixture(scope="module")
def child(sandbox_of):
    child = sandbox_of(load_exercise("ex07")).open_child(KERNELS, "ex99_kernels.py", Limits(), {})
    child.load()
    yield child
    child.end()


def failure(child, function, *args) -> StudentError:
    with pytest.raises(StudentError) as caught:
        child.call(function, [torch.ones(10), *args])
    return caught.value


def test_error_in_a_device_function_shows_every_line_on_the_way_to_it(child):
    error = failure(child, "launch", 16)
    assert error.kind == "exception"
    assert str(error) == "It raised AttributeError: 'tensor' object has no attribute 'mistyped'"
    assert error.traceback.splitlines() == [
        "ex99_kernels.py, line 25, in launch",
        "    kernel[(1,)](x, out, x.numel(), BLOCK=block)",
        "ex99_kernels.py, line 15, in kernel",
        "    tl.store(p_out, total(values))",
        "ex99_kernels.py, line 8, in total",
        "    return tl.sum(values.mistyped, 0)",
        "AttributeError: 'tensor' object has no attribute 'mistyped'",
    ]


def test_error_of_tritons_own_shows_the_line_of_the_kernel(child):
    error = failure(child, "launch", 17)
    assert str(error) == "It raised ValueError: arange's range must be a power of 2"
    assert "line 13, in kernel\n    offsets = tl.arange(0, BLOCK)" in error.traceback


def test_unwritten_kernel_is_not_implemented(child):
    assert failure(child, "launch_not_written").kind == "not-implemented"


def test_what_students_wrap_themselves_stays_their_message(child):
    error = failure(child, "launch_with_own_words")
    assert str(error) == "It raised RuntimeError: my own words"
    assert failure(child, "launch_with_endless_causes").kind == "exception"


def test_addresses_outside_of_all_tensors_are_named_with_their_line(child):
    load, store = failure(child, "launch_shifted", 1, 0), failure(child, "launch_shifted", 0, 2)
    assert (load.kind, store.kind) == ("out-of-bounds-load", "out-of-bounds-store")
    assert "program (2, 0, 0): 1 of 3 addresses to load" in str(load)
    assert "the first lies 1 element past the end of p_x." in str(load)
    assert "in shifted\n    values = tl.load(p_x + offsets" in load.traceback


def test_programs_that_meet_are_a_race_though_the_interpreter_gets_the_sum_right(child):
    error = failure(child, "launch_summed")
    assert error.kind == "race" and "in summed\n    total = tl.load(p_out)" in error.traceback


def test_meter_counts_the_bytes_of_kernels(child):
    x = torch.ones(10)
    reply = child.call("launch_shifted", [x, 0, 0], meter={"x": x})
    assert torch.equal(reply.value, x)
    assert reply.meter["bytes_read"] == {"x": 40} and reply.meter["bytes_written"] == {"elsewhere": 40}
    assert (reply.meter["launches"], reply.meter["programs"], reply.meter["largest_block"]) == ({"shifted": 1}, 3, 4)


def test_memory_that_no_kernel_wrote_holds_nan(child):
    assert child.call("only_allocate", [torch.ones(5)]).value.isnan().all()


def test_kernels_written_in_a_notebook_are_copied_with_their_decorator():
    spec = importlib.util.spec_from_file_location("ex06_here", REPOSITORY / "solutions" / "ex06_ragged_softmax.py")
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    names = ["block_softmax", "padded_kernel", "packed_kernel", "ragged_softmax", "packed_softmax"]
    report = check("ex06", functions={name: getattr(written, name) for name in names})
    assert report.passed, report


# ------------------------------------------------------------------------------------------------------------- compiling

COMPILED = """import torch
import triton
import triton.language as tl

{before}


@triton.jit
def helper(x):
    {helper}
    return x


@triton.jit
def kernel(p_x, p_out, scale, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = helper(tl.load(p_x + offsets[:, None] * BLOCK + offsets[None, :]))
    {inside}
    tl.store(p_out + offsets[:, None] * BLOCK + offsets[None, :], x * scale)


def launch(x):
    out = torch.empty_like(x)
    kernel[(1,)](x, out, 0.5, BLOCK=x.shape[0])
    return out
"""


@pytest.fixture(scope="module")
def compiling(sandbox_of):
    return sandbox_of(load_exercise("ex07")).for_compiling()


def compiled(sandbox, dtype=torch.float32, **parts):
    source = COMPILED.format(**{"before": "", "helper": "pass", "inside": "pass", **parts})
    child = sandbox.open_child(source.encode(), "ex99_kernels.py", Limits(), {})
    try:
        child.load()
        return child.call("launch", [torch.ones(16, 16, dtype=dtype)]).compiled
    finally:
        child.end()


@pytest.mark.parametrize(
    ("inside", "dtype", "dots"),
    [
        ("pass", torch.float32, []),
        ("x = tl.dot(x, x)", torch.float32, [("tf32", "f32")]),
        ('x = tl.dot(x, x, input_precision="ieee")', torch.float32, [("ieee", "f32")]),
        ('x = tl.dot(x, x, input_precision="tf32x3")', torch.float32, [("tf32x3", "f32")]),
        ("x = tl.dot(x.to(tl.float16), x.to(tl.float16)) + tl.dot(x, x, input_precision='ieee')", torch.float32, None),
    ],
)
def test_the_compiler_says_how_tiles_are_multiplied(compiling, inside, dtype, dots):
    kernels = compiled(compiling, dtype, inside=inside)
    assert list(kernels) == ["kernel"]
    if dots is None:
        assert {kind for _, kind in kernels["kernel"]} == {"f16", "f32"}
    else:
        assert kernels["kernel"] == dots


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"inside": "x = x * sum([i for i in range(3)])"}, "for i in range(3)"),
        ({"before": "FACTOR = 2.0", "inside": "x = x * FACTOR"}, "x * FACTOR"),
        ({"inside": "print(f'{x.foo}')"}, "x.foo"),
        ({"inside": "try:\n        x = x + 1\n    except ValueError:\n        pass"}, "try:"),
        ({"inside": "x = x[0, 0]"}, "x[0, 0]"),
        ({"helper": "x = x + sorted([1, 2])[0]"}, "sorted([1, 2])"),
        ({"inside": "for row in x:\n        pass"}, "for row in x"),
        ({"inside": "import math\n    x = x * math.exp(1)"}, "import math"),
    ],
)
def test_what_no_gpu_runs_is_refused_at_its_line(compiling, parts, line):
    with pytest.raises(StudentError) as caught:
        compiled(compiling, **parts)
    assert caught.value.kind == "compile-error", caught.value
    assert line in caught.value.traceback and "site-packages" not in caught.value.message
