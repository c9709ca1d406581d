"""Pairs and tiles in closed form, against the dense mask of every kind."""

import pytest
import torch
from problems import random_mask

from flashlib import masks
from flashlib.cost.visible import Visible

PROBLEMS = 1000


def test_runs_equal_tile_classification(rng) -> None:
    """Any mask, combined in any way: pairs, rows and keys, and every kind of tile in both directions."""
    for _ in range(PROBLEMS):
        batch, q_len, kv_len = rng.choice((1, 2)), rng.randint(0, 40), rng.randint(0, 40)
        block_q, block_k = rng.randint(1, 17), rng.randint(1, 17)
        mask = random_mask(rng, batch, q_len, kv_len) or masks.Unmasked()
        if rng.random() < 0.3:
            mask &= masks.Causal()
        intervals = mask.intervals(batch, q_len, kv_len)
        for entry in range(intervals.start.shape[0]):
            visible = Visible.from_intervals(intervals.start[entry].tolist(), intervals.stop[entry].tolist(), kv_len)
            _same(visible, intervals.dense()[entry], block_q, block_k, mask)


def test_each_mask_from_its_own_numbers(rng) -> None:
    """Bands, packed sequences and prefixes, from lengths and widths alone: no row is looked at."""
    for _ in range(PROBLEMS):
        q_len, kv_len = rng.randint(0, 30), rng.randint(0, 30)
        left, right = (rng.choice((None, 0, 1, 4, 50)) for _ in range(2))
        offset = rng.choice((None, None, rng.randint(-40, 40)))
        kind = rng.choice(("band", "packed", "prefix"))
        if kind == "band":
            visible = Visible.band(q_len, kv_len, left=left, right=right, offset=offset)
            mask = masks.Window(left, right, offset)
        elif kind == "prefix":
            prefix = rng.randint(0, 40)
            visible, mask = Visible.prefix_lm(q_len, kv_len, prefix, offset=offset), masks.Prefix(prefix, offset)
        else:
            q_lens, kv_lens = ([rng.randint(0, 9) for _ in range(4)] for _ in range(2))
            visible = Visible.packed(q_lens, kv_lens, left=left, right=right)
            ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lens, kv_lens)]
            packed = masks.Varlen(*ends)
            q_len, kv_len = sum(q_lens), sum(kv_lens)
            mask = packed & masks.Window(left, right, packed.offset(q_len))
        dense = mask.intervals(1, q_len, kv_len).dense()[0]
        _same(visible, dense, rng.randint(1, 17), rng.randint(1, 17), (kind, left, right, offset, q_len, kv_len))


def _same(visible: Visible, dense: torch.Tensor, block_q: int, block_k: int, told) -> None:
    q_len, kv_len = dense.shape
    assert (visible.q_len, visible.kv_len) == (q_len, kv_len), told
    assert visible.pairs == int(dense.sum()), told
    assert visible.rows == int(dense.any(1).sum()), told
    assert visible.seen_keys == int(dense.any(0).sum()), told
    tiles = [list(rows.split(block_k, 1)) for rows in dense.split(block_q, 0)] if dense.numel() else []
    if not dense.numel():
        assert visible.area(block_q, block_k) == 0
        return
    some = torch.tensor([[bool(tile.any()) for tile in row] for row in tiles])
    every = torch.tensor([[bool(tile.all()) for tile in row] for row in tiles])
    assert [block.seen for block in visible.by_rows(block_q, block_k)] == some.sum(1).tolist(), told
    assert [block.full for block in visible.by_rows(block_q, block_k)] == every.sum(1).tolist(), told
    assert [block.hull for block in visible.by_rows(block_q, block_k)] == [_hull(row) for row in some], told
    assert [block.seen for block in visible.by_keys(block_q, block_k)] == some.sum(0).tolist(), told
    assert [block.hull for block in visible.by_keys(block_q, block_k)] == [_hull(column) for column in some.T], told
    assert visible.area(block_q, block_k) == sum(tile.numel() for row in tiles for tile in row if tile.any()), told


def _hull(seen: torch.Tensor) -> int:
    where = seen.nonzero().flatten().tolist()
    return where[-1] + 1 - where[0] if where else 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Visible.band(-1, 4), "q_len must be at least 0; got -1"),
        (lambda: Visible.band(4, 4, left=-2), "left must be at least 0; got -2"),
        (lambda: Visible.packed([3], [3, 4]), "kv_lens must be one for each of the 1 q_lens; got 2"),
        (lambda: Visible.packed([3, -1]), "q_lens must be at least 0; got -1"),
        (lambda: Visible.band(4, 4).by_rows(0, 4), "block_q must be at least 1; got 0"),
    ],
)
def test_bad_numbers_are_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_long_sequences_cost_as_many_steps_as_there_are_runs() -> None:
    """A mask of a million rows is a handful of runs, and its pairs are exact beyond what a float could hold."""
    length = 2**30
    causal = Visible.band(length, length, right=0)
    assert len(causal.runs) <= 2
    assert causal.pairs == length * (length + 1) // 2
    window = Visible.band(length, length, left=1023, right=0)
    assert len(window.runs) <= 3
    assert window.pairs == length * 1024 - 1024 * 1023 // 2
