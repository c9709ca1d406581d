"""What ``hopper_prepare`` and ``hopper_blank_rows`` look up in row intervals, against the mask itself, in Triton's interpreter. The kernels
that they prepare for run on Hopper GPUs alone; what they are told can be checked anywhere.

TRITON_INTERPRET=1 python tests/kernels/prepared.py --seed 0 --problems 20
"""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import random_mask
from seeds import seeds_asked_for

from flashlib.launch import hopper as hopper_launch
from flashlib.launch.options import KernelOptions
from flashlib.launch.tiles import HopperTiles
from flashlib.masks import Tile
from flashlib.spec import AttentionSpec

LENGTHS = (1, 17, 64, 70, 150, 260)


def run_one(seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, q_len, kv_len = rng.choice((1, 3)), rng.choice((1, 2)), rng.choice(LENGTHS), rng.choice(LENGTHS)
    q, k = torch.zeros(batch, 2 * kv_heads, q_len, 16), torch.zeros(batch, kv_heads, kv_len, 16)
    v = torch.randn(batch, kv_len, kv_heads, rng.choice((16, 24, 40)), generator=generator).transpose(1, 2)
    mask = None
    while mask is None or mask.band() is not None:
        mask = random_mask(rng, batch, q_len, kv_len)
    spec = AttentionSpec.from_tensors(q, k, v, mask=mask)
    options, intervals = KernelOptions.from_spec(spec), spec.intervals
    seen = intervals.seen_keys()
    poisoned = v.masked_fill(~seen[:, None, :, None].expand(batch, -1, -1, -1), float("nan"))
    hopper_launch.PREPARE_CHUNK = rng.choice((16, 32, 64))
    tiles = HopperTiles(consumers=rng.choice((1, 3)), block_n=rng.choice((32, 64)), num_stages=2, registers=240)
    launch, prepared = hopper_launch.prepare_launch(poisoned, options, q_len, tiles)
    prepared["blanked"].fill_(float("nan"))
    launch.start()
    check_tiles(prepared["tiles"], intervals, tiles, f"seed {seed}: {mask}")
    check_blanked(prepared, seen, v, tiles.block_n, f"seed {seed}: {mask}")
    check_blank_rows(spec, options, rng.choice((16, 64)), generator, f"seed {seed}: {mask}")


def check_tiles(told, intervals, tiles: HopperTiles, problem: str) -> None:
    """Each block of rows once, and of its keys: skipped ones are hidden, full ones are seen by all rows, the rest is masked. The same
    for the rows of each consumer, whose tiles are among those of the block; beyond the last row they may be any of them."""
    kinds, kinds_of_groups = intervals.tile_map(tiles.block_m, tiles.block_n), intervals.tile_map(64, tiles.block_n)
    assert told.shape == (*kinds.shape[:2], 5 + 4 * tiles.consumers), problem
    for entry, entry_of_groups, blocks in zip(kinds, kinds_of_groups, told, strict=True):
        assert sorted(blocks[:, 0].tolist()) == list(range(len(entry))), problem
        for i_m, first, n_tiles, *numbers in blocks.tolist():
            check_range(entry[i_m], first, n_tiles, *numbers[:2], problem)
            for consumer in range(tiles.consumers):
                own_first, own_tiles, *own = numbers[2 + 4 * consumer : 6 + 4 * consumer]
                assert first <= own_first and own_first + own_tiles <= first + n_tiles, problem
                group = i_m * tiles.consumers + consumer
                hidden = torch.full(entry.shape[1:], Tile.SKIP)
                row = entry_of_groups[group] if group < len(entry_of_groups) else hidden
                check_range(row, own_first, own_tiles, *own, problem)


def check_range(row, first: int, n_tiles: int, right_partial: int, full: int, problem: str) -> None:
    assert n_tiles >= 1 and right_partial >= 0 and full >= 0 and right_partial + full <= n_tiles, problem
    assert full > 0 or right_partial == n_tiles, problem
    last = first + n_tiles
    outside = torch.ones(len(row), dtype=torch.bool)
    outside[first:last] = False
    assert (row[outside] == Tile.SKIP).all(), problem
    assert (row[last - right_partial - full : last - right_partial] == Tile.FULL).all(), problem


def check_blanked(prepared, seen, v, block_n: int, problem: str) -> None:
    """Tiles in which a key is seen by no row are flagged, and only they are copied, with 0 for such keys."""
    for entry, (keys, flags) in enumerate(zip(seen, prepared["flags"], strict=True)):
        requests = slice(None) if len(seen) == 1 else slice(entry, entry + 1)
        for tile, flag in enumerate(flags.tolist()):
            some = slice(tile * block_n, min((tile + 1) * block_n, len(keys)))
            assert flag == int(not keys[some].all()), problem
            copy = prepared["blanked"][requests, :, some]
            if flag:
                assert torch.equal(copy, v[requests, :, some].masked_fill(~keys[some, None], 0.0)), problem
            else:
                assert copy.isnan().all(), problem


def check_blank_rows(spec, options, block_m: int, generator, problem: str) -> None:
    """A tile with a row that sees nothing is flagged, and there are copies of its Q and dO in which such rows are 0."""
    shape = spec.batch, spec.q_len, spec.q_heads
    whole = [torch.randn(*shape, width, generator=generator).transpose(1, 2) for width in (16, 24)]
    blind = (spec.intervals.start >= spec.intervals.stop).expand(spec.batch, -1)
    poisoned = [x.masked_fill(blind[:, None, :, None], float("nan")) for x in whole]
    launch, blank = hopper_launch.blank_rows_launch(*poisoned, options, block_m)
    for copy in (blank["q"], blank["do"]):
        copy.fill_(float("nan"))
    launch.start()
    for tile, flags in enumerate(blank["flags"].T):
        rows = slice(tile * block_m, (tile + 1) * block_m)
        flags = flags.expand(spec.batch).bool()
        assert torch.equal(flags, blind[:, rows].any(1)), problem
        for x, copy in zip(whole, (blank["q"], blank["do"]), strict=True):
            right = x.masked_fill(blind[:, None, :, None], 0.0)
            assert torch.equal(copy[flags][:, :, rows], right[flags][:, :, rows]), problem


def main() -> None:
    seeds = seeds_asked_for(__doc__)
    for seed in seeds:
        run_one(seed)
    print(f"{len(seeds)} masks looked up")


if __name__ == "__main__":
    main()
