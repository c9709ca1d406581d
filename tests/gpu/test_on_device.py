"""The Triton kernels on this machine's GPU: `make test-gpu`. Everywhere else these tests are left out, not skipped.

FLASHLIB_GPU_SPECS says how many random problems of each kind; FLASHLIB_GPU_RESULTS, where the records go.
"""

import os
import random
from pathlib import Path

import pytest
import torch
from gpu import decode_checks, device_checks, everyday_checks, serving_checks, varlen_checks

from flashlib.launch.start import interpreting

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", autouse=True)
def device():
    assert torch.cuda.is_available() or interpreting(), "these tests need a CUDA GPU, or TRITON_INTERPRET=1"


@pytest.fixture
def out(tmp_path) -> Path:
    return Path(os.environ.get("FLASHLIB_GPU_RESULTS") or tmp_path)


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().getrandbits(30)
    print(f"seed = {seed}")
    return seed


COUNT = int(os.environ.get("FLASHLIB_GPU_SPECS", "200"))
WORKERS = 1 if interpreting() else max(1, (os.cpu_count() or 1) - 2)


@pytest.mark.parametrize(
    "draw",
    [
        device_checks.random_specs,
        decode_checks.random_cases,
        varlen_checks.random_calls,
        serving_checks.random_cases,
    ],
)
def test_random_problems_are_within_the_budget(draw, out, seed):
    (row,) = draw(COUNT, seed, WORKERS, out).rows
    assert not row["failed"]
    assert row["run"] == COUNT


def test_results_are_bitwise_the_same_every_time(out, seed):
    rows = device_checks.determinism(3 if interpreting() else 100, out, seed).rows
    assert len(rows) == 8
    assert not [row for row in rows if row["differ"]]


def test_more_elements_than_32_bits_can_count(out, seed):
    (row,) = device_checks.beyond_32_bits(out, seed, tokens=1024 if interpreting() else None).rows
    assert row["passed"], row
    assert interpreting() or row["elements"] > 2**31


def test_packed_calls_are_replayed_with_other_lengths(out, seed):
    rows = everyday_checks.graphs(out, seed).rows
    assert len(rows) == 7
    assert not [row for row in rows if row["differ"]]


def test_every_way_of_use_works_or_is_refused(out):
    """The record of docs/everyday.md."""
    assert not [row for row in everyday_checks.ways(out).rows if row["outcome"] == "FAILS"]


@pytest.mark.parametrize("check", [everyday_checks.packs, everyday_checks.dropout])
def test_packs_to_the_bit_and_dropout(check, out, seed):
    (row,) = check(COUNT, seed, WORKERS, out).rows
    assert not row["failed"]
    assert row["run"] == COUNT


def test_cuda_graphs_replay_forward_and_backward_on_fresh_inputs(out, seed):
    rows = device_checks.graphs(out, seed).rows
    assert len(rows) == 10
    assert not [row for row in rows if row["differ"]]


def test_torch_compile_takes_it_whole_and_changes_no_bit(out, seed):
    assert all(row["same"] for row in device_checks.compiled(out, seed).rows)


def test_a_request_decodes_to_the_same_bits_in_every_batch_and_every_time(out, seed):
    rows = decode_checks.batch_invariance(out, seed, 4 if interpreting() else 64).rows
    rows += decode_checks.determinism(out, seed, 2 if interpreting() else 100).rows
    assert len(rows) == 9
    assert not [row for row in rows if row["differ"]]


def test_decoding_in_a_cuda_graph_follows_the_lengths(out, seed):
    assert not [row for row in decode_checks.graphs(out, seed).rows if row["differ"]]


def test_splits_are_merged_as_in_float64(out, seed):
    assert not decode_checks.combining(out, seed).rows[0]["failed"]
