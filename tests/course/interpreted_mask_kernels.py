"""Chapter 08's looks into the forward kernel, for random masks. For run_interpreted.py."""

import random
import warnings

import torch

from flashlib.course import widgets
from flashlib.course.chapters import mask_kernels
from flashlib.launch.tiles import TileConfig
from flashlib.masks import Causal, Documents, KeyLengths, Prefix, Tile, Unmasked, Window
from flashlib.reference import check


def random_mask(rng: random.Random, n: int):
    return rng.choice(
        [
            Unmasked(),
            Causal(offset=rng.randint(-n, n)),
            Window(left=rng.randint(0, n), right=rng.randint(0, n)),
            KeyLengths([rng.randint(0, n)]),
            Prefix(rng.randint(0, n)),
            Documents.from_lengths([n // 3, n - n // 3]) & Causal(),
        ]
    )


def visits_cover_what_is_seen(rng: random.Random) -> None:
    for _ in range(20):
        n = rng.randint(1, 90)
        intervals = random_mask(rng, n).intervals(1, n, n)
        kinds = intervals.tile_map(16, 8)[0]
        for row, seen in zip(kinds.tolist(), mask_kernels.visits_of(intervals, 16, 8), strict=True):
            visited = [*seen.full, *seen.partial]
            assert len(visited) == len(set(visited))
            assert {n for n, kind in enumerate(row) if kind != Tile.SKIP} <= set(visited), (row, seen)
            assert all(row[n] == Tile.FULL for n in seen.full), (row, seen)
            assert all(seen.first <= 8 * n < seen.last for n in visited)


def poison_finds_what_is_not_skipped(rng: random.Random) -> None:
    n, tiles = 64, TileConfig(32, 16, 4, 1)
    q, k, v = torch.randn(3, 1, 1, n, 16)
    mask = random_mask(rng, n)
    comparison = check(*mask_kernels.forward(q, k, v, mask, tiles), q, k, v, mask=mask)
    assert comparison.passed, comparison.message
    noticed = mask_kernels.poisoned_blocks(q, k, v, mask, tiles)
    assert torch.equal(noticed, mask.intervals(1, n, n).tile_map(32, 16)[0] != Tile.SKIP), mask


def the_widget_shows_the_visits() -> None:
    told = widgets.visits_explorer(32).alt
    assert told.endswith("Block 1 of 2 visits full 1, then partial 0, 2, 3; K and V: 8 KiB of 8 KiB."), told


def main(rng: random.Random) -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter computes in NumPy, which warns of NaN
    visits_cover_what_is_seen(rng)
    for _ in range(4):
        poison_finds_what_is_not_skipped(rng)
    the_widget_shows_the_visits()
