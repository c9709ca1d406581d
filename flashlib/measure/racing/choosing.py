"""The fastest backend by measurement: timed once for each class of problems, and remembered.

    name = autoselect(q, k, v, causal=True)
    out = attention(q, k, v, causal=True, backend=name)

What is timed is the call as a user makes it, Python included: a kernel that is quick on the device but slow to launch loses on small
problems, as it should. With inputs that want gradients, forward and backward are timed together.

**What a search costs, at most** (:func:`race`). Every candidate runs once to warm up. Then they take turns in shuffled order. One whose
first two runs were both more than :data:`HOPELESS` times as slow as the best of their rounds leaves; the others leave as soon as the
fastest of at least three runs is slower than the leader's median by more than :data:`MARGIN`. No single run decides, since any may be
disturbed. So a candidate that is much slower than the best costs three of its own runs, and any other at most ``ROUNDS + 1`` of at most
``HOPELESS`` times the best one's. After that every call is the winner's.

A class of problems is a device, a dtype, head dimensions, heads for each KV head, a kind of mask, options, and sizes by their power of
two. The answer is kept in a file for the versions of PyTorch, Triton and this package that it was found with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flashlib.attention import attention
from flashlib.backends import BACKENDS, check_name, order_of_choice
from flashlib.config import current_config
from flashlib.measure.records.record import PACKAGE, device_name, load_record
from flashlib.spec import AttentionSpec

__all__ = ["Race", "autoselect", "candidates", "race", "recorded_order"]

ROUNDS = 7
HOPELESS = 3.0
MARGIN = 0.05
LEAST_MS = 0.5  # that a run on a GPU is repeated to fill, so that what surrounds it does not count
NOT_RACED = (
    "reference",
    "torch_sdpa_math",
)  # they make the N x N matrix, which may not fit, and win nowhere that matters


@dataclass(frozen=True)
class Race:
    """How a race went.

    Attributes:
        winner: the candidate with the least median.
        ms: median of each candidate's runs, of however many it had.
        runs: of each, without the one to warm up. spent_ms: of all runs together.
        failed: candidates that raised, with what they said.
    """

    winner: str
    ms: dict[str, float]
    runs: dict[str, int]
    spent_ms: float
    failed: dict[str, str]


def race(runs: Mapping[str, Callable[[], float]], rng: random.Random | None = None) -> Race:
    """Let candidates run against each other until one is known to be the fastest, or :data:`ROUNDS` rounds are over.

    Args:
        runs: by name; each runs once and returns its milliseconds.
        rng: of the order in each round; None for a fresh source.

    Raises:
        ValueError: there is no candidate.
        RuntimeError: all of them failed; says how.
    """
    if not runs:
        raise ValueError("runs must hold at least one candidate; got none")
    rng, spent, failed = rng or random.Random(), 0.0, dict[str, str]()
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            spent += run()
            times[name] = []
        except Exception as error:  # other people's code may fail in any way, and the race goes on
            failed[name] = f"{type(error).__name__}: {error}"
    if not times:
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise RuntimeError(f"every candidate failed: {told}")
    racing, hopeless = list(times), dict.fromkeys(times, 0)
    for turn in range(1, ROUNDS + 1):
        for name in rng.sample(racing, len(racing)):
            times[name].append(runs[name]())
            spent += times[name][-1]
        fastest = min(times[name][-1] for name in racing)
        leader = min(racing, key=lambda name: statistics.median(times[name]))
        limit = (1 + MARGIN) * statistics.median(times[leader])
        for name in racing:
            hopeless[name] += times[name][-1] > HOPELESS * fastest
        left = {name for name in racing if hopeless[name] == turn == 2 or (turn > 2 and min(times[name]) > limit)}
        racing = [name for name in racing if name == leader or name not in left]
        if len(racing) == 1:
            break
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    winner = min(racing, key=medians.__getitem__)
    return Race(winner, medians, {name: len(taken) for name, taken in times.items()}, spent, failed)


def autoselect(
    q: Tensor, k: Tensor, v: Tensor, *, among: Iterable[str] = (), folder: Path | None = None, **options
) -> str:
    """The name of the backend that is fastest for problems like this one: from the disk if they were raced before, else by a race.

    Args:
        q, k, v, options: as for :func:`flashlib.attention`.
        among: names of the backends to race; none for all that can run the problem and keep no N x N matrix.
        folder: where answers are kept, one file each; None for the user's cache (``FLASHLIB_CACHE`` in the environment moves it).

    Raises:
        TypeError, ValueError: bad arguments; as :func:`flashlib.attention`, or there is no backend of a name in ``among``.
        RuntimeError: no candidate can run the problem.
    """
    spec = AttentionSpec.from_tensors(q, k, v, **options)
    racing = candidates(spec, among)
    if not racing:
        raise RuntimeError(f"none of the candidates can run this: {', '.join(among) or 'all'}")
    kind = class_of(spec, racing)
    folder = folder or cache_folder()
    known = _found.get((json.dumps(kind), folder)) or _read(folder / f"{_digest(kind)}.json", kind, racing)
    if known is None:
        found = race({name: _run(name, q, k, v, spec, options) for name in racing})
        known = found.winner
        _write(folder / f"{_digest(kind)}.json", {"class": kind, "winner": known, "race": asdict(found)})
    _found[json.dumps(kind), folder] = known
    return known


_found: dict[tuple[str, Path], str] = {}


def candidates(spec: AttentionSpec, among: Iterable[str] = ()) -> list[str]:
    """The backends to race: those of ``among``, or of the order of choice, that can run the problem."""
    config = current_config()
    names = [check_name("among", name) for name in among] or [
        name for name in order_of_choice(config, spec.device) if name not in NOT_RACED
    ]
    return [name for name in names if BACKENDS[name].why_not(spec, config) is None]


def class_of(spec: AttentionSpec, racing: Iterable[str]) -> dict:
    """What problems have in common for which one race serves."""
    band = spec.mask.band()
    mask = "rows" if band is None else "full" if band == (None, None) else "causal" if band == (None, 0) else "band"
    # A band's cost is its width's, where it is narrower than the keys are many.
    widths = (
        []
        if band is None or mask != "band"
        else [None if width is None else _power_of_two(min(width, spec.kv_len)) for width in band]
    )
    return {
        "device": device_name() if spec.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads() if spec.device.type == "cpu" else 0,
        "versions": _versions(),
        "candidates": sorted(racing),
        "dtype": str(spec.dtype),
        "dims": [spec.head_dim, spec.v_head_dim],
        "group": spec.group_size,
        "mask": [mask, *widths],
        "softcap": spec.softcap > 0,
        "alibi": spec.alibi_slopes is not None,
        "backward": spec.needs_grad,
        "sizes": [_power_of_two(size) for size in (spec.batch * spec.q_heads, spec.q_len, spec.kv_len)],
    }


def recorded_order(folder: str = "h200", direction: str = "forward") -> list[tuple[str, float]]:
    """The backends of a machine's records from the fastest to the slowest, with how many times as long as the best each takes.

    The geometric mean over all cells of the training grid that all of them could run.

    Raises:
        FileNotFoundError: there is no such record.
    """
    rows = load_record(f"{folder}/training_{direction}").rows
    names = [name for name in dict.fromkeys(row["peer"] for row in rows) if name in BACKENDS]
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["peer"] in names and row["ms"]:
            cell = json.dumps({name: row[name] for name in ("batch", "q_heads", "length", "head_dim", "mask")})
            cells.setdefault(cell, {})[row["peer"]] = row["ms"]
    whole = [cell for cell in cells.values() if len(cell) == len(names)]
    slower = {
        name: math.exp(statistics.fmean(math.log(cell[name] / min(cell.values())) for cell in whole)) for name in names
    }
    return sorted(slower.items(), key=lambda found: found[1])


def cache_folder() -> Path:
    import platformdirs

    override = os.environ.get("FLASHLIB_CACHE")
    return (Path(override).expanduser() if override else platformdirs.user_cache_path("flashlib")) / "backends"


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, options: dict) -> Callable[[], float]:
    """One timed run of a backend, the way a user calls it."""
    inputs = [x.detach().requires_grad_(x.requires_grad and spec.needs_grad) for x in (q, k, v)]
    wanted = [x for x in inputs if x.requires_grad]

    def call() -> None:
        out = attention(*inputs, backend=name, **options)
        out = out[0] if isinstance(out, tuple) else out
        if wanted:
            torch.autograd.grad(out, wanted, torch.ones_like(out))

    def run() -> float:
        # Calls follow one another as in a program that does not wait: of Python and the device the slower one counts.
        calls = 1
        while True:
            ms = _burst_ms(call, calls, q.device)
            if not q.is_cuda or ms >= LEAST_MS:
                return ms / calls
            calls *= 2

    return run


def _burst_ms(call: Callable[[], None], calls: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return 1e3 * (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _versions() -> dict[str, str]:
    """What else an answer depends on: PyTorch, Triton, and the text of our kernels and backends."""
    import importlib.metadata

    texts = sorted(path for room in ("kernels", "launch", "backends") for path in (PACKAGE / room).rglob("*.py"))
    ours = hashlib.sha256(b"\0".join(path.read_bytes() for path in texts)).hexdigest()[:20]
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {"torch": torch.__version__, "triton": triton, "flashlib": ours}


def _read(path: Path, kind: dict, racing: list[str]) -> str | None:
    """What a file says; None without one. A file that does not say it properly is reported, and raced again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["class"] != json.loads(json.dumps(kind)):
            raise ValueError("it is for another class of problems")
        if found["winner"] not in racing:
            raise ValueError(f"no candidate: {found['winner']!r}")
        return found["winner"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"cannot use the backend in {path} ({error}); racing again", RuntimeWarning, stacklevel=3)
        return None


def _write(path: Path, content: dict) -> None:
    """All or nothing: other processes see the old file or the new one. A race that cannot be kept is still a result."""
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
        warnings.warn(f"the choice could not be kept in {path}: {error}", RuntimeWarning, stacklevel=3)


def _digest(kind: dict) -> str:
    return hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:20]


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
