"""Bad input to the functions of the library: what each is told. The tables of masks, partial, tiled and the front door are
beside their other tests; :func:`test_no_public_function_is_forgotten` holds all of them against the list of what is public.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from flashlib import AttentionSpec, FlashAttentionConfig, backends, measure, reference
from flashlib.config import TritonConfig, use_config
from flashlib.partial import merge_sinks
from flashlib.reference import ErrorBudget

TESTS = Path(__file__).parents[1]
Q = torch.randn(1, 2, 5, 8)
SPEC = AttentionSpec.from_tensors(Q, Q, Q)
WRONG_K = "k has head_dim 7 but q has head_dim 8"
NOT_A_TENSOR = "q must be a torch.Tensor; got list"


def inputs(tokens):
    return (torch.randn(1, 1, tokens, 8),) * 3


BAD = [
    (lambda: reference.oracle([1.0], Q, Q), TypeError, NOT_A_TENSOR),
    (lambda: reference.oracle(Q, Q[..., :7], Q), ValueError, WRONG_K),
    (lambda: reference.oracle(Q, Q, Q, casual=True), TypeError, "unexpected keyword argument 'casual'"),
    (lambda: reference.error_budget(Q, Q[..., :7], Q), ValueError, WRONG_K),
    (
        lambda: reference.check(Q[:, :, :4], None, Q, Q, Q),
        ValueError,
        "out has shape (1, 2, 4, 8); expected (1, 2, 5, 8)",
    ),
    (lambda: reference.check(Q, Q, Q, Q, Q), ValueError, "lse has shape (1, 2, 5, 8); expected (1, 2, 5)"),
    (lambda: reference.check(None, None, Q, Q, Q), TypeError, "out must be a torch.Tensor; got NoneType"),
    (lambda: reference.assert_within_budget(Q, [1.0], Q, Q), TypeError, NOT_A_TENSOR),
    (lambda: reference.oracle_gradients(Q, Q, Q, Q[..., :7]), ValueError, "grad_out has shape (1, 2, 5, 7); expected"),
    (
        lambda: reference.check_gradients((Q, Q), Q, Q, Q, Q),
        ValueError,
        "gradients must be (dq, dk, dv); got 2 of them",
    ),
    (
        lambda: reference.check_gradients((Q, Q, Q[:, :1]), Q, Q, Q, Q),
        ValueError,
        "dv has shape (1, 1, 5, 8); expected",
    ),
    (
        lambda: reference.assert_gradients_within_budget((Q, Q), Q, Q, Q, Q),
        ValueError,
        "gradients must be (dq, dk, dv)",
    ),
    (
        lambda: merge_sinks(Q, Q[..., 0], torch.zeros(3)),
        ValueError,
        "sinks has shape (3,); expected (2,), one score per query head",
    ),
    (lambda: backends.explain(Q), TypeError, "spec must be an AttentionSpec; got Tensor"),
    (lambda: backends.choose(Q), TypeError, "spec must be an AttentionSpec; got Tensor"),
    (
        lambda: backends.choose(SPEC, "quick"),
        ValueError,
        "backend: there is no backend 'quick'; backends are reference",
    ),
    (lambda: FlashAttentionConfig(backend="quick"), ValueError, "backend: there is no backend 'quick'"),
    (lambda: TritonConfig(fp32_precision="half"), ValueError, "must be one of ieee, tf32, tf32x3; got 'half'"),
    (lambda: use_config("tiled").__enter__(), TypeError, "config must be a FlashAttentionConfig; got str"),
    (
        lambda: measure.memory_wall(inputs, [], ["tiled"]),
        ValueError,
        "lengths must be one or more lengths of at least 1",
    ),
    (lambda: measure.memory_wall(inputs, [0, 8], ["tiled"]), ValueError, "of at least 1; got [0, 8]"),
    (lambda: measure.memory_wall(inputs, [8], ["quick"]), ValueError, "there is no backend 'quick'"),
    (lambda: measure.naive_steps([1.0], Q, Q), TypeError, NOT_A_TENSOR),
    (lambda: measure.time_call(3), TypeError, "call must be callable without arguments; got int"),
    (lambda: measure.load_record("h200/nothing"), FileNotFoundError, "there is no record 'h200/nothing'; there are: "),
    (lambda: measure.sources_hash(["nothing.py"]), FileNotFoundError, "nothing.py"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


PUBLIC = (
    "flashlib",
    "flashlib.backends",
    "flashlib.backends.pytorch",
    "flashlib.config",
    "flashlib.inference",
    "flashlib.masks",
    "flashlib.measure",
    "flashlib.partial",
    "flashlib.reference",
    "flashlib.tiled",
)
# They take no argument that a user could get wrong, or are what other functions return.
NOTHING_TO_GET_WRONG = {
    "Backend", "BackendUnavailableError", "CacheFullError", "Comparison", "ErrorBudget", "Explanation", "FA2Config",
    "FA3Config", "Intersection", "Mask", "MemoryLevel", "Preference", "Record", "ReferenceBackend", "RowIntervals", "Tile", "TiledBackend", "Timing",
    "Unmasked", "available", "check_values", "cpu_memory", "current_config", "matmul_flops_per_s",
    "save_record", "stream_bytes_per_s",
}  # fmt: skip


def test_no_public_function_is_forgotten():
    """Everything that a module of the library exports stands in some table of bad calls."""
    tables = "".join(
        re.sub(r"^(from|import) .*$|^\)", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for path in TESTS.rglob("test_*.py")
        if "pytest.raises" in path.read_text(encoding="utf-8")
    )
    public = set()
    for name in PUBLIC:
        module = importlib.import_module(name)
        exported = {key: getattr(module, key) for key in module.__all__}
        public |= {key for key, value in exported.items() if inspect.isfunction(value) or inspect.isclass(value)}
    assert public >= NOTHING_TO_GET_WRONG, NOTHING_TO_GET_WRONG - public
    forgotten = {name for name in public - NOTHING_TO_GET_WRONG if not re.search(rf"\b{name}\b", tables)}
    assert not forgotten


def test_a_budget_is_two_numbers():
    budget = reference.error_budget(Q, Q, Q)
    assert budget == ErrorBudget(out=budget.out, lse=budget.lse)
    assert 0 < budget.out < torch.finfo(torch.float16).eps  # the inputs are fp32
