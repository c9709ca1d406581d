"""No grid is larger than CUDA takes, however many sequences or requests there are."""

import pytest
import torch

from flashlib.launch.decode import (
    DecodeOptions,
    PackedSplits,
    combine_launch,
    combine_packed_launch,
    decode_launches,
)
from flashlib.launch.hopper import hopper_dkdv_launches, hopper_dq_launches, hopper_launches
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches, forward_launch
from flashlib.launch.start import Launch
from flashlib.masks import Causal, KeyLengths, Mask, Window
from flashlib.spec import AttentionSpec

BATCH = 70_000
MOST = (2**31 - 1, 65_535, 65_535)  # along each dimension of a grid; CUDA C++ Programming Guide, compute capabilities

pytest.importorskip("triton")


def expect_launchable(launches: list[Launch]) -> None:
    assert launches
    for launch in launches:
        for size, most in zip(launch.grid, MOST, strict=False):
            assert 0 < size <= most, f"{launch.name}: grid {launch.grid}"


def problem(mask: Mask, dtype: torch.dtype) -> tuple[list[torch.Tensor], KernelOptions]:
    """q, k and v of many sequences that lie in one place, and what the kernels must know of them."""
    q, k, v = (torch.zeros(1, heads, 8, 64, dtype=dtype).expand(BATCH, -1, -1, -1) for heads in (2, 1, 1))
    return [q, k, v], KernelOptions.from_spec(AttentionSpec.from_tensors(q, k, v, mask=mask))


@pytest.mark.parametrize(
    "mask", [Window(2, 1), Causal(), KeyLengths(torch.arange(BATCH) % 9)], ids=["band", "causal", "rows"]
)
def test_training(mask):
    (q, k, v), options = problem(mask, torch.float16)
    forward, out, lse = forward_launch(q, k, v, options)
    dkdv = lambda tensors, options, tiles: hopper_dkdv_launches(tensors, options)  # noqa: E731
    dq = lambda tensors, options, tiles: hopper_dq_launches(tensors, options)  # noqa: E731
    plain, _ = backward_launches(q, k, v, out, lse, out, None, options)
    hopper, _ = backward_launches(q, k, v, out, lse, out, None, options, dkdv=dkdv, dq=dq)
    warp_specialised, _, _ = hopper_launches(q, k, v, options)
    expect_launchable([forward, *plain, *warp_specialised, *hopper])
    names = {launch.name for launch in (*plain, *warp_specialised, *hopper)}
    prepared = {"backward_row_ranges", "hopper_prepare", "hopper_blank_rows"}
    assert prepared <= names if isinstance(mask, KeyLengths) else not prepared & names


@pytest.mark.parametrize("merge_in_kernel", [True, False])
@pytest.mark.parametrize("paged", [True, False])
def test_decoding(merge_in_kernel, paged):
    q = torch.zeros(1, 2, 1, 64, dtype=torch.float16).expand(BATCH, -1, -1, -1)
    k = torch.zeros(3 if paged else BATCH, 1, 16, 64, dtype=torch.float16)
    table = torch.zeros(BATCH, 2, dtype=torch.int32) if paged else None
    lengths = torch.full((BATCH,), 9)
    options = DecodeOptions(lengths, table, None, 0, 0.1, 0.0, num_splits=4, merge_in_kernel=merge_in_kernel)
    launches, out, lse = decode_launches(q, k, k, options)
    expect_launchable(launches)
    splits = [launch for launch in launches if launch.name == "decode_split"]
    assert sum(launch.grid[2] for launch in splits) == BATCH == len(out) == len(lse)
    begins = [launch.arguments["p_out"].storage_offset() // out.stride(0) for launch in splits]
    assert begins == [launch.arguments["p_lengths"].storage_offset() for launch in splits]
    assert begins[0] == 0 and all(
        later == begin + launch.grid[2] for begin, later, launch in zip(begins, begins[1:], splits, strict=False)
    )


def test_merging():
    out, lse = torch.zeros(2, BATCH, 2, 1, 16), torch.zeros(2, BATCH, 2, 1)
    packed = PackedSplits(out[0].flatten(0, 2)[None], lse[0].flatten()[None], 2, 1)
    launches = [combine_launch(out, lse, out[0], lse[0]), combine_packed_launch(packed, packed, out[0], lse[0], 1)]
    expect_launchable(launches)


def test_in_the_interpreter(in_the_interpreter):
    in_the_interpreter("large_batches")
