"""`flashlib doctor` says of everything either that it is there, or why not and what to do."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashlib import backends, doctor
from flashlib.cli import app
from flashlib.course import weights
from flashlib.launch.cpu.library import library


def _doctor(*flags: str) -> str:
    result = CliRunner().invoke(app, ["doctor", *flags], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_each_backend_is_available_or_says_why_not() -> None:
    lines = _doctor().partition("Attention backends")[2].splitlines()
    for name, missing in backends.available().items():
        (line,) = (line for line in lines if re.search(rf"│ {name} +│", line))
        assert ("no" if missing else "available") in line and (missing or "") in line


def test_machine_is_described() -> None:
    text = _doctor()
    for part in ("Python", "CPU features", "Memory", "NVIDIA driver", "transformers", torch.__version__):
        assert part in text


def test_the_variant_of_the_cpu_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.available()["cpu"]:
        pytest.skip(backends.available()["cpu"])
    name = library().variant.name
    assert f"compiled for {name}" in _doctor()
    assert json.loads(_doctor("--json"))["cpu_kernels"] == name
    monkeypatch.setattr(doctor, "why_missing", lambda: "needs a C++ compiler")
    assert "none; see backend cpu below" in _doctor()


def test_json_holds_the_same() -> None:
    report = json.loads(_doctor("--json"))
    assert report["backends"] == backends.available()
    assert report["backends"]["tiled"] is None
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["flashlib"] is not None
    assert report["memory"] > 2**30 and report["logical_cores"] >= 1


def test_missing_weights_come_with_the_command_that_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLIB_CACHE", str(tmp_path))
    assert "not here; `flashlib weights` brings them" in _doctor()
    assert json.loads(_doctor("--json"))["weights"] is None

    monkeypatch.setattr(weights, "GGUF_SHA256", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    (tmp_path / weights.GGUF_NAME).touch()
    assert json.loads(_doctor("--json"))["weights"] == str(tmp_path / weights.GGUF_NAME)


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpus", lambda: (doctor.GPU("NVIDIA H200", "9.0", 150 * 2**30),))
    assert "NVIDIA H200, capability 9.0, 150.0 GiB" in _doctor()
    assert json.loads(_doctor("--json"))["gpus"] == [
        {"name": "NVIDIA H200", "capability": "9.0", "memory": 150 * 2**30}
    ]


def test_processor_features_are_those_that_pytorch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": "Test CPU", "neon": True, "sve": False, "i8mm": True}
    )
    report = doctor.examine(None)
    assert report.cpu == "Test CPU" and report.cpu_features == ("neon", "i8mm")
