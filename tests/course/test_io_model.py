"""The IO of attention on the two-level machine: the count, the machine that fits a tile, and what theorem 2 says of both."""

from functools import partial

import pytest
import torch

from flashlib.backends.pytorch import tiled_attention
from flashlib.course import figures
from flashlib.course.chapters.io_model import count_traffic, fit_exponent, standard_attention, tile_machine
from flashlib.measure.counting.meter import MADE_INSIDE
from flashlib.reference import assert_within_budget

f4 = 4


def one_head(n, d, dtype=torch.float32):
    return [torch.randn(1, 1, n, d).to(dtype) for _ in range(3)]


def on_its_machine(n, d, block_q, block_k, loop_order="q_outer", *, share=1.0):
    method = partial(tiled_attention, block_q=block_q, block_k=block_k, loop_order=loop_order)
    return count_traffic(method, *one_head(n, d), fast_memory=int(share * tile_machine(block_q, block_k, d)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standard_attention_is_attention(dtype):
    q, k, v = (torch.randn(2, 3, 70, 16).to(dtype) for _ in range(3))
    assert_within_budget(standard_attention(q, k, v), q, k, v)


def test_standard_attention_moves_four_score_matrices():
    n, d = 256, 16
    counted = count_traffic(standard_attention, *one_head(n, d), fast_memory=n * d)
    # S and P written and read once each; Q, K, V, O once, and the scaled Q written and read.
    assert counted.bytes == (4 * n * n + 6 * n * d) * f4
    assert counted.largest.elements == n * n


@pytest.mark.parametrize(
    "d, block_q, block_k", [(32, 32, 32), (64, 64, 64), (64, 32, 32), (64, 128, 64), (64, 192, 64)]
)
def test_the_machine_for_a_tile_does_not_spill_and_is_not_much_larger_than_needed(d, block_q, block_k):
    n = 4 * block_q
    counted = on_its_machine(n, d, block_q, block_k)
    assert counted.passes("q") == (1, 0) and counted.passes("k") == (4, 0) and counted.passes("v") == (4, 0)
    read, written = counted.passes(MADE_INSIDE)
    assert (
        read < 0.1 and 1 <= written + 0.3 <= 2.4
    )  # the output, and what of its tiles leaves before it is copied there
    assert on_its_machine(n, d, block_q, block_k, share=0.8).bytes > 1.2 * counted.bytes


def test_the_machine_is_twice_the_five_tiles_of_theory_where_they_are_square():
    assert tile_machine(32, 32, 64) == 2 * sum(figures.tile_bytes(64, 32, 32, f4).values())


def test_keys_outside_reads_keys_once_and_moves_more():
    n, d, block = 256, 32, 32
    rows_outside, keys_outside = (on_its_machine(n, d, block, block, order) for order in ("q_outer", "kv_outer"))
    assert keys_outside.passes("k") == keys_outside.passes("v") == (1, 0)
    assert keys_outside.passes("q") == (n // block, 0)
    read, written = keys_outside.passes(MADE_INSIDE)
    assert min(read, written) > n // block - 1  # the running output comes and goes with each block of keys
    assert keys_outside.bytes > 1.3 * rows_outside.bytes


def test_theorem_two():
    """Traffic is N^2 at fixed M and 1/M at fixed N, with a constant that hardly moves; the memory is linear in N."""
    over_n = [on_its_machine(n, 32, 32, 32) for n in (192, 384, 576)]
    tokens = [counted.tokens for counted in over_n]
    assert fit_exponent(tokens, [counted.bytes for counted in over_n]) == pytest.approx(2, abs=0.15)
    assert fit_exponent(tokens, [counted.peak_bytes for counted in over_n]) == pytest.approx(1, abs=0.4)
    over_m = [on_its_machine(192, 64, block, block) for block in (8, 12, 16)]
    memory = [counted.fast_memory for counted in over_m]
    assert memory[-1] < 192 * 64 * f4, "M <= N d, or everything fits"
    keys = [counted.read["k"] + counted.read["v"] for counted in over_m]  # Q and O move once whatever M is
    assert fit_exponent(memory, keys) == pytest.approx(-1, abs=0.05)
    assert all(15 < counted.constant < 30 for counted in over_n + over_m)


def test_constant_by_hand():
    counted = on_its_machine(256, 32, 32, 32)
    numbers, memory = counted.bytes / f4, counted.fast_memory / f4
    assert counted.constant == pytest.approx(numbers / (256**2 * 32**2 / memory))
    assert counted.operand_bytes == 256 * 32 * f4


def test_exponent_of_a_power_law():
    assert fit_exponent([1, 2, 5], [3, 12, 75]) == pytest.approx(2)


@pytest.mark.parametrize("shapes", [[(1, 2, 8, 4)] * 3, [(1, 1, 8, 4), (1, 1, 9, 4), (1, 1, 9, 4)]])
def test_more_than_one_head_or_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"one head of one shape, \[1, 1, N, D\]; got q \(1, "):
        count_traffic(standard_attention, *(torch.zeros(shape) for shape in shapes), fast_memory=100)
