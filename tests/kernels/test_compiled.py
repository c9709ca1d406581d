"""Every kernel, compiled for GPUs that are not here: it fits, it uses the tensor cores, and nothing spills."""

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from kernels.descriptors import lost_descriptors

from flashlib.launch.inspect import ARCHITECTURES, KernelReport, inspect
from flashlib.launch.options import checked_channels
from flashlib.launch.tiles import EXCEPTIONS, HOPPER, HOPPER_BACKWARD, HOPPER_BACKWARD_PAIRED, TABLE

WINDOW, CAUSAL = {"window": (256, 0)}, {"causal": True}
SOFTCAP, ALIBI, INTERVALS = {"softcap": 30.0}, {"alibi": True}, {"intervals": True}
MOST = INTERVALS | SOFTCAP | {"alibi_by_row": True}
FULL, FP16 = {}, {"dtype": torch.float16}

# What is compiled is fixed, since the same code gives the same registers: every tile there is, each under what asks most of it, and
# the problems that have spilled at some time. kernel, architecture, options of inspect.
HOPPER_CASES = [
    *[("hopper", {"head_dim": d, **features}) for d in (64, 128) for features in (FULL, CAUSAL, WINDOW, INTERVALS)],
    ("hopper", {"head_dim": 64, "tiles": HOPPER[64], **CAUSAL}),
    ("hopper", {"head_dim": 64, "only": "hopper_forward", **INTERVALS, **SOFTCAP, **ALIBI}),
    ("hopper", {"head_dim": 128, **WINDOW, **SOFTCAP}),
    ("hopper", {"head_dim": 128, "only": "hopper_forward", **INTERVALS, **ALIBI}),
    ("hopper", {"head_dim": 128, **WINDOW, **SOFTCAP, **ALIBI}),
    ("hopper", {"head_dim": 72, **WINDOW, **SOFTCAP}),
    *[
        ("hopper-backward", {"head_dim": 64, "only": "hopper_dkdv", "tiles": {"dkdv": tiles}, **features})
        for tiles in (HOPPER_BACKWARD[64], HOPPER_BACKWARD_PAIRED)
        for features in (FULL, CAUSAL, WINDOW, INTERVALS)
    ],
    *[
        ("hopper-backward", {"head_dim": 128, "only": "hopper_dkdv", **features})
        for features in (FULL, CAUSAL, WINDOW, INTERVALS, CAUSAL | FP16)
    ],
    *[
        ("hopper-backward", {"head_dim": d, "only": "hopper_dkdv", "in_parts": True, **features})
        for d in (64, 128)
        for features in (FULL, CAUSAL, WINDOW, INTERVALS, INTERVALS | SOFTCAP | ALIBI)
    ],
    ("hopper-backward", {"head_dim": 128, "only": "hopper_dkdv", **CAUSAL, **SOFTCAP, **ALIBI}),
    ("hopper-backward", {"head_dim": 128, "only": "hopper_dkdv", **INTERVALS, **SOFTCAP, **ALIBI}),
    *[("hopper-backward", {"head_dim": d, "only": "hopper_blank_rows", **INTERVALS}) for d in (64, 128)],
    *[("hopper-backward", {"head_dim": d, "only": "hopper_sum_parts", "in_parts": True}) for d in (64, 128)],
    *[
        ("hopper-backward", {"head_dim": d, "only": "hopper_dq", **features})
        for d in (64, 128)
        for features in (WINDOW, INTERVALS | SOFTCAP | ALIBI)
    ],
]


def exceptional(demand: str, major: int, kernel: str, head_dim: int) -> bool:
    return head_dim in EXCEPTIONS[demand].get(major, {}).get(kernel, {})


def dropout_cases() -> list[tuple[str, dict]]:
    """With dropout: up to head_dim 128 under what asks most of a kernel, and at 256 under a causal mask."""
    launches = {"forward": ("forward", {})} | {x: ("backward", {"only": f"backward_{x}"}) for x in ("dkdv", "dq")}
    return [
        (kernel, {"arch": arch, "head_dim": d, "dropout": True, **only, **(CAUSAL if d == 256 else MOST)})
        for arch in ("sm_80", "sm_90")
        for d in (64, 128, 256)
        for kernel, only in launches.values()
    ]


def portable_cases() -> list[tuple[str, dict]]:
    """Every tile of the tables."""
    cases = []
    for major, kernels in TABLE.items():
        for kernel, by_width in kernels.items():
            for head_dim in by_width:
                launch = ("forward", {}) if kernel == "forward" else ("backward", {"only": f"backward_{kernel}"})
                problems = [MOST]
                if exceptional("alibi_by_row", major, kernel, head_dim):
                    problems.append(INTERVALS | SOFTCAP | ALIBI)
                if exceptional("crowded", major, kernel, head_dim):
                    problems.append(WINDOW)
                cases += [
                    (launch[0], {"arch": f"sm_{major}0", "head_dim": head_dim, **launch[1], **features})
                    for features in problems
                ]
    return cases


PORTABLE_CASES = [
    *portable_cases(),
    ("backward", {"head_dim": 128, "dtype": torch.float16, **CAUSAL}),
    ("forward", {"arch": "sm_80", "head_dim": 128, "dtype": torch.float16, **CAUSAL}),
    ("forward", {"head_dim": 72, **WINDOW}),
    ("backward", {"head_dim": 72, "only": "backward_dkdv", **WINDOW}),
    ("backward", {"arch": "sm_80", "head_dim": 72, "only": "backward_dq", **MOST}),
    ("backward", {"head_dim": 100, "only": "backward_dkdv", **WINDOW}),
    ("backward", {"head_dim": 192, "only": "backward_dkdv", **WINDOW}),
    ("forward", {"head_dim": 200, **MOST}),
    ("forward", {"head_dim": 127, **WINDOW}),
    ("backward", {"head_dim": 59, "v_head_dim": 111, **WINDOW}),
    ("backward", {"head_dim": 192, "v_head_dim": 128, "only": "backward_dq", **MOST}),
]
DROPOUT_CASES = dropout_cases()
FP32_CASES = [
    *[(kernel, {"dtype": torch.float32, **WINDOW}) for kernel in ("forward", "backward")],
    ("backward", {"dtype": torch.float32, "head_dim": 40, "only": "backward_dq", **MOST}),
    ("backward", {"dtype": torch.float32, "head_dim": 128, "only": "backward_dq", **WINDOW}),
    ("backward", {"dtype": torch.float32, "head_dim": 256, "only": "backward_dkdv", **MOST}),
]


def named(case: tuple[str, dict]) -> str:
    return " ".join([case[0], *(f"{name}={value}" for name, value in case[1].items())])


@pytest.fixture(scope="module")
def compiled():
    """The reports of all cases, by name; two are compiled at a time."""
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    yield {
        named((kernel, options)): pool.submit(inspect, kernel, **options)
        for kernel, options in HOPPER_CASES + PORTABLE_CASES + DROPOUT_CASES + FP32_CASES
    }
    pool.shutdown(cancel_futures=True)


SERIALIZED = "products wait for one another"


def problems_of(report: KernelReport) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if report.spills:
        found.append(f"{report.spills} bytes spilled")
    # The tiles for sm_80 serve newer GPUs of that generation too, which have less shared memory.
    limit = ARCHITECTURES["sm_86" if report.arch == "sm_80" else report.arch]
    if report.shared_memory > limit:
        found.append(f"{report.shared_memory} bytes of shared memory, of {limit}")
    if "serialized" in report.warnings:
        found.append(SERIALIZED)
    if report.arch == "sm_90":
        found += map(str, lost_descriptors(report.sass))
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", HOPPER_CASES + PORTABLE_CASES, ids=named)
def test_a_kernel_fits_spills_nothing_and_uses_the_tensor_cores(compiled, case):
    for report in compiled[named(case)].result():
        assert not problems_of(report), f"{report.name}, {report.tiles}"
        if report.tiles is not None:  # those without tiles prepare things for the others
            instruction = {"sm_80": "HMMA", "sm_90": "HGMMA"}[report.arch]
            assert report.tensor_core_instructions.keys() == {instruction}, report.name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", DROPOUT_CASES, ids=named)
def test_a_kernel_with_dropout_fits_spills_nothing_and_uses_the_tensor_cores(compiled, case):
    """Its products may wait for one another: random numbers are drawn between them, and for sm_90 the assembler then gives up their overlap.

    Where it would not, in loops of one stage, no load overlaps with anything either.
    """
    for report in compiled[named(case)].result():
        assert not set(problems_of(report)) - {SERIALIZED}, f"{report.name}, {report.tiles}"
        instruction = {"sm_80": "HMMA", "sm_90": "HGMMA"}[report.arch]
        assert report.tensor_core_instructions.keys() == {instruction}, report.name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", FP32_CASES, ids=named)
def test_fp32_is_not_computed_on_tensor_cores(compiled, case):
    """They would round the factors to 10 bits (TF32), and the name of the setting is ieee."""
    for report in compiled[named(case)].result():
        assert not problems_of(report), f"{report.name}, {report.tiles}"
        assert not report.tensor_core_instructions


def test_channels_are_moved_together_only_where_every_row_allows_it():
    def channels(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    assert checked_channels(channels(1, 2, 5, 64)) == 0  # tiles as wide as the rows: nothing to check
    assert checked_channels(channels(1, 2, 5, 72)[..., :64]) == 8  # but Triton must be told that rows begin 72 apart
    assert checked_channels(channels(1, 2, 5, 72)) == 8
    assert checked_channels(channels(1, 2, 5, 72, dtype=torch.float32)) == 4
    assert checked_channels(channels(1, 2, 5, 100)) == 4
    assert checked_channels(channels(1, 2, 5, 33)) == 1
    assert (
        checked_channels(channels(1, 2, 5, 72), channels(1, 2, 5, 76)[..., :72]) == 4
    )  # the rows of one begin 76 apart
    assert checked_channels(channels(1, 2, 5, 74)[..., 2:]) == 2
    shifted = channels(1, 1, 5, 80)[..., 1:73]
    assert shifted.data_ptr() % 16 == 2 and checked_channels(shifted) == 1
    assert checked_channels(channels(3, 2, 1, 77)[..., :72][:1, :1]) == 8  # one row: nothing is stepped over


def test_what_cannot_be_inspected_is_named(monkeypatch):
    with pytest.raises(
        ValueError, match="kernel must be one of forward, hopper, backward, hopper-backward; got 'sideways'"
    ):
        inspect("sideways")
    with pytest.raises(ValueError, match="arch must be one of sm_80, .*; got 'sm_10'"):
        inspect(arch="sm_10")
    with pytest.raises(ValueError, match="only must be one of backward_delta, backward_dkdv, .*; got 'backward'"):
        inspect("backward", only="backward")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted in this process, not compiled"):
        inspect()


def test_the_command_prints_the_report_and_writes_the_code(tmp_path):
    arguments = ["inspect", "forward", "--head-dim", "64", "--out", str(tmp_path)]
    code = "from flashlib.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    assert "registers per thread" in done.stdout
    assert "HGMMA" in (tmp_path / "attention_forward_sm_90.sass").read_text()
