"""The data of known devices, and which of them this machine is."""

import pytest

from flashlib.cost.devices import device, device_names, named, this_machine


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_title(title: str, name: str) -> None:
    assert named(title) is device(name)


def test_a_gpu_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this GPU is not known: NVIDIA A10; known are h200"):
        named("NVIDIA A10")


@pytest.mark.parametrize("name", device_names())
def test_data_are_whole_and_plausible(name: str) -> None:
    """Every device says where its figures come from, and they fit each other."""
    found = device(name)
    assert found.source and found.kind in ("gpu", "cpu")
    assert found.memory_bytes > found.cache_bytes > found.local_bytes > 0
    for dtype in found.flops_per_s:
        assert 0 < found.sustained(dtype) <= found.peak(dtype)
    assert 0 < found.read_bytes_per_s <= found.bytes_per_s
    # FLOPs for each byte at the ridge: neither a GPU nor a CPU is orders of magnitude off these.
    assert 3 < found.peak("fp32") / found.bytes_per_s < 150
    if found.kind == "gpu":
        # A tensor core's peak is a whole number of multiply-adds a clock and multiprocessor, to within what data sheets round.
        each = found.peak("bf16") / (2 * found.units * found.clock_hz)
        assert min(abs(each / size - 1) for size in (256, 512, 1024, 2048)) < 0.02, each
    if found.measured:
        assert found.measured["source"]


def test_a_dtype_that_a_device_does_not_multiply_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of bf16, fp16, int8, fp32 on NVIDIA A100"):
        device("a100").peak("fp8")


def test_this_machine_is_measured() -> None:
    found = this_machine()
    assert found.measured["source"] == "measured here"
    assert found.sustained("bf16") > 1e8 and found.read_bytes_per_s > 1e7
