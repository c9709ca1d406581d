"""Every kernel, compiled for GPUs that are not here: it fits, it uses the tensor cores, and nothing spills."""

import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import torch

from flashlib.kernels.inspect import ARCHITECTURES, KernelReport, inspect
from flashlib.kernels.tiles import BY_ROW, CROWDED
from flashlib.measure import sources_hash
from flashlib.measure.bench import kernel_sources

ARCHS = ("sm_80", "sm_90")
FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (256, 0)},
    "intervals": {"intervals": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_hopper_kernel_fits_without_spills(head_dim, feature):
    (report,) = inspect("hopper", head_dim=head_dim, **FEATURES[feature])
    assert report.tensor_core_instructions.keys() == {"HGMMA"}
    assert report.shared_memory <= report.shared_memory_limit == 232_448
    assert "serialized" not in report.warnings
    assert report.spills == 0


@pytest.mark.parametrize(("head_dim", "feature", "parked"), [(64, "causal", 32), (128, "full", 0), (128, "causal", 32)])
def test_the_hopper_kernel_of_dk_and_dv_fits(head_dim, feature, parked):
    """Its loops spill nothing. Under a mask one or two addresses wait in memory until a loop has ended: ``parked`` bytes in all."""
    report = next(
        r for r in inspect("hopper-backward", head_dim=head_dim, **FEATURES[feature]) if r.name == "hopper_dkdv"
    )
    assert report.tensor_core_instructions.keys() == {"HGMMA"}
    assert report.shared_memory <= report.shared_memory_limit
    assert "serialized" not in report.warnings
    assert report.spills <= parked


# What asks for the most registers, and what does so while the problem does not yet count as crowded.
MOST = {"intervals": True, "softcap": 30.0, "alibi_by_row": True}
MOST_BY_HEAD = {"intervals": True, "softcap": 30.0, "alibi": True}
UNCROWDED = {"window": (256, 0)}
SAMPLES = 6


def fixed_cases() -> list[tuple[str, dict]]:
    """Every tile of the tables, each under what asks most of it."""
    cases = []
    for arch, kernel, head_dim in product(ARCHS, ("backward", "forward"), (64, 128, 256)):
        by_row, crowded = (
            head_dim in table[8 if arch == "sm_80" else 9].get("forward" if kernel == "forward" else "dkdv", {})
            for table in (BY_ROW, CROWDED)
        )
        for features in (MOST, *[MOST_BY_HEAD] * by_row, *[UNCROWDED] * crowded):
            cases.append((kernel, {"arch": arch, "head_dim": head_dim, **features}))
    return cases


def random_case(rng: random.Random) -> tuple[str, dict]:
    features = dict(rng.choice(list(FEATURES.values())))
    features |= {"softcap": 30.0} if rng.random() < 0.5 else {}
    features |= rng.choice(({}, {"alibi": True}, {"alibi_by_row": True}))
    dtype = rng.choice((torch.float16, torch.bfloat16))
    head_dim = rng.choice((64, 80, 96, 128, 256))
    kernel = rng.choice(("forward", "backward"))
    return kernel, {"arch": rng.choice(ARCHS), "dtype": dtype, "head_dim": head_dim, **features}


def problems_of(report: KernelReport, dtype: torch.dtype) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if report.spills:
        found.append(f"{report.spills} bytes spilled")
    # The tiles for sm_80 serve newer GPUs of that generation too, which have less shared memory.
    limit = ARCHITECTURES["sm_86" if report.arch == "sm_80" else report.arch]
    if report.shared_memory > limit:
        found.append(f"{report.shared_memory} bytes of shared memory, of {limit}")
    if "serialized" in report.warnings:
        found.append("products wait for one another")
    multiplies = report.tiles is not None and dtype != torch.float32
    if multiplies and {"sm_80": "HMMA", "sm_90": "HGMMA"}[report.arch] not in report.tensor_core_instructions:
        found.append(f"tensor cores: {report.tensor_core_instructions}")
    return found


@pytest.mark.timeout(900)
def test_the_portable_kernels_fit_spill_nothing_and_use_the_tensor_cores():
    """Every tile of the tables, and other cases, drawn anew when a kernel changes: what is found belongs to the change that made it."""
    rng = random.Random(sources_hash(kernel_sources()))
    cases = fixed_cases() + [random_case(rng) for _ in range(SAMPLES)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(inspect, kernel, **options) for kernel, options in cases]
        wrong = [
            f"{report.name}, {report.tiles}, {options}: {', '.join(found)}"
            for (_, options), job in zip(cases, jobs, strict=True)
            for report in job.result()
            if (found := problems_of(report, options.get("dtype", torch.bfloat16)))
        ]
    assert not wrong, "\n".join(wrong)


def test_fp32_is_not_computed_on_tensor_cores():
    """They would round the factors to 10 bits (TF32), and the name of the setting is ieee."""
    for report in (*inspect("forward", dtype=torch.float32), *inspect("backward", dtype=torch.float32)):
        assert not report.tensor_core_instructions
        assert report.spills == 0


def test_what_cannot_be_inspected_is_named(monkeypatch):
    with pytest.raises(
        ValueError, match="kernel must be one of forward, hopper, backward, hopper-backward; got 'sideways'"
    ):
        inspect("sideways")
    with pytest.raises(ValueError, match="arch must be one of sm_80, .*; got 'sm_10'"):
        inspect(arch="sm_10")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted in this process, not compiled"):
        inspect()


def test_the_command_prints_the_report_and_writes_the_code(tmp_path):
    arguments = ["inspect", "forward", "--head-dim", "64", "--out", str(tmp_path)]
    code = "from flashlib.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    assert "registers per thread" in done.stdout
    assert "HGMMA" in (tmp_path / "attention_forward_sm_90.sass").read_text()
