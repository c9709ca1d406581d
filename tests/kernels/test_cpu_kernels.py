"""Our kernels for processors against the float64 oracle, each variant that this processor can run by itself.

A machine without a compiler skips them, and each test says so with the compiler's own words.
"""

import os
import random
import threading

import pytest
import torch
from decode_problems import random_decode_problem
from problems import Problem, random_problem

from flashlib import BackendUnavailableError, attention, masks
from flashlib.backends import BACKENDS
from flashlib.config import FlashAttentionConfig
from flashlib.inference.decode import decode_attention
from flashlib.launch.cpu import operators
from flashlib.launch.cpu.build import BuildError
from flashlib.launch.cpu.library import VARIANTS, Library, load
from flashlib.launch.cpu.operators import run_backward, run_forward
from flashlib.launch.operators import attention_backward, attention_forward
from flashlib.launch.options import KernelOptions
from flashlib.reference import assert_within_budget, check, check_gradients
from flashlib.spec import AttentionSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the sizes of vectors, panels and tiles, and some with several tiles; head_dims up to the most there may be.
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130, 200)
HEAD_DIMS = (1, 5, 8, 16, 40, 64, 72, 128, 200, 256)


def loaded(name: str) -> Library:
    try:
        return load(name)
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=VARIANTS)
def library(request) -> Library:
    return loaded(request.param)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def drawn(rng: random.Random, **choices) -> Problem:
    """A random problem with at least one score."""
    choices = {"dtypes": DTYPES, "lengths": LENGTHS, "head_dims": HEAD_DIMS, **choices}
    while True:
        problem = random_problem(rng, **choices)
        if not problem.spec.is_empty:
            return problem


def forward(problem: Problem, library: Library):
    return run_forward(problem.q, problem.k, problem.v, KernelOptions.from_spec(problem.spec), library)


def backward(problem: Problem, library: Library, out, lse, grad_out, grad_lse):
    options = KernelOptions.from_spec(problem.spec)
    return run_backward(problem.q, problem.k, problem.v, out, lse, grad_out, grad_lse, options, library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_problems(library, dtype, rng):
    """Every mask, GQA, ALiBi, softcap, lengths that differ, any strides; NaN and inf wherever no row looks."""
    for _ in range(14 if dtype == torch.float32 else 6):  # the best variant has 300 more in test_backends_agree
        problem = drawn(rng, dtypes=(dtype,))
        out, lse = forward(problem, library)
        comparison = check(out, lse, problem.q, problem.k, problem.v, **problem.options)
        assert comparison.passed, f"{problem}: {comparison.message}"
        grad_out = torch.randn(out.shape).to(dtype)
        grad_lse = torch.randn(lse.shape) if rng.random() < 0.5 else None
        gradients = backward(problem, library, out, lse, grad_out, grad_lse)
        comparison = check_gradients(gradients, problem.q, problem.k, problem.v, grad_out, grad_lse, **problem.options)
        assert comparison.passed, f"{problem}: {comparison.message}"


def test_keys_that_no_row_sees_between_keys_that_rows_see(library):
    """Hidden by a weight of 0 they would spoil the output: 0 * NaN is NaN."""
    rows = masks.Window(2, 0, offset=torch.tensor([[0, 0, 0, 20, 20, 20, 61, 61]]))
    q, k, v = (torch.randn(1, 2, length, 24) for length in (8, 80, 80))
    unseen = ~rows.intervals(1, 8, 80).seen_keys()[0]
    assert unseen[5:20].all() and not unseen[23:26].any()
    k[:, :, unseen], v[:, :, unseen] = float("nan"), float("inf")
    problem = Problem(q, k, v, {"mask": rows})
    out, lse = forward(problem, library)
    assert_within_budget(out, q, k, v, lse=lse, mask=rows)
    dq, dk, dv = backward(problem, library, out, lse, torch.randn_like(out), None)
    assert dq.isfinite().all() and (dk[:, :, unseen] == 0).all() and (dv[:, :, unseen] == 0).all()


def test_the_only_key_of_a_row_has_weight_one(library):
    q, k, v = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    diagonal = masks.Window(0, 0)
    out, lse = forward(Problem(q, k, v, {"mask": diagonal}), library)
    assert torch.equal(out, v)
    assert (lse == 0).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_very_large_and_very_negative_scores(library, size):
    q, k, v = (torch.randn(1, 2, length, 16) for length in (40, 150, 150))
    q, k = size * q.abs(), k.abs()
    problem = Problem(q, k, v, {})
    out, lse = forward(problem, library)
    assert_within_budget(out, q, k, v, lse=lse)
    grad_out = torch.randn_like(out)
    comparison = check_gradients(backward(problem, library, out, lse, grad_out, None), q, k, v, grad_out)
    assert comparison.passed, comparison.message


def test_rows_in_falling_and_in_rising_order_of_scores(library):
    """The largest score so far changes with every tile, or never again."""
    for order in (False, True):
        q = torch.ones(1, 1, 4, 8)
        k = torch.linspace(-30, 30, 300).sort(descending=order).values[None, None, :, None].expand(1, 1, 300, 8)
        v = torch.randn(1, 1, 300, 8)
        out, lse = forward(Problem(q, k, v, {}), library)
        assert_within_budget(out, q, k, v, lse=lse)


def test_sums_do_not_drift_from_tile_to_tile(library):
    """While the largest score stays what it is, what has been summed is multiplied by 1 exactly, tile after tile."""
    for largest in (0.7, 1.1, 1.9, 3.3):
        q, k, v = torch.ones(1, 1, 40, 16), torch.randn(1, 1, 12_000, 16) / 16, torch.randn(1, 1, 12_000, 8)
        k[:, :, 0] = largest
        out, lse = forward(Problem(q, k, v, {}), library)
        assert_within_budget(out, q, k, v, lse=lse)


def test_the_number_of_threads_changes_no_bit(library, rng):
    problems = [
        drawn(rng, dtypes=(torch.float32,), lengths=(1, 8, 100, 700, 1500), head_dims=(16, 64)) for _ in range(6)
    ]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([])
            for problem in problems:
                out, lse = forward(problem, library)
                results[-1] += [out, lse, *backward(problem, library, out, lse, torch.ones_like(out), None)]
    finally:
        torch.set_num_threads(before)
    for same in zip(*results, strict=True):
        assert all(torch.equal(x.nan_to_num(), same[0].nan_to_num()) for x in same[1:])


def test_several_threads_may_call_at_once(library, two_threads):
    q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    problem = Problem(q, k, v, {"causal": True})
    expected, wrong = forward(problem, library), []

    def call_again_and_again():
        for _ in range(250):
            out, lse = forward(problem, library)
            if not (torch.equal(out, expected[0]) and torch.equal(lse, expected[1])):
                wrong.append((out, lse))

    callers = [threading.Thread(target=call_again_and_again) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_process_goes_on(library, two_threads):
    """It has inherited none of the threads that the pool of its parent has."""
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    problem = Problem(q, k, v, {})
    expected = forward(problem, library)
    child = os.fork()
    if child == 0:
        try:
            again = [forward(problem, library) for _ in range(3)]
            os._exit(0 if all(torch.equal(out, expected[0]) for out, _ in again) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(forward(problem, library)[0], expected[0])


def test_decoding(library, rng, monkeypatch):
    """Ragged lengths, windows, contiguous and paged caches, splits of every kind; NaN in all that is not to be read."""
    monkeypatch.setattr(operators, "library", lambda: library)
    for _ in range(15):
        problem = random_decode_problem(rng, dtypes=DTYPES, capacities=(1, 2, 33, 64, 100, 300))
        result = decode_attention(problem.q, problem.k, problem.v, **problem.options, return_lse=True, backend="cpu")
        comparison = check(*result, *problem.oracle, **problem.oracle_options)
        assert comparison.passed, f"{problem}: {comparison.message}"


def test_long_caches_are_split_and_merged(library, monkeypatch, rng):
    """With few rows, many, and heads that share a panel; through attention, where no split is asked for, and through decoding."""
    monkeypatch.setattr(operators, "library", lambda: library)
    for q_len, heads in ((1, 3), (5, 4), (12, 3)):
        q, k, v = torch.randn(1, heads, q_len, 16), torch.randn(1, 1, 2500, 16), torch.randn(1, 1, 2500, 16)
        out, lse = attention(q, k, v, causal=True, return_lse=True, backend="cpu")
        assert_within_budget(out, q, k, v, lse=lse, causal=True)
        assert torch.equal(decode_attention(q, k, v, backend="cpu"), out)
        one_split = decode_attention(q, k, v, split_size=2500, backend="cpu")
        assert_within_budget(one_split, q, k, v, causal=True)
        assert not torch.equal(one_split, out)


@pytest.mark.parametrize("paged", [False, True])
def test_a_request_gives_the_same_bits_in_every_batch(library, monkeypatch, paged):
    monkeypatch.setattr(operators, "library", lambda: library)
    q, k, v = torch.randn(4, 4, 2, 16), torch.randn(4, 2, 96, 16), torch.randn(4, 2, 96, 16)
    lengths, table = torch.tensor([96, 3, 50, 77]), None
    if paged:
        table = torch.arange(4 * 6, dtype=torch.int32).view(4, 6)
        k, v = (x.unflatten(2, (6, 16)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v))

    def decode(some: slice):
        cache = (k, v) if paged else (k[some], v[some])
        options = {"lengths": lengths[some], "block_table": table[some] if paged else None, "split_size": 32}
        return decode_attention(q[some], *cache, **options, backend="cpu")

    whole = decode(slice(0, 4))
    for n in range(4):
        assert torch.equal(decode(slice(n, n + 1))[0], whole[n])


def test_pages_that_do_not_exist_are_refused(library, monkeypatch):
    monkeypatch.setattr(operators, "library", lambda: library)
    q, pages = torch.randn(2, 4, 1, 8), torch.randn(6, 2, 4, 8)
    table = torch.tensor([[0, 1], [2, 6]], dtype=torch.int32)
    for rows in (q, q.expand(-1, -1, 20, -1)):
        with pytest.raises(ValueError, match="block_table.* is page .*, but there are 6 pages"):
            decode_attention(rows, pages, pages, block_table=table, causal=False, backend="cpu")
    lengths = torch.tensor([8, 4])  # the entry that is wrong is not looked at
    assert decode_attention(q, pages, pages, block_table=table, lengths=lengths, backend="cpu").isfinite().all()


def options_of(q, k, v, **options) -> tuple:
    return (*AttentionSpec.from_tensors(q, k, v, **options).numbers(), "cpu")


@pytest.fixture
def runs() -> None:
    """For tests of what lies above the library, by whichever variant is best here."""
    missing = BACKENDS["cpu"].missing()
    if missing:
        pytest.skip(missing)


def test_the_operators_pass_pytorchs_own_checks(runs):
    q = torch.randn(2, 2, 9, 16, requires_grad=True)
    k = torch.randn(2, 1, 12, 16, requires_grad=True)
    v = torch.randn(2, 1, 12, 8, requires_grad=True)
    given = options_of(q, k, v, mask=masks.KeyLengths([5, 12]), softcap=2.0, alibi_slopes=torch.rand(2))
    torch.library.opcheck(attention_forward, (q, k, v, *given))
    inputs = [x.detach() for x in (q, k, v)]
    out, lse = attention_forward(*inputs, *given)
    torch.library.opcheck(attention_backward, (*inputs, out, lse, torch.randn_like(out), torch.randn_like(lse), *given))
    tokens_first = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert attention_forward(tokens_first, *inputs[1:], *given)[0].transpose(1, 2).is_contiguous()


def test_torch_compile_sees_one_graph(runs):
    def objective(q, k, v):
        out, lse = attention(q, k, v, causal=True, return_lse=True, backend="cpu")
        return (out.square().sum() + lse.sin().sum()) * 2

    inputs = [torch.randn(1, heads, length, 16, requires_grad=True) for heads, length in ((2, 9), (1, 12), (1, 12))]
    eager = objective(*inputs)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(eager, compiled)
    for ours, expected in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_it_does_not_take_is_said(runs):
    q = torch.randn(1, 1, 4, 8)
    for inputs, reason in (
        ([q.double()] * 3, "takes fp16, bf16 and fp32; got torch.float64"),
        ([torch.randn(1, 1, 4, 257)] * 3, "takes a head_dim of at most 256; got 257 and 257"),
        ([q.to("meta")] * 3, "the kernels run on the CPU; the tensors are on meta"),
    ):
        assert BACKENDS["cpu"].why_not(AttentionSpec.from_tensors(*inputs), FlashAttentionConfig()) == reason
    with pytest.raises(BackendUnavailableError, match="takes fp16, bf16 and fp32"):
        attention(q.double(), q.double(), q.double(), backend="cpu")
