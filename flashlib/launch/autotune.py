"""Tile sizes by measurement, for GPUs that are not in the table or problems unlike those it was made from.

    config = FlashAttentionConfig.from_dict({"triton": {"autotune": "always"}})
    out = attention(q, k, v, backend="triton", config=config)  # the first call of its kind searches

A search compiles and times a handful of tile sizes, which takes seconds to a minute. Sizes that cannot fit are left out beforehand,
by what they would take of shared memory and registers. The answer is kept on disk, for one GPU, one version of Triton, one text
of the kernels and one kind of problem: lengths count only by their power of two.

``autotune`` is ``"unknown"`` by default: a search takes place only on GPUs that the table does not hold. ``"never"`` takes the table
everywhere. Tiles decide the order of sums, so that another choice gives other last bits, as another GPU does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from flashlib.launch.options import power_of_two
from flashlib.launch.tiles import TABLE, TileConfig

__all__ = ["CANDIDATES", "Device", "Problem", "fits", "search", "searches"]

REGISTERS = 255  # per thread, on every GPU since 2012
# What a thread keeps besides its share of the tiles: addresses, loop counters, a value or two per row. From compiled kernels.
OVERHEAD = 32

CANDIDATES = {
    "forward": [
        TileConfig(*sizes)
        for sizes in [
            (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 8, 2),
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 8, 1), (64, 32, 8, 2), (16, 32, 4, 2),
        ]
    ],
    "dkdv": [
        TileConfig(*sizes)
        for sizes in [
            (32, 64, 4, 2), (64, 64, 4, 2), (128, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 128, 8, 2), (64, 128, 8, 2),
            (128, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 1),
        ]
    ],
    "dq": [
        TileConfig(*sizes)
        for sizes in [
            (64, 32, 4, 1), (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 128, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1),
        ]
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A GPU, as far as tile sizes depend on it. ``shared_memory``: bytes that one program may have."""

    name: str
    capability: tuple[int, int]
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device) -> Device:
        properties = torch.cuda.get_device_properties(device)
        shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined] # PyTorch's own stubs lack it
        return cls(properties.name, (properties.major, properties.minor), shared)


@dataclass(frozen=True)
class Problem:
    """A kind of problem: all those for which one search serves.

    Attributes:
        kernel: "forward", "dkdv" or "dq".
        dtype: such as "bfloat16". head_dim, v_head_dim: padded to the widths of tiles.
        programs, q_len, kv_len: heads of the whole batch, and lengths, each rounded up to a power of two.
        group_size: query heads per KV head.
        features: the kinds of mask and ALiBi, and the compile-time switches that are on, such as "HAS_RIGHT".
    """

    kernel: str
    dtype: str
    head_dim: int
    v_head_dim: int
    programs: int
    q_len: int
    kv_len: int
    group_size: int
    features: tuple[str, ...]

    @classmethod
    def of(cls, kernel: str, q: torch.Tensor, arguments: dict) -> Problem:
        """From the arguments that all attention kernels share (:meth:`flashlib.launch.options.KernelOptions.arguments`)."""
        switches = ("HAS_LEFT", "HAS_RIGHT", "SOFTCAP", "DROPOUT")
        features = [
            f"MASK={arguments['MASK']}",
            f"ALIBI={arguments['ALIBI']}",
            *(name for name in switches if arguments[name]),
            arguments["PRECISION"],
        ]
        return cls(
            kernel=kernel,
            dtype=str(q.dtype).removeprefix("torch."),
            head_dim=arguments["BLOCK_D"],
            v_head_dim=arguments["BLOCK_DV"],
            programs=power_of_two(q.shape[0] * q.shape[1]),
            q_len=power_of_two(arguments["q_len"]),
            kv_len=power_of_two(arguments["kv_len"]),
            group_size=arguments["group_size"],
            features=tuple(features),
        )

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize


def searches(mode: str, device: torch.device) -> bool:
    """Whether the tile sizes for a device are to be searched for, and can be at this moment."""
    if mode == "never" or device.type != "cuda":
        return False
    if mode == "unknown" and torch.cuda.get_device_capability(device)[0] in TABLE:
        return False
    return not torch.cuda.is_current_stream_capturing()  # timing waits for the GPU, which a graph cannot hold


def shared_memory(problem: Problem, tiles: TileConfig) -> int:
    """Bytes of shared memory that a kernel takes: what stays, and as many stages of what passes by as are loaded ahead."""
    rows, keys, channels = tiles.block_m, tiles.block_n, problem.head_dim + problem.v_head_dim
    stays, passes = {
        "forward": (rows * problem.head_dim, keys * channels),
        "dkdv": (keys * channels, rows * channels),
        "dq": (rows * channels, keys * channels),
    }[problem.kernel]
    return (stays + tiles.num_stages * passes) * problem.itemsize


def registers(problem: Problem, tiles: TileConfig) -> int:
    """Registers per thread that a kernel needs at least: fp32 sums and scores, and weights in the inputs' dtype."""
    rows, keys, dim, v_dim = tiles.block_m, tiles.block_n, problem.head_dim, problem.v_head_dim
    sums, score_tiles = {
        "forward": (rows * v_dim, 1),
        "dkdv": (keys * (dim + v_dim), 2),
        "dq": (rows * dim, 2),
    }[problem.kernel]
    weights = rows * keys * problem.itemsize // 4
    return OVERHEAD + (sums + score_tiles * rows * keys + weights) // (32 * tiles.num_warps)


def fits(problem: Problem, tiles: TileConfig, device: Device) -> bool:
    """Whether a kernel with these tiles can run on a device without spilling, as far as arithmetic tells."""
    return shared_memory(problem, tiles) <= device.shared_memory and registers(problem, tiles) <= REGISTERS


def search(
    problem: Problem,
    device: Device,
    default: TileConfig,
    measure: Callable[[TileConfig], float],
    *,
    folder: Path | None = None,
) -> TileConfig:
    """The fastest tiles for a kind of problem: from the disk if they were searched for before, else by timing.

    Args:
        default: tiles that are known to work; they take part.
        measure: milliseconds that a launch with some tiles takes.
        folder: where answers are kept, one file each; None for the user's cache (``FLASHLIB_CACHE`` in the environment moves it).

    Raises:
        RuntimeError: no candidate runs, the default included.
    """
    folder = folder or cache_folder()
    if (problem, device, folder) not in _found:
        _found[problem, device, folder] = _search(problem, device, default, measure, folder)
    return _found[problem, device, folder]


_found: dict[tuple[Problem, Device, Path], TileConfig] = {}


def _search(
    problem: Problem, device: Device, default: TileConfig, measure: Callable[[TileConfig], float], folder: Path
) -> TileConfig:
    from triton.errors import TritonError

    key = {"device": asdict(device), "problem": asdict(problem), **_versions()}
    path = folder / f"{_digest(json.dumps(key, sort_keys=True))}.json"
    known = _read(path, key)
    if known is not None:
        return known
    candidates = [default, *(c for c in CANDIDATES[problem.kernel] if c != default and fits(problem, c, device))]
    logging.getLogger(__name__).info("timing %d tile sizes: %s on %s", len(candidates), problem, device.name)
    times: dict[TileConfig, float] = {}
    failures = []
    for tiles in candidates:
        try:
            times[tiles] = measure(tiles)
        except (TritonError, RuntimeError) as error:  # the arithmetic is a lower bound: a tile may still not fit
            failures.append(f"{tiles}: {type(error).__name__}: {error}")
    if not times:
        raise RuntimeError(f"no tile size runs {problem} on {device.name}:\n" + "\n".join(failures))
    best = min(times, key=times.__getitem__)
    timings = [{**asdict(tiles), "ms": ms} for tiles, ms in sorted(times.items(), key=lambda timed: timed[1])]
    _write(path, {"key": key, "tiles": asdict(best), "timings": timings, "failures": failures})
    return best


def time_launches(launches: list) -> float:
    """Milliseconds for starting these launches: the median of a few, after a warm-up that also compiles."""
    for launch in launches:
        launch.start()
    torch.cuda.synchronize()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for launch in launches:
            launch.start()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def cache_folder() -> Path:
    import platformdirs

    override = os.environ.get("FLASHLIB_CACHE")
    return (Path(override).expanduser() if override else platformdirs.user_cache_path("flashlib")) / "tiles"


def _read(path: Path, key: dict) -> TileConfig | None:
    """What a file says; None without one. A file that does not say it properly is reported, and searched for again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is for another problem")
        tiles = TileConfig(**found["tiles"])
        if not all(isinstance(size, int) and size > 0 for size in asdict(tiles).values()):
            raise ValueError(f"not tile sizes: {found['tiles']}")
        return tiles
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"cannot use the tile sizes in {path} ({error}); searching again", RuntimeWarning, stacklevel=2)
        return None


def _write(path: Path, content: dict) -> None:
    """All or nothing: other processes see the old file or the new one. A search that cannot be kept is still a result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    except OSError as error:
        warnings.warn(f"tile sizes could not be kept in {path}: {error}", RuntimeWarning, stacklevel=2)


@lru_cache
def _versions() -> dict[str, str]:
    """What else an answer depends on: Triton, and the text of the kernels."""
    import triton

    kernels = Path(__file__).parents[1] / "kernels"
    sources = ((kernels / f"{name}.py").read_text(encoding="utf-8") for name in ("common", "forward", "backward"))
    return {"triton": triton.__version__, "kernels": _digest("\0".join(sources))}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
