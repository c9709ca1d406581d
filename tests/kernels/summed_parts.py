"""``hopper_sum_parts`` in Triton's interpreter: the bits of a sum from the first part to the last, and nothing that is padding. The kernel whose
parts it adds up runs on Hopper GPUs alone.

TRITON_INTERPRET=1 python tests/kernels/summed_parts.py --seed 0 --problems 20
"""

import random
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from seeds import seeds_asked_for

from flashlib.launch.hopper import sum_parts_launch
from flashlib.launch.tiles import HopperBackwardTiles


def run_one(seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, parts, kv_len = (
        rng.randint(1, 3),
        rng.randint(1, 3),
        rng.randint(2, 8),
        rng.choice((1, 60, 128, 200)),
    )
    tiles = HopperBackwardTiles(64, rng.choice((1, 2)), 2, 240)
    padded_keys = -(-kv_len // tiles.block_n) * tiles.block_n
    widths = [rng.choice((16, 24, 32, 64, 100, 128)) for _ in range(2)]
    places, partial = [], []
    for width in widths:
        padded_width = 64 if width <= 64 else 128
        part = torch.randn(batch, kv_heads, parts, padded_keys, padded_width, generator=generator)
        part[..., kv_len:, :] = part[..., width:] = float("nan")
        partial.append(part)
        room = torch.full((batch, kv_len + 1, kv_heads, width), 7.0, dtype=torch.float16)
        room = room if rng.random() < 0.5 else room.transpose(1, 2).contiguous().transpose(1, 2)
        places.append(room)
    dk, dv = (room[:, :kv_len].transpose(1, 2) for room in places)
    sum_parts_launch(SimpleNamespace(dk=dk, dv=dv), *[x.flatten(1, 2) for x in partial], parts, tiles).start()
    for came, part, room, width in zip((dk, dv), partial, places, widths, strict=True):
        expected = reduce(torch.add, part[..., :kv_len, :width].unbind(2))
        assert torch.equal(came, expected.half()), f"seed {seed}: {parts} parts of {tuple(came.shape)}"
        assert (room[:, kv_len:] == 7.0).all(), f"seed {seed}: something was written behind {kv_len} keys"


def main() -> None:
    seeds = seeds_asked_for(__doc__)
    for seed in seeds:
        run_one(seed)
    print(f"{len(seeds)} sums of parts")


if __name__ == "__main__":
    main()
