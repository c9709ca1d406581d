"""On a GPU: time the Triton kernels over tile sizes. The fastest stand in flashlib/launch/tiles.py.

python benchmarks/tune_triton.py --out results --compilers 12
"""

import argparse
import json
import multiprocessing
from pathlib import Path

import torch

from flashlib import AttentionSpec
from flashlib.launch.hopper import hopper_launches
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches, forward_launch
from flashlib.launch.start import Launch
from flashlib.launch.tiles import HopperTiles, TileConfig, capability_of, tile_config
from flashlib.measure import time_call

CANDIDATES = {
    "forward": [
        TileConfig(*c)
        for c in [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (128, 32, 4, 4)]
    ],
    "dkdv": [
        TileConfig(*c)
        for c in [(64, 64, 4, 2), (128, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 4, 3), (64, 128, 8, 2), (32, 128, 8, 3)]
    ],
    "dq": [
        TileConfig(*c)
        for c in [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)]
    ],
    "hopper": [HopperTiles(3, 128, 2, 160), HopperTiles(2, 128, 2, 240), HopperTiles(3, 64, 3, 160), HopperTiles(2, 64, 3, 240)],
}  # fmt: skip
TOKENS, WIDTH = 16384, 2048  # per batch, and of all heads together


def launch(kernel: str, tiles: TileConfig | HopperTiles, head_dim: int, length: int, causal: bool) -> Launch:
    shape = (TOKENS // length, WIDTH // head_dim, length, head_dim)
    q, k, v, grad_out = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    options = KernelOptions.from_spec(AttentionSpec.from_tensors(q, k, v, causal=causal))
    if kernel == "hopper":
        return hopper_launches(q, k, v, options, tiles=tiles)[0][-1]
    if kernel == "forward":
        return forward_launch(q, k, v, options, tiles=tiles)[0]
    forward, out, lse = forward_launch(q, k, v, options)
    forward.start()
    both = {name: tile_config(name, q.dtype, head_dim, capability_of(q.device)) for name in ("dkdv", "dq")}
    launches, _ = backward_launches(q, k, v, out, lse, grad_out, None, options, tiles=both | {kernel: tiles})
    return next(one for one in launches if one.name == f"backward_{kernel}")


def compile_ahead(job: tuple) -> None:
    """Fill Triton's cache on disk. What does not compile says so when it is timed."""
    try:
        launch(*job).start()
        torch.cuda.synchronize()
    except Exception as error:
        print(job, type(error).__name__, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--compilers", type=int, default=1)
    options = parser.parse_args()
    cases = [(head_dim, length, causal) for head_dim in (64, 128) for length, causal in ((16384, False), (4096, True))]
    jobs = [(kernel, tiles, *case) for kernel in options.kernels for tiles in CANDIDATES[kernel] for case in cases]
    with multiprocessing.get_context("spawn").Pool(options.compilers) as pool:
        pool.map(compile_ahead, jobs, chunksize=4)
    rows = []
    for kernel, tiles, head_dim, length, causal in jobs:
        row = {"kernel": kernel, "tiles": str(tiles), "head_dim": head_dim, "length": length, "causal": causal}
        try:
            row["ms"] = time_call(launch(kernel, tiles, head_dim, length, causal).start, device="cuda").median_ms
        except Exception as error:
            row["why_not"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
        print(row, flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "tiles.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
