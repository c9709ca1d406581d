"""Into how many splits the keys of a decoding step are cut, from what the host knows: shapes and the number of multiprocessors."""

from __future__ import annotations

from functools import cache

from flashlib.launch.options import blocks

__all__ = [
    "LEAST_MERGED_IN_KERNEL",
    "LONGEST_SPLIT",
    "MOST_PROGRAMS",
    "MOST_SPLITS",
    "SPLIT_COST",
    "fewest_waves",
    "longest_split",
]

SPLIT_COST = 2  # tiles; what a split costs beside the tiles it holds
MOST_SPLITS = 256  # that are chosen
MOST_PROGRAMS = 65535  # along the second dimension of a CUDA grid
# keys; so that in a batch of unequal lengths no program is left with a long request when all others are done
LONGEST_SPLIT = 8192
# keys; where every key's page is looked up, two programs share a multiprocessor, to wait less
LONGEST_SPLIT_OF_SMALL_PAGES = 4096
# keys; shorter splits are merged by a second kernel: 10.9 us against 12.6 at 4k keys of one request on an H200. Longer ones by the
# last program to finish, which saves a launch.
LEAST_MERGED_IN_KERNEL = 1024


@cache
def fewest_waves(pairs: int, tiles: int, sm_count: int) -> int:
    """The number of splits with the shortest total, and of equals the smallest.

    Args:
        pairs: programs for each split: requests times KV heads times blocks of rows.
        tiles: of keys, at least 1, that are cut. sm_count: multiprocessors.
    """

    def tile_times(splits: int) -> int:
        return blocks(pairs * splits, sm_count) * (blocks(tiles, splits) + SPLIT_COST)

    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=tile_times)


def longest_split(*, small_pages: bool) -> int:
    """Keys that a split takes at most."""
    return LONGEST_SPLIT_OF_SMALL_PAGES if small_pages else LONGEST_SPLIT
