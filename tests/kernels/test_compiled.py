"""Every kernel, compiled for GPUs that are not here: it fits, it uses the tensor cores, and what spills is known."""

import subprocess
import sys

import pytest
import torch

from flashlib.kernels.inspect import ARCHITECTURES, inspect

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


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("arch, instruction", [("sm_90", "HGMMA"), ("sm_80", "HMMA")])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_portable_kernels_fit_and_use_the_tensor_cores(kernel, arch, instruction, head_dim):
    for report in inspect(kernel, arch=arch, head_dim=head_dim, causal=True):
        assert report.shared_memory <= ARCHITECTURES[arch]
        assert "serialized" not in report.warnings
        if report.tiles is not None:
            assert instruction in report.tensor_core_instructions


def test_fp32_is_not_computed_on_tensor_cores():
    """They would round the factors to 10 bits (TF32), and the name of the setting is ieee."""
    for report in (*inspect("forward", dtype=torch.float32), *inspect("backward", dtype=torch.float32)):
        assert not report.tensor_core_instructions


def test_what_cannot_be_inspected_is_named(monkeypatch):
    with pytest.raises(ValueError, match="kernel must be one of forward, hopper, backward; got 'sideways'"):
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
