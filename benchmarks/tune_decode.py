"""On a GPU: time decoding over tile sizes, split counts and ways to merge, against PyTorch's SDPA on cuDNN.

The best stand in DECODE_TABLE of flashlib/launch/decode.py and in choose_num_splits of flashlib/inference/decode.py.

python benchmarks/tune_decode.py --out results --compilers 14

Without a GPU, TRITON_INTERPRET=1 runs small cases, to see that the script works.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashlib.inference import decode
from flashlib.launch.decode import DecodeOptions, decode_launches
from flashlib.launch.tiles import TileConfig
from flashlib.measure.racing.timing import capture, time_call, time_in_turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROWS = 16
TILES = [
    TileConfig(ROWS, *shape)
    for shape in [(64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 4, 2), (128, 4, 3), (128, 8, 3), (32, 4, 4), (32, 4, 6), (64, 4, 6)]
]  # fmt: skip
if DEVICE == "cpu":
    TILES = TILES[:1]
CACHES_FULL = 3  # input sets together are at least so many times the L2 cache


@dataclass(frozen=True)
class Case:
    """A decoding step: requests, tokens of each in a cache for ``capacity``, and the split counts worth trying."""

    name: str
    batch: int
    capacity: int
    splits: tuple[int, ...]
    ragged: bool = False
    page_size: int = 0
    with_lengths: bool = False

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.capacity] * self.batch
        return [round(10 ** (2 + 3 * i / (self.batch - 1)) * self.capacity / 1e5) for i in range(self.batch)]

    @property
    def bytes_read(self) -> int:
        """K and V once."""
        return sum(self.lengths) * KV_HEADS * 2 * HEAD_DIM * 2


CASES = [
    Case("B1 S4k", 1, 4096, (8, 16, 22, 32, 64)),
    Case("B1 S128k", 1, 131072, (16, 32, 33, 49, 66, 99)),
    Case("B16 S8k", 16, 8192, (1, 2, 3, 4, 6, 8)),
    Case("B64 S4k", 64, 4096, (1, 2, 3, 4)),
    Case("B16 S8k, lengths", 16, 8192, (2, 4), with_lengths=True),
    Case("B16 S8k, pages of 16", 16, 8192, (2, 4), page_size=16, with_lengths=True),
    Case("B16 S8k, pages of 256", 16, 8192, (2, 4), page_size=256, with_lengths=True),
    Case("ragged B16, 100 to 100k", 16, 100_000, (8, 16, 25, 50, 100), ragged=True, with_lengths=True),
]  # fmt: skip
SMALL = [
    Case("B1", 1, 128, (2,)),
    Case("B2, pages of 16", 2, 64, (1,), page_size=16, with_lengths=True),
]


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor | None
    table: torch.Tensor | None


def draw(case: Case) -> Inputs:
    shape = (case.batch, KV_HEADS, case.capacity, HEAD_DIM)
    table = None
    if case.page_size:
        pages = case.capacity // case.page_size
        table = torch.randperm(case.batch * pages, device=DEVICE).to(torch.int32).view(case.batch, pages)
        shape = (case.batch * pages, KV_HEADS, case.page_size, HEAD_DIM)
    q = torch.randn(case.batch, Q_HEADS, 1, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE) if case.with_lengths else None
    return Inputs(q, k, v, lengths, table)


def input_sets(case: Case) -> list[Inputs]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 0
    return [draw(case) for _ in range(max(1, math.ceil(CACHES_FULL * cache / case.bytes_read)))]


def ours(x: Inputs, splits: int, tiles: TileConfig | None, merge_in_kernel: bool) -> torch.Tensor:
    options = DecodeOptions(x.lengths, x.table, None, 0, HEAD_DIM**-0.5, 0.0, splits, merge_in_kernel=merge_in_kernel)
    launches, out, _ = decode_launches(x.q, x.k, x.v, options, tiles=tiles)
    for launch in launches:
        launch.start()
    return out


def chosen(x: Inputs) -> torch.Tensor:
    """What a user gets."""
    return decode.decode_attention(x.q, x.k, x.v, lengths=x.lengths, block_table=x.table)


def cudnn(x: Inputs) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True)


def prepared(call: Callable[[Inputs], object], sets: list[Inputs]) -> Callable[[], object]:
    """One call on each set of inputs; on a GPU, one CUDA graph of them."""
    calls = [functools.partial(call, x) for x in sets]
    if DEVICE == "cpu":
        return lambda: [one() for one in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        calls[0]()
    torch.cuda.synchronize()
    with torch.no_grad():
        return capture(calls, stream)


def compile_ahead(job: tuple) -> None:
    """Fill Triton's cache on disk. What does not compile says so when it is timed."""
    case, tiles, merge_in_kernel = job
    small = replace(case, batch=2, capacity=max(512, case.page_size))
    try:
        ours(draw(small), 2, tiles, merge_in_kernel)
    except Exception as error:
        print(case.name, tiles, type(error).__name__, flush=True)


def variants(case: Case) -> list[tuple]:
    ways = [(splits, tiles, True) for splits, tiles in itertools.product(case.splits, TILES)]
    # Where the partials are merged hardly depends on the tile.
    return ways + [(splits, TILES[0], False) for splits in case.splits if splits > 1]


def sweep(case: Case, seconds: float) -> list[dict]:
    sets, rows = input_sets(case), []
    expected = None if case.page_size or case.ragged or DEVICE == "cpu" else cudnn(sets[0]).float()
    for splits, tiles, merge_in_kernel in variants(case):
        row = {"case": case.name, "splits": splits, "tiles": str(tiles), "merge_in_kernel": merge_in_kernel}
        call = functools.partial(ours, splits=splits, tiles=tiles, merge_in_kernel=merge_in_kernel)
        try:
            if expected is not None:
                row["largest_difference"] = (call(sets[0]).float() - expected).abs().max().item()
            timing = time_call(prepared(call, sets), device=DEVICE, budget_s=seconds)
            row |= {"us": 1e3 * timing.median_ms / len(sets)}
            row |= {"GB/s": case.bytes_read / row["us"] / 1e3}
        except Exception as error:
            row["why_not"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
    timed = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
    return timed + [row for row in rows if "us" not in row]


def final(case: Case, best: dict) -> list[dict]:
    """The best of the sweep, what a user gets, and cuDNN, in turns. For a padded batch cuDNN reads the padding too."""
    sets = input_sets(case)
    tiles = next(tiles for tiles in TILES if str(tiles) == best["tiles"])
    contenders = {
        "best": functools.partial(ours, splits=best["splits"], tiles=tiles, merge_in_kernel=best["merge_in_kernel"]),
        "decode_attention": chosen,
    }
    if DEVICE == "cuda" and not case.page_size:
        contenders["cudnn"] = cudnn
    timings = time_in_turns(
        {name: prepared(call, sets) for name, call in contenders.items()}, device=DEVICE, budget_s=0.3
    )
    rows = []
    for name, timing in timings.items():
        us = 1e3 * timing.median_ms / len(sets)
        rows.append({"case": case.name, "who": name, "us": us, "GB/s": case.bytes_read / us / 1e3})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compilers", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=[], help="words of the cases' names; all cases if none")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each timing")
    options = parser.parse_args()
    cases = CASES if DEVICE == "cuda" else SMALL
    cases = [case for case in cases if not options.cases or any(word in case.name for word in options.cases)]
    if DEVICE == "cuda":
        jobs = {
            (case.page_size, case.with_lengths, tiles, merge): (case, tiles, merge)
            for case in cases
            for _, tiles, merge in variants(case)
        }
        with multiprocessing.get_context("spawn").Pool(options.compilers) as pool:
            pool.map(compile_ahead, jobs.values(), chunksize=1)
    started, swept, finals = time.monotonic(), [], []
    options.out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        rows = sweep(case, options.seconds)
        swept += rows
        print(tabulate(rows[:8], headers="keys", floatfmt=".1f"), flush=True)
        if "us" in rows[0]:
            finals += final(case, rows[0])
            print(
                tabulate(finals[-3:], headers="keys", floatfmt=".1f"),
                f"\n{time.monotonic() - started:.0f} s\n",
                flush=True,
            )
        (options.out / "decode_tiles.json").write_text(json.dumps({"sweep": swept, "final": finals}, indent=1))
    print(tabulate(finals, headers="keys", floatfmt=".1f"))


if __name__ == "__main__":
    main()
