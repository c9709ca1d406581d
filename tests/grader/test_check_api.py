"""What authors of checks build on: recognition of misconceptions, tiling bounds, objects kept in the child, seeds."""

import textwrap
from dataclasses import replace

import pytest
import torch

from flashlib import reference
from flashlib.course.grader.engine import Submission, grade, sandbox_for
from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
from flashlib.course.grader.findings import Failure
from flashlib.course.grader.inputs import in_poison, ramp, transposed_in_poison, with_poisoned_tail, with_scores_along
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.confine import MIB
from flashlib.course.grader.sandbox.outcome import StudentError

TILED = """
import torch

def attend(q, k, v):
    m = torch.full((*q.shape[:-1], 1), -torch.inf)
    l, acc = torch.zeros_like(m), torch.zeros_like(q)
    for j in range(0, k.shape[-2], 64):
        s = q @ k[..., j:j+64, :].mT * q.shape[-1] ** -0.5
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        p = torch.exp(s - m_new)
        l = l * torch.exp(m - m_new) + p.sum(-1, keepdim=True)
        acc = acc * torch.exp(m - m_new) + p @ v[..., j:j+64, :]
        m = m_new
    return acc / l
"""
NAIVE = """
import torch

def attend(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
"""
HIDES_FROM_METER = """
import sys

frame = sys._getframe()
while "TrafficMeter" not in frame.f_globals:
    frame = frame.f_back
frame.f_globals["TrafficMeter"].__torch_dispatch__ = lambda self, f, types, args=(), kwargs=None: f(*args, **(kwargs or {}))
"""
IN_NUMPY = """
import numpy as np
import torch

def attend(q, k, v):
    q, k, v = q.numpy(), k.numpy(), v.numpy()
    s = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    p = np.exp(s - s.max(-1, keepdims=True))
    return torch.from_numpy(p / p.sum(-1, keepdims=True) @ v)
"""
GIVES_UP_WHEN_LARGE = TILED.replace(
    "def attend(q, k, v):", "def attend(q, k, v):\n    if k.shape[-2] > 999: return q * 0\n"
)
MISSING_SCALE = Misconception(
    "missing-scale", "Not scaled.", "Scale.", lambda q, k, v: reference.oracle(q, k, v, scale=1.0)[0]
)
attend = Target(
    "attend",
    oracle=lambda q, k, v: reference.oracle(q, k, v)[0],
    budget=lambda q, k, v: reference.error_budget(q, k, v).out,
    misconceptions=[MISSING_SCALE],
)


def make_exercise(*checks, forbidden=SDPA):
    exercise = Exercise("ex99", "ex99_test.py", "test", "none", 1, 1, 1, forbidden=forbidden)
    for check in checks:
        exercise.property(points=1, hints=["look again"])(check)
    return exercise


def tiled_property(t):
    """tiled"""
    q, k, v = (t.randn(1, 1, 4096, 16) for _ in "qkv")
    few = q[:, :, :9], k[:, :, :9], v[:, :, :9]
    t.check_tiled(attend, q, k, v, largest=4096 * 64, memory=32 << 20, first=few, sample=lambda x: x[:, :, -64:])


def any_rows(t):
    """values"""
    t.check(attend, t.randn(1, 2, 5, 8), t.randn(1, 2, 7, 8), t.randn(1, 2, 7, 8))


@pytest.fixture(scope="module")
def sandbox(sandbox_of):
    return sandbox_of(make_exercise())


def run(sandbox, exercise, source, **options):
    return grade(exercise, Submission("me", textwrap.dedent(source).encode()), sandbox, **options)


@pytest.mark.parametrize(
    ("source", "diagnosis", "shown_by"),
    [
        (TILED, None, ""),
        (NAIVE, "untiled", "tensor of shape [1, 4096, 4096]"),
        (HIDES_FROM_METER + NAIVE, "untiled", "process that grew by"),
        (IN_NUMPY, "untiled", "process that grew by"),
        (GIVES_UP_WHEN_LARGE, "wrong-values", ""),
    ],
    ids=["tiled", "naive", "naive with a silenced meter", "naive in numpy", "gives up when large"],
)
def test_tiling_is_seen_by_the_meter_and_from_outside(sandbox, source, diagnosis, shown_by):
    finding = run(sandbox, make_exercise(tiled_property), source).results[0].finding
    assert (finding and finding.diagnosis) == diagnosis, finding
    assert not shown_by or shown_by in finding.got


def test_misconception_is_recognized_with_its_hint_first(sandbox):
    exercise = make_exercise(any_rows)
    finding = run(sandbox, exercise, NAIVE.replace("* q.shape[-1] ** -0.5", "")).results[0].finding
    assert finding.diagnosis == "missing-scale" and finding.hints == ("Scale.", "look again")
    assert finding.tried == "attend(float32 [1, 2, 5, 8], float32 [1, 2, 7, 8], float32 [1, 2, 7, 8])"
    finding = run(sandbox, exercise, NAIVE.replace("** -0.5", "** -0.4")).results[0].finding
    assert finding.diagnosis == "wrong-values"
    assert run(sandbox, exercise, NAIVE.replace("@ v", "@ v[..., :3]")).diagnoses == ("wrong-shape",)
    assert run(sandbox, exercise, NAIVE + "    \ndef attend2(): pass\nattend = None").diagnoses == ("missing",)


def test_same_seed_gives_the_same_inputs_and_no_seed_fresh_ones(sandbox):
    seen = []

    def draws(t):
        """draws"""
        seen.append(t.call("echo", t.randn(3)).tolist())

    source = "def echo(x):\n    return x + 0"
    first = run(sandbox, make_exercise(draws), source)
    run(sandbox, make_exercise(draws), source, seed=first.seed)
    run(sandbox, make_exercise(draws), source)
    assert first.passed and seen[0] == seen[1] != seen[2]


def test_a_result_is_known_for_the_very_same_arguments_alone():
    calls = []

    def doubled(x, factor=1.0):
        calls.append(1)
        return x * 2

    def itself(x, factor=1.0):
        return x

    results, x = Results(), torch.randn(4, 6)
    in_rows_of_8 = torch.zeros(4, 8)[:, :6].copy_(x)
    for _ in range(2):
        assert torch.equal(results.on((x.clone(),), {})(doubled)[0], x * 2)
    assert len(calls) == 1
    others = (x + 1, x.double(), x.view(6, 4), x.T, in_rows_of_8, in_poison(x))
    for count, other in enumerate(others, start=2):
        assert torch.equal(results.on((other,), {})(doubled)[0], other * 2)
        assert len(calls) == count
    for kwargs in ({"factor": 1.0}, {"factor": 1}, {"factor": -0.0}, {"factor": 0.0}, {"factor": torch.inf}):
        results.on((x,), kwargs)(doubled)
    assert len(calls) == 1 + len(others) + 5
    first = results.on((x,), {})(itself)[0]
    before = x.clone()
    x += 1
    assert torch.equal(first, before) and torch.equal(results.on((before,), {})(itself)[0], before)
    assert torch.equal(results.on((x,), {})(itself)[0], x)


def test_objects_stay_in_the_child_and_values_of_every_kind_cross(sandbox):
    source = """
    import torch
    class Cache:
        def __init__(self, factor):
            self.items, self.factor = [], factor
        def append(self, x):
            self.items.append(x * self.factor)
            return len(self.items)
    def total(cache):
        return torch.stack(cache.items).sum(0)
    def echo(*args, **kwargs):
        return args, kwargs
    """

    def keeps(t):
        """keeps"""
        cache = t.make("Cache", 3)
        x = t.randn(4)
        assert (cache.call("append", x), cache.call("append", x)) == (1, 2)
        torch.testing.assert_close(t.call("total", cache.handle), 6 * x)
        assert cache.get("factor") == 3
        sent = (None, True, 3, 2.5, float("-inf"), "text", [1, (2,)], {"a": 1})
        (received, named) = t.call("echo", *sent, dtype=torch.float16, empty=torch.zeros(0, 3))
        assert received == sent
        assert named["dtype"] is torch.float16 and named["empty"].shape == (0, 3)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
            strided = (10 * t.randn(4, 6)).to(dtype).T[::2]
            ((back,), _) = t.call("echo", strided)
            assert back.dtype == dtype and torch.equal(back, strided)

    report = run(sandbox, make_exercise(keeps), source)
    assert report.passed, report


def test_exact_answers_and_own_diagnoses(sandbox):
    strict = Misconception("off-by-one", "One too many.", model=lambda n: n + 1)

    def counts(t):
        """counts"""
        t.expect_equal(t.call("count", 4), 4, "the count", [strict], 4)

    assert run(sandbox, make_exercise(counts), "def count(n): return n").passed
    assert run(sandbox, make_exercise(counts), "def count(n): return n + 1").diagnoses == ("off-by-one",)
    assert run(sandbox, make_exercise(counts), "def count(n): return n + 2").diagnoses == ("wrong-values",)
    assert run(sandbox, make_exercise(counts), "def count(n): return True").diagnoses == ("wrong-values",)


def test_broken_check_is_the_graders_fault_and_never_a_pass(sandbox):
    def broken(t):
        """broken"""
        raise KeyError("author's mistake")

    def infinite_budget(t):
        """budget"""
        t.check(replace(attend, budget=lambda q, k, v: float("inf")), *(t.randn(1, 1, 3, 4) for _ in "qkv"))

    report = run(sandbox, make_exercise(broken, infinite_budget, any_rows), NAIVE.replace("* q", "/ q"))
    assert [result.finding.diagnosis for result in report.results] == ["grader-error", "grader-error", "wrong-values"]
    assert "author's mistake" in report.results[0].finding.says and report.earned == 0
    assert "everything would pass" in report.results[1].finding.says


def test_answers_are_looked_at_before_they_are_used(sandbox):
    def looks(t):
        """looks"""
        one, two = t.expect_tuple(t.call("pair"), "one", "two")
        t.expect_tensor(one, "one", (2, 3), torch.float32)
        t.expect_tensor(two, "two", (4,))

    def diagnosis(answer):
        return run(sandbox, make_exercise(looks), f"import torch\ndef pair(): return {answer}").diagnoses

    assert diagnosis("torch.ones(2, 3), torch.ones(4).long()") == ()
    assert diagnosis("torch.ones(2, 3)") == diagnosis("1, torch.ones(4)") == diagnosis("None") == ("wrong-type",)
    assert diagnosis("torch.ones(3, 2), torch.ones(4)") == ("wrong-shape",)
    assert diagnosis("torch.ones(2, 3).half(), torch.ones(4)") == ("wrong-dtype",)


def test_properties_need_a_title_and_points():
    with pytest.raises(ValueError, match="docstring"):
        make_exercise(lambda t: None)
    with pytest.raises(ValueError, match="points"):
        make_exercise().property(points=0)(tiled_property)
    with pytest.raises(ValueError, match="two properties"):
        make_exercise(tiled_property, tiled_property)


def test_forbidden_operations_are_gone_by_every_route(sandbox):
    source = """
    import threading
    import torch
    from torch.nn.functional import scaled_dot_product_attention as harmless_name
    def attend(q, k, v):
        out = []
        thread = threading.Thread(target=lambda: out.append({call}))
        thread.start()
        thread.join()
        return out[0] if out else {call}
    """

    for call in (
        "harmless_name(q, k, v)",
        "getattr(torch, '_C')._nn.scaled_dot_product_attention(q, k, v)",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]",
        "torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]",
    ):
        report = run(sandbox, make_exercise(any_rows), source.replace("{call}", call))
        assert report.diagnoses == ("sdpa-called",), (call, report)


def test_exception_shows_the_students_own_lines(sandbox):
    source = "import torch\ndef helper(q):\n    return torch.stack([q, q[..., :2]])\ndef attend(q, k, v):\n    print('here')\n    return helper(q)"
    finding = run(sandbox, make_exercise(any_rows), source).results[0].finding
    assert finding.diagnosis == "exception" and finding.printed == "here\n"
    assert "ex99_test.py, line 6, in attend\n    return helper(q)\nex99_test.py, line 3, in helper" in finding.traceback
    assert "RuntimeError: stack expects each tensor to be equal size" in finding.traceback
    assert "child.py" not in finding.traceback and "/tmp" not in finding.traceback


def test_memory_growth_is_measured_from_outside(sandbox):
    source = b"import torch\ndef grow(n):\n    return float(torch.ones(n).sum())"
    for size in (50, 200):
        child = sandbox.open_child(source, "grow.py", make_exercise().limits, {})
        try:
            child.load()
            child.call("grow", [size * MIB // 4])
        finally:
            growth = child.end().memory_growth
        assert size * 0.5 < growth / MIB < size * 1.2 + 30


def test_changed_arguments_are_named_by_the_bytes_they_were_computed_on(sandbox):
    source = b"def f(x, y, z=None):\n    y[0] += 1\n    z.zero_()\n    return x + 0"
    child = sandbox.open_child(source, "f.py", make_exercise().limits, {})
    try:
        child.load()
        x, y = torch.ones(3), torch.ones(3)
        assert child.call("f", [x, y], {"z": torch.ones(2)}).changed == ("argument 2", "z")
        assert torch.equal(y, torch.ones(3))
        with pytest.raises(StudentError) as caught:
            child.call("f", [x, y], {"z": 1})
        assert caught.value.kind == "exception"
    finally:
        child.end()


def test_inputs_that_bring_mistakes_to_light():
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    for view in (in_poison(x), transposed_in_poison(x)):
        assert torch.equal(view, x)
        assert torch.empty(0).set_(view.untyped_storage()).isnan().any()
    assert transposed_in_poison(x).stride(1) < transposed_in_poison(x).stride(2)
    assert with_poisoned_tail(x, 2).isnan()[..., 2:, :].all() and torch.equal(
        with_poisoned_tail(x, 2)[..., :2, :], x[..., :2, :]
    )
    q, k = with_scores_along(torch.randn(5, 64), torch.randn(70, 64), ramp(70, -20, 20))
    scores = q @ k.T / 8
    assert (scores - ramp(70, -20, 20)).abs().max() < 8
    assert torch.equal(ramp(5, 0, 4, falling=True), torch.tensor([4.0, 3, 2, 1, 0]))


def test_triton_kernels_run_in_the_interpreter():
    source = """
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)

    def double(x):
        out = torch.empty_like(x)
        double_kernel[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
        return out
    """

    def doubles(t):
        """doubles"""
        x = t.randn(100)
        t.expect_equal(t.call("double", x), 2 * x, "the double")

    exercise = replace(make_exercise(doubles), preload=("triton",), environment={"TRITON_INTERPRET": "1"})
    with sandbox_for(exercise) as own:
        report = run(own, exercise, source)
        assert report.passed, report


def test_failure_carries_its_finding(sandbox):
    def fails(t):
        """fails"""
        with pytest.raises(Failure):
            t.fail("own-slug", "says", got="this", expected="that")
        t.fail("own-slug", "says", got="this", expected="that")

    assert run(sandbox, make_exercise(fails), "x = 1").diagnoses == ("own-slug",)
