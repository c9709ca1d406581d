"""What the long runs on a GPU rest on, checked without one: problems of a set share their kernels, and a crash costs one problem."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import decode_checks
from gpu.decode_checks import CacheSet
from gpu.feature_sets import FeatureSet
from gpu.in_sets import coverage, run_in_sets

from flashlib.launch import options as launching
from flashlib.launch.decode import DecodeOptions, decode_launches
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches, forward_launch
from flashlib.launch.start import Launch
from flashlib.measure.records.record import new_record

pytest.importorskip("triton")


def compiled_for(launches: list[Launch]) -> dict[str, str]:
    """What Triton would compile each kernel for: types, constants, and which integers are 1 or a multiple of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, found = make_backend(GPUTarget("cuda", 90, 32)), {}
    for launch in launches:
        kernel = launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, _ = bind(**launch.arguments, **launch.compile_options, debug=False)
        found[launch.name] = f"{specialization} {launch.compile_options}"
    return found


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().getrandbits(30)
    print(f"seed = {seed}")
    return seed


def test_problems_of_a_set_share_their_kernels_and_their_kind_of_mask(seed, monkeypatch):
    kinds = {
        launching.UNMASKED: {"none"},
        launching.BAND: {"left", "right", "both"},
        launching.INTERVALS: {"intervals"},
    }
    for number in range(seed, seed + 12):
        features, seen = FeatureSet.draw(number), {}
        for problem in (features.problem(at, "cpu") for at in range(number, number + 5)):
            options = KernelOptions.from_spec(problem.spec)
            assert features.mask in kinds[options.mask_kind], features
            if problem.spec.is_empty:
                continue
            first, out, lse = forward_launch(problem.q, problem.k, problem.v, options)
            launches = backward_launches(problem.q, problem.k, problem.v, out, lse, out, lse, options)[0]
            for name, variant in compiled_for([first, *launches]).items():
                assert seen.setdefault(name, variant) == variant, f"set {number}: {features}: {name}"


def test_caches_of_a_set_share_their_kernel(seed):
    for number in range(seed, seed + 12):
        features = CacheSet.draw(number)
        if (features.head_dim | features.v_head_dim) % 16:
            continue  # strides of such a cache depend on its room
        seen = {}
        for at in range(number, number + 5):
            call = features.problem(at, "cpu").call
            if features.page_size and call["k"].shape[2] == 1:
                continue
            left, right = call.get("window", (None, None))
            options = DecodeOptions(
                call["lengths"], call.get("block_table"), left, 0 if call["causal"] else right, 1.0, call.get("softcap", 0.0),
                num_splits=5, split_size=64 if features.fixed_size else None,
            )  # fmt: skip
            launches, _, _ = decode_launches(call["q"], call["k"], call["v"], options)
            for name, variant in compiled_for(launches).items():
                assert seen.setdefault(name, variant) == variant, f"set {number}: {features}: {name}"


def test_a_cache_holds_its_keys_in_its_pages_and_nothing_where_nobody_looks(seed):
    features = next(s for s in map(CacheSet.draw, range(seed, seed + 1000)) if s.page_size == 16 and not s.rows_first)
    problem = features.problem(seed, "cpu")
    table, pages = problem.call["block_table"], problem.call["k"]
    for request, length in enumerate(problem.lengths.tolist()):
        for key in range(length):
            page = pages[table[request, key // 16].item(), :, key % 16]
            assert torch.equal(page, problem.k[request, :, key])
    assert int(pages.isfinite().all(-1).all(1).sum()) == int(problem.lengths.sum())
    assert decode_checks.LONGEST["cuda"] == 128 * 1024


def draw(seed: int) -> str:
    return f"set {seed}"


def one(drawn: str, seed: int) -> dict:
    if seed % 10 == 3:
        os._exit(1)
    if seed % 10 == 5:
        raise ValueError("a bug")
    return {"passed": True, "message": None, "of_budget": {}, "kernels": {}, "seconds": [0.0, 0.0]}


def record_of(rows: list[dict], asked: int, **extra):
    return new_record("crashes", rows, ["masks.py"], **extra)


def test_a_process_that_dies_fails_the_problem_that_it_had_begun(tmp_path):
    record = run_in_sets(draw, one, record_of, count=9, seed=0, workers=2, out=tmp_path)
    rows = {row["seed"]: row for row in record.rows}
    assert list(rows) == [0, 1, 2, 3]
    assert rows[3]["message"] == "the process died in it" and not rows[3]["passed"] and rows[2]["passed"]
    record = run_in_sets(draw, one, record_of, count=2, seed=4, workers=1, out=tmp_path)
    assert [row["message"] for row in record.rows] == [None, "set 4: ValueError: a bug"]


def test_features_are_counted():
    assert coverage([{"mask": "none"}, {"mask": "left"}, {"mask": "none"}]) == {"mask": {"left": 1, "none": 2}}


def test_the_checks_of_serving_run_small_in_the_interpreter(seed, tmp_path):
    program = Path(__file__).with_name("serving_checks.py")
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), "--cases", "2", "--seed", str(seed), "--out", str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.endswith("all passed\n")
