"""A bound at or beyond the lengths is no limit, and no sum of large integers wraps around."""

import sys

import pytest
import torch
from everyday.large_windows import (
    FITTING,
    LARGE,
    decoding_holds,
    flash_attn_holds,
    masks_hold,
    random_mask,
    visible,
)

from flashlib import attention, masks


def test_masks_are_exact(rng):
    for _ in range(400):
        batch, q_len, kv_len = rng.randint(1, 2), rng.randint(1, 6), rng.randint(0, 6)
        mask = random_mask(rng, batch, q_len)
        held = mask.intervals(batch, q_len, kv_len).dense().expand(batch, -1, -1)
        expected = visible(mask, batch, q_len, kv_len).view(batch, q_len, kv_len)
        assert torch.equal(held, expected), f"{mask}, {q_len} queries, {kv_len} keys"


@pytest.mark.parametrize("width", LARGE)
def test_a_window_beyond_all_lengths_is_a_plain_band_without_that_limit(width):
    limit = None if width >= masks.NO_LIMIT else width
    assert masks.Window(width, width).band() == (limit, limit)
    assert (masks.Window(width, 3) & masks.Window(2, width)).band() == (2, 3)


@pytest.mark.parametrize("backend", ["reference", "tiled", "torch_sdpa_math", "torch_sdpa_flash"])
def test_backends(backend, rng):
    masks_hold(backend, rng, 24)


def test_the_call_that_hid_everything():
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    expected = attention(q, k, v, mask=masks.Window(left=1))
    torch.testing.assert_close(attention(q, k, v, mask=masks.Window(left=1, right=sys.maxsize)), expected)


def test_packed_sequences(rng):
    for _ in range(50):
        packed = masks.Varlen([0, 2, 2, 5], [0, 3, 4, 8])
        left, right = rng.choice(LARGE), rng.choice((0, *LARGE))
        mask = packed & masks.Window(left, right, packed.offset(6))
        expected = packed if right else packed & masks.Causal(packed.offset(6))
        assert torch.equal(mask.intervals(1, 6, 9).dense(), expected.intervals(1, 6, 9).dense())
    with pytest.raises(ValueError, match="must never fall"):
        masks.Varlen(torch.tensor([0, FITTING[-1], -2]))


def test_alibi_far_from_all_keys_is_the_same_wherever_that_is(rng):
    """Its distances grow by one from key to key, however far the row is: the weights do not depend on it."""
    q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
    near = attention(q, k, v, alibi_slopes=torch.tensor([0.5, 0.25]), mask=masks.Window(offset=4))
    for offset in (100, -100):
        sign = 1 if offset > 0 else -1
        slopes = torch.tensor([0.5, 0.25]) * sign
        out = attention(q, k, v, alibi_slopes=slopes, mask=masks.Window(offset=offset))
        torch.testing.assert_close(out, near)
    assert masks.Window(offset=2**70).row_offsets(1, 4, 4, "cpu").tolist() == [[masks.NO_LIMIT]]
    assert masks.Window(offset=torch.tensor([-(2**62)])).row_offsets(1, 4, 4, "cpu").tolist() == [[-masks.NO_LIMIT]]


def test_decoding(rng):
    decoding_holds("torch", rng, 30)


def test_flash_attn_functions(rng):
    flash_attn_holds(rng, 30)


def test_in_the_interpreter(in_the_interpreter):
    in_the_interpreter("large_windows")
