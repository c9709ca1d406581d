"""Tile sizes: a table for GPUs that were measured, and cautious guesses for those that were not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch

__all__ = [
    "EXCEPTIONS",
    "HOPPER",
    "HOPPER_BACKWARD",
    "HOPPER_BACKWARD_LEAST_KEYS",
    "HOPPER_BACKWARD_PAIRED",
    "HOPPER_BACKWARD_ROOMY",
    "HOPPER_DQ",
    "HOPPER_LEAST_KEYS",
    "HOPPER_NARROW",
    "HOPPER_ROOMY",
    "HOPPER_ROWS",
    "TABLE",
    "HopperBackwardTiles",
    "HopperTiles",
    "TileConfig",
    "capability_of",
    "multiprocessors",
    "tile_config",
]


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch shape of one kernel: rows, keys, warps per program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def compile_options(self) -> dict[str, int]:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


HOPPER_ROWS = 64  # of one consumer of the warp-specialised kernel, as in flashlib.kernels.hopper.common


class WarpSpecialized:
    """What the shapes of the warp-specialised kernels have in common.

    Attributes:
        num_warps: of one consumer; the others are started by the first.
        maxnreg: registers of each thread when a program begins, before warps give some of theirs to others; None for as many as there are.
            With 128 two programs of one consumer fit on a multiprocessor.
    """

    num_warps: int
    num_stages: int
    maxnreg: int | None

    @property
    def compile_options(self) -> dict[str, int]:
        """What Triton is told beside the kernel's arguments."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


@dataclass(frozen=True)
class HopperTiles(WarpSpecialized):
    """Shape of the warp-specialised forward, or dQ: consumers of 64 rows, keys, stages of each ring, registers per consumer's thread."""

    consumers: int
    block_n: int
    num_stages: int
    registers: int
    num_warps: int = 4
    maxnreg: int | None = None

    @property
    def block_m(self) -> int:
        return HOPPER_ROWS * self.consumers


@dataclass(frozen=True)
class HopperBackwardTiles(WarpSpecialized):
    """Shape of the warp-specialised dK/dV: rows, consumers of 64 keys, stages of the ring, registers per consumer's thread."""

    block_m: int
    consumers: int
    num_stages: int
    registers: int
    num_warps: int = 4
    maxnreg: int | None = None

    @property
    def block_n(self) -> int:
        return HOPPER_ROWS * self.consumers


# By padded head_dim, measured on an H200 (benchmarks/h200/backward_orders.json).
HOPPER_BACKWARD = {64: HopperBackwardTiles(128, 2, 2, 240), 128: HopperBackwardTiles(64, 2, 2, 240)}
# With a softcap or ALiBi, whose values take registers too.
HOPPER_BACKWARD_ROOMY = {64: HopperBackwardTiles(64, 2, 3, 240), 128: HopperBackwardTiles(32, 2, 3, 240)}
# Two programs of one consumer on a multiprocessor: one computes while the other waits, and blocks of keys are half as long. At head_dim
# 128 they were faster, 1670 against 1764 us causal and 1773 against 1928 full, but where a group's heads are cut into parts; at 64 where
# rows see few keys: with 512 of them 136 against 152 us, with 1024 222 against 209.
HOPPER_BACKWARD_PAIRED = HopperBackwardTiles(64, 1, 2, 232, maxnreg=128)
HOPPER_BACKWARD_LEAST_KEYS = 800  # per row, between the two, from which on two consumers are taken at head_dim 64
# Of dQ. At head_dim 64 two programs on a multiprocessor were faster in every shape, 103 against 119 us in GPT-2's; at 128 slower.
HOPPER_DQ = {64: HopperTiles(1, 64, 3, 232, maxnreg=128), 128: HopperTiles(2, 64, 3, 240)}
HOPPER = {64: HopperTiles(3, 128, 3, 160), 128: HopperTiles(2, 128, 2, 240)}
# With a softcap or ALiBi at head_dim 64: the 160 registers a thread of three consumers are too few for them. Also for windows and
# short sequences, of which blocks of 192 rows cut off too much.
HOPPER_ROOMY = HopperTiles(2, 128, 4, 240)
# At head_dim 128, with a softcap or ALiBi under row intervals, or both of them under a window.
HOPPER_NARROW = HopperTiles(2, 64, 3, 240)
# Keys per row from which on three consumers were faster: with 1024, 415 against 373 TFLOP/s full, and 365 against 356 causal; with
# 512, under a causal mask, 264 against 312.
HOPPER_LEAST_KEYS = 1024

# By compute capability (major), kernel, and padded head_dim; 16-bit inputs. All of them, and the exceptions below, hold everything in
# registers (tests/kernels/test_compiled.py says for which problems that was seen): a value that is spilled costs a store and a load
# in each tile.
# For 9, those of the forward and of dQ up to head_dim 128 come from a sweep on an H200 (benchmarks/tune_triton.py); the others are
# the largest found that spill nothing. Those for 8 are cut to the shared memory of an A100, 163 KiB, and of consumer cards, 99 KiB:
# no such GPU was there to measure them on.
TABLE = {
    9: {
        "forward": {64: TileConfig(128, 64, 4, 3), 128: TileConfig(128, 128, 8, 3), 256: TileConfig(128, 64, 8, 2)},
        "dkdv": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 128, 8, 2), 256: TileConfig(32, 64, 8, 2)},
        "dq": {64: TileConfig(64, 64, 4, 3), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(128, 32, 8, 2)},
    },
    8: {
        "forward": {64: TileConfig(128, 64, 4, 2), 128: TileConfig(128, 64, 8, 2), 256: TileConfig(64, 64, 8, 1)},
        "dkdv": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 64, 8, 2), 256: TileConfig(16, 64, 8, 1)},
        "dq": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 32, 4, 1), 256: TileConfig(64, 16, 8, 1)},
    },
}
# The same, where something else takes registers too and the tile above would spill. The last one that applies counts.
EXCEPTIONS = {
    # A head_dim that is not a power of two: which channels lie inside.
    "edges": {9: {"dkdv": {256: TileConfig(16, 64, 8, 2)}}},
    # Row intervals, a softcap or ALiBi.
    "crowded": {
        9: {"dkdv": {128: TileConfig(64, 64, 8, 2), 256: TileConfig(16, 64, 8, 2)}},
        8: {
            "forward": {64: TileConfig(128, 32, 4, 2), 128: TileConfig(128, 32, 8, 2)},
            "dkdv": {64: TileConfig(32, 64, 4, 2), 128: TileConfig(32, 64, 8, 2)},
        },
    },
    # A slope and an offset of ALiBi for each row.
    "alibi_by_row": {9: {"forward": {64: TileConfig(128, 64, 8, 3)}}},
    # Random numbers for a tile of pairs, four of which take the registers of a Philox call.
    "dropout": {
        9: {
            "forward": {64: TileConfig(128, 64, 8, 3), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(64, 32, 8, 2)},
            "dkdv": {64: TileConfig(32, 64, 4, 2), 128: TileConfig(64, 64, 8, 2), 256: TileConfig(16, 64, 8, 2)},
            "dq": {256: TileConfig(64, 32, 8, 2)},
        },
        8: {
            "forward": {64: TileConfig(64, 32, 4, 2), 128: TileConfig(64, 32, 4, 2), 256: TileConfig(32, 32, 4, 1)},
            "dkdv": {64: TileConfig(32, 32, 4, 2), 128: TileConfig(32, 64, 8, 2), 256: TileConfig(16, 32, 8, 1)},
            "dq": {64: TileConfig(64, 32, 4, 2), 128: TileConfig(32, 32, 4, 1)},
        },
    },
}
# fp32 products are done without tensor cores (IEEE), from operands in registers: the wider the head, the smaller the tile.
FP32 = {
    "forward": {64: TileConfig(32, 32, 4, 1), 128: TileConfig(16, 32, 8, 1), 256: TileConfig(16, 16, 8, 1)},
    "dkdv": {64: TileConfig(32, 32, 8, 1), 128: TileConfig(16, 32, 8, 1), 256: TileConfig(16, 16, 8, 2)},
    "dq": {64: TileConfig(32, 32, 8, 1), 128: TileConfig(32, 16, 8, 1), 256: TileConfig(16, 16, 8, 1)},
}


def tile_config(
    kernel: str, dtype: torch.dtype, head_dim: int, capability: int, *, demands: Collection[str] = ()
) -> TileConfig:
    """Tile sizes of ``kernel`` ("forward", "dkdv" or "dq") from the table.

    Args:
        head_dim: the wider of D and Dv, at most 256.
        capability: the major number of the GPU's compute capability (:func:`capability_of`).
        demands: those of :data:`EXCEPTIONS` that apply.
    """
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    if dtype == torch.float32:
        return FP32[kernel][width]
    major = 8 if capability < 9 else 9
    tiles = TABLE[major][kernel][width]
    for demand, exceptions in EXCEPTIONS.items():
        if demand in demands:
            tiles = exceptions.get(major, {}).get(kernel, {}).get(width, tiles)
    return tiles


@cache
def capability_of(device: torch.device) -> int:
    """Major compute capability of a GPU. Where there is none, as in Triton's interpreter, that of a Hopper GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; where there is none, as many as an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
