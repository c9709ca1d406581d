"""The decoding kernels: in the interpreter on random problems, and compiled for GPUs that are not here."""

import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from flashlib.launch.decode import (
    DecodeOptions,
    PackedSplits,
    combine_launch,
    combine_packed_launch,
    decode_launches,
    decode_tiles,
)
from flashlib.launch.inspect import ARCHITECTURES, compile_launch

PROGRAM = Path(__file__).parent / "interpreted_decode.py"


def test_random_decoding_in_the_interpreter():
    seed = random.SystemRandom().getrandbits(40)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), "--seed", str(seed), "--problems", "12"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout == "12 problems within the budget\n"


def launch(capability=9, head_dim=128, q_len=1, page_size=0, dtype=torch.bfloat16, left=None, softcap=0.0, **splits):
    """A decoding step of 16 requests of 8k tokens, on tensors that have shapes only."""

    def tensor(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, capacity = 16, 8192
    cache = tensor(batch, 8, capacity, head_dim)
    table = None
    if page_size:
        pages = capacity // page_size
        cache, table = tensor(batch * pages, 8, page_size, head_dim), tensor(batch, pages, dtype=torch.int32)
    options = DecodeOptions(tensor(batch, dtype=torch.int32), table, left, 0, head_dim**-0.5, softcap, 4, **splits)
    tiles = decode_tiles(4 * q_len, dtype, head_dim, capability)
    return decode_launches(tensor(batch, 32, q_len, head_dim), cache, cache, options, tiles=tiles)[0][0]


PROBLEMS = {
    "contiguous": {},
    "pages of 1": {"page_size": 1},
    "pages of 16": {"page_size": 16},
    "pages of 128, window, softcap": {"page_size": 128, "left": 1000, "softcap": 30.0},
    "head_dim 64": {"head_dim": 64},
    "head_dim 256": {"head_dim": 256},
    "16 tokens": {"q_len": 16},
}


@pytest.mark.parametrize(
    "problem, arch, instruction, tightest",
    [(problem, "sm_90", "HGMMA", "sm_90") for problem in PROBLEMS]
    + [(problem, "sm_80", "HMMA", "sm_86") for problem in ("contiguous", "pages of 16", "16 tokens")],
)
def test_decoding_fits_and_uses_the_tensor_cores(problem, arch, instruction, tightest):
    """``tightest`` has the least shared memory of the GPUs that use the same tiles."""
    shared_memory = ARCHITECTURES[tightest]
    report = compile_launch(launch(capability=int(arch[3]), **PROBLEMS[problem]), arch)
    # For sm_80 the assembler gives up a value of the widest case to fit three programs on a multiprocessor.
    assert report.spills <= (8 if (arch, problem) == ("sm_80", "16 tokens") else 0)
    assert "serialized" not in report.warnings
    assert report.tensor_core_instructions.keys() == {instruction}
    assert report.instructions["LDGSTS"] > 0  # K and V arrive while others are worked on
    # Memory is fast only for those who ask for much at once: all stages but the one that is worked on are on their way.
    programs = min(shared_memory // (report.shared_memory + 1024), 65536 // (32 * report.num_warps * report.registers))
    head_dim = PROBLEMS[problem].get("head_dim", 128)
    on_the_way = programs * (report.tiles.num_stages - 1) * report.tiles.block_n * 2 * head_dim * 2
    assert on_the_way >= (131_072 if arch == "sm_90" else 65_536)


@pytest.mark.parametrize("head_dim, q_len", [(72, 16), (200, 1)])
def test_decoding_spills_nothing_where_the_ends_of_rows_are_checked(head_dim, q_len):
    report = compile_launch(launch(head_dim=head_dim, q_len=q_len, page_size=16, left=1000, softcap=30.0), "sm_90")
    assert report.spills == 0
    assert report.instructions["LDGSTS"] > 0


def test_fp32_is_not_decoded_on_tensor_cores():
    report = compile_launch(launch(dtype=torch.float32), "sm_90")
    assert report.spills == 0 and not report.tensor_core_instructions


def combined():
    """Splits of a step, merged by a kernel of its own."""
    partial_out, partial_lse = torch.empty(8, 2, 32, 1, 128, device="meta"), torch.empty(8, 2, 32, 1, device="meta")
    out = torch.empty(2, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    return combine_launch(partial_out, partial_lse, out, partial_lse[0])


def combined_packed(head_dim):
    """Those of a shared prefix, and those of what follows it."""

    def splits(count, request, head):
        out = torch.empty(count, 2048, head_dim, dtype=torch.bfloat16, device="meta")
        return PackedSplits(out, torch.empty(count, 2048, device="meta"), request, head)

    out, lse = (
        torch.empty(64, 32, 1, head_dim, dtype=torch.bfloat16, device="meta"),
        torch.empty(64, 32, 1, device="meta"),
    )
    return combine_packed_launch(splits(8, 4, 256), splits(1, 32, 4), out, lse, kv_heads=8)


MERGES = {"combine": combined} | {f"combine packed, head_dim {d}": partial(combined_packed, d) for d in (64, 256)}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merging_spills_nothing(merge):
    assert compile_launch(merge(), "sm_90").spills == 0
