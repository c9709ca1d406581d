"""Starting a kernel."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flashlib.launch import hopper, packets
from flashlib.launch.hopper import (
    HOPPER_CACHE,
    MOST_PART_WAVES,
    MOST_PARTS,
    group_parts,
    heads_together,
    hopper_dkdv_launches,
    hopper_dkdv_tiles,
    hopper_dq_launches,
)
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches
from flashlib.launch.start import Launch
from flashlib.launch.tiles import (
    HOPPER_BACKWARD,
    HOPPER_BACKWARD_PAIRED,
    HOPPER_BACKWARD_ROOMY,
    HOPPER_DQ,
    TileConfig,
)
from flashlib.spec import AttentionSpec


class Recorder:
    """In place of a kernel: notes what it is started with, and which tensor's device was current then."""

    def __init__(self, monkeypatch):
        self.current, self.started = None, []
        monkeypatch.setattr(torch.cuda, "device_of", self.device_of)

    def device_of(self, tensor):
        recorder = self

        class Guard:
            def __enter__(self):
                recorder.current = tensor

            def __exit__(self, *_):
                recorder.current = None

        return Guard()

    def __getitem__(self, grid):
        return lambda **arguments: self.started.append((grid, self.current, arguments))


def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch):
    """A tensor on cuda:1 while cuda:0 is current would otherwise be an illegal memory access."""
    kernel, tensor = Recorder(monkeypatch), torch.zeros(3)
    Launch(kernel, (4,), {"p_start": None, "scale": 0.5, "p_q": tensor}).start()
    Launch(kernel, (2,), {"desc_q": SimpleNamespace(base=tensor), "left": 0}).start()
    assert [(grid, current is tensor) for grid, current, _ in kernel.started] == [((4,), True), ((2,), True)]
    assert kernel.started[0][2]["p_q"] is tensor


def test_an_empty_grid_starts_nothing(monkeypatch):
    kernel = Recorder(monkeypatch)
    Launch(kernel, (0, 3), {"p_q": torch.zeros(0)}).start()
    assert kernel.started == []


def test_groups_of_heads_are_large_enough_and_the_last_one_is_no_small_rest():
    rng = random.Random()
    for _ in range(1000):
        heads, row_blocks, spread = rng.randint(1, 300), rng.randint(1, 128), rng.choice((0, 3.5))
        kilobytes = rng.randint(1, 20_000)
        together = heads_together(heads, row_blocks, 132, kilobytes * 1024, spread)
        problem = f"{heads} heads of {row_blocks} blocks and {kilobytes} KiB, spread {spread}: {together} together"
        assert 1 <= together <= heads, problem
        last = heads % together or together
        assert together == heads or last * row_blocks >= spread * 132, problem
        assert together == heads or (last + 1) * kilobytes * 1024 > HOPPER_CACHE, problem


def hopper_backward(batch, q_heads, kv_heads, length, head_dim, causal, **dkdv):
    """By name, the launches of a backward on a Hopper GPU with 132 multiprocessors, which need not be there."""
    shapes = ((batch, heads, length, head_dim) for heads in (q_heads, kv_heads, kv_heads, q_heads))
    q, k, v, out = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    lse = torch.empty(batch, q_heads, length, device="meta")
    options = KernelOptions.from_spec(AttentionSpec.from_tensors(q, k, v, causal=causal))
    launches, _ = backward_launches(
        q, k, v, out, lse, out, None, options,
        dkdv=lambda tensors, options, _: hopper_dkdv_launches(tensors, options, **dkdv),
        dq=lambda tensors, options, _: hopper_dq_launches(tensors, options),
    )  # fmt: skip
    return {launch.name: launch for launch in launches}


def test_heads_go_together_in_the_backward_where_blocks_have_unequal_work():
    for causal in (True, False):
        launches = hopper_backward(16, 12, 12, 1024, 64, causal)
        for name in ("hopper_dkdv", "hopper_dq"):
            together, programs = launches[name].arguments["heads_together"], launches[name].grid[0]
            blocks = programs // (16 * 12)
            # Two waves of programs at least, and not so many heads that each tile is read from memory again by every program.
            assert 2 * 132 <= blocks * together < 4 * 132 if causal else together == 1


def test_two_programs_share_a_multiprocessor_where_that_was_faster():
    """At head_dim 64 dQ always, and dK and dV where rows see few keys; at 128 dK and dV where their heads are not cut into parts."""
    for problem, dkdv, dq in (
        ((16, 12, 12, 1024, 64, True), HOPPER_BACKWARD_PAIRED, HOPPER_DQ[64]),
        ((16, 12, 12, 1024, 64, False), HOPPER_BACKWARD[64], HOPPER_DQ[64]),
        ((4, 32, 32, 4096, 64, True), HOPPER_BACKWARD[64], HOPPER_DQ[64]),
        ((1, 32, 8, 8192, 128, True), HOPPER_BACKWARD_PAIRED, HOPPER_DQ[128]),
        ((1, 64, 8, 4096, 128, True), HOPPER_BACKWARD_PAIRED, HOPPER_DQ[128]),
        ((1, 32, 8, 2048, 128, False), HOPPER_BACKWARD_PAIRED, HOPPER_DQ[128]),
        ((1, 32, 8, 2048, 128, True), HOPPER_BACKWARD[128], HOPPER_DQ[128]),
    ):
        launches = hopper_backward(*problem)
        assert launches["hopper_dkdv"].tiles == dkdv and launches["hopper_dq"].tiles == dq, problem
        for launch in (launches["hopper_dkdv"], launches["hopper_dq"]):
            paired = launch.arguments["CONSUMERS"] == 1
            assert launch.compile_options.get("maxnreg") == (128 if paired else None)
    softcapped = KernelOptions(None, None, None, 0, None, None, 0.1, 30.0)
    for width, tiles in HOPPER_BACKWARD_ROOMY.items():
        assert hopper_dkdv_tiles(width, 100, softcapped, in_parts=False) == tiles


def test_a_group_is_cut_into_parts_where_one_program_would_be_waited_for():
    for length, blocks in ((1024, 8), (2048, 16)):
        of_a_layer = hopper_backward(1, 32, 8, length, 128, True)
        parts = of_a_layer["hopper_dkdv"].arguments["parts"]
        assert parts > 1 and of_a_layer["hopper_dkdv"].grid == (blocks * 8 * parts,)
        assert of_a_layer["hopper_dkdv"].arguments["group_size"] * parts == 4
        assert of_a_layer["hopper_sum_parts"].arguments["parts"] == parts
        assert of_a_layer["hopper_sum_parts"].arguments["p_dk_parts"].shape == (1, 8 * parts, length, 128)
    for problem in (
        (1, 32, 8, 8192, 128, True),
        (1, 64, 8, 4096, 128, True),
        (1, 32, 8, 2048, 128, False),
        (16, 12, 12, 1024, 64, True),
    ):
        launches = hopper_backward(*problem)
        assert "hopper_sum_parts" not in launches, problem
        arguments = launches["hopper_dkdv"].arguments
        assert arguments["p_dk_parts"] is None and not arguments["IN_PARTS"]


def test_parts_share_the_heads_of_a_group_evenly():
    rng = random.Random()
    for _ in range(1000):
        q_len, kv_len, heads = rng.randint(1, 9000), rng.randint(1, 9000), rng.randint(1, 300)
        group_size, width = rng.randint(1, 64), rng.choice((64, 128))
        left, right = rng.choice((None, 0, 1000)), rng.choice((None, 0, 50))
        options = KernelOptions(None, None, left, right, None, None, 0.1, 0.0)
        parts = group_parts(q_len, kv_len, heads, group_size, 2 * width, HOPPER_BACKWARD[width], 132, options)
        problem = f"{q_len} rows, {kv_len} keys, {heads} heads of {group_size}, {left}, {right}: {parts}"
        assert 1 <= parts <= MOST_PARTS and group_size % parts == 0, problem
        blocks = -(-kv_len // HOPPER_BACKWARD[width].block_n) * heads
        assert parts == 1 or blocks * parts <= MOST_PART_WAVES * 132, problem


def test_what_is_compiled_with_other_options_is_another_kernel(monkeypatch):
    """Two launches that differ in tiles alone, as where a kernel is started with fewer registers, must not share machine code."""
    compiled = []
    monkeypatch.setattr(packets, "_codes", {})
    monkeypatch.setattr(packets, "compile_code", lambda launch: compiled.append(launch.compile_options) or object())
    monkeypatch.setattr(packets, "_roles", lambda kernel: ())
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    paired = HOPPER_DQ[64]
    tiles = [paired, replace(paired, maxnreg=None), replace(paired, num_warps=8), TileConfig(64, 64, 4, 3)]
    for one in [*tiles, *tiles]:
        packets._compiled(Launch("kernel", (1,), {"p_q": on_gpu}, one))
    assert len(compiled) == len(tiles)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_a_pack_are_added_up_alike_whatever_else_is_in_it(head_dim):
    """Tiles and parts decide in which order gradients are added up. Under row intervals they must not depend on how long the pack is."""
    found = set()
    for tokens in (100, 700, 900, 2048, 5000, 40_000):
        rows = torch.zeros(1, tokens, dtype=torch.int32)
        options = KernelOptions(rows, rows, None, None, None, None, 1.0, 0.0)
        wide = hopper.HOPPER_BACKWARD[head_dim]
        parts = hopper.group_parts(tokens, tokens, 1, 8, 2 * head_dim, wide, 132, options)
        keys = hopper.keys_per_row(tokens, tokens, options)
        found.add((parts, hopper.hopper_dkdv_tiles(head_dim, keys, options, in_parts=parts > 1)))
    assert len(found) == 1
    dense = KernelOptions(None, None, None, 0, None, None, 1.0, 0.0)
    assert hopper.group_parts(2048, 2048, 8, 4, 256, hopper.HOPPER_BACKWARD[128], 132, dense) > 1
