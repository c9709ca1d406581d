"""What chapter 12 runs: splits on multiprocessors, the merge that is wrong, and merges in the order of arrival."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flashlib.inference.decode import split_ranges
from flashlib.launch.splits import SPLIT_COST
from flashlib.partial import Partial, fold
from flashlib.reference import naive_attention

__all__ = ["Program", "Schedule", "distinct", "merged_on_arrival", "schedule", "sum_of_splits"]


@dataclass(frozen=True)
class Program:
    """One split on one multiprocessor.

    Attributes:
        pair: number of its request and KV head. split: which of that pair's splits.
        tiles: how many tiles of keys it reads.
        sm: the multiprocessor that it runs on. start, stop: when, in the time that one tile takes.
    """

    pair: int
    split: int
    tiles: int
    sm: int
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """A launch, from its first program to its last."""

    programs: tuple[Program, ...]
    sm_count: int

    @property
    def time(self) -> int:
        """When the last program ends, in the time that one tile takes."""
        return max((program.stop for program in self.programs), default=0)

    @property
    def busy(self) -> int:
        """How many of the multiprocessors have anything to do."""
        return len({program.sm for program in self.programs})

    @property
    def reading(self) -> float:
        """The share of all multiprocessors' time in which keys are read; 0 if there is nothing to do."""
        return sum(program.tiles for program in self.programs) / max(1, self.time * self.sm_count)


def schedule(tiles: Sequence[int], num_splits: int, sm_count: int, *, split_cost: int = SPLIT_COST) -> Schedule:
    """Where and when the programs of a split-KV launch run, if whatever is free takes the next one.

    Each program takes as long as it has tiles, and ``split_cost`` more: the model of
    :func:`flashlib.inference.decode.choose_num_splits`, without its simplification that waves wait for each other.

    Args:
        tiles: tiles of keys of each pair of a request and a KV head.
        num_splits: of each pair. Splits that get no tile end at once, and are left out.
        sm_count: multiprocessors, each of which runs one program at a time.
        split_cost: time of a program beside its tiles.

    Raises:
        ValueError: ``num_splits`` or ``sm_count`` is less than 1, or a number of tiles is negative.
    """
    if min(num_splits, sm_count) < 1 or min(tiles, default=0) < 0:
        raise ValueError(
            "num_splits and sm_count must be at least 1, and tiles at least 0; "
            f"got num_splits={num_splits}, sm_count={sm_count}, tiles={list(tiles)}"
        )
    free = [(0, sm) for sm in range(sm_count)]  # when, and which
    programs = []
    for pair, count in enumerate(tiles):
        for split, part in enumerate(split_ranges(count, num_splits=num_splits, tile=1)):
            if part:
                start, sm = heapq.heappop(free)
                stop = start + len(part) + split_cost
                heapq.heappush(free, (stop, sm))
                programs.append(Program(pair, split, len(part), sm, start, stop))
    return Schedule(tuple(programs), sm_count)


def sum_of_splits(q: Tensor, k: Tensor, v: Tensor, num_splits: int, *, scale: float | None = None) -> Tensor:
    """The merge that suggests itself, and is wrong: attention over each split, and the outputs added up.

    Each output was already divided by the sum of its own weights, so the weights of the sum add up to ``num_splits``.

    Args:
        q: ``[B, Hq, Sq, D]``; k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]``. Every query sees every key.
        num_splits: the keys are cut into so many parts of S // num_splits keys; the last part gets what is left, too.
        scale: of the scores; ``1 / sqrt(D)`` by default.

    Raises:
        ValueError: there are fewer keys than splits, or no split.
    """
    length = k.shape[2]
    if not 1 <= num_splits <= length:
        raise ValueError(f"num_splits must be from 1 to the number of keys, {length}; got {num_splits}")
    size = length // num_splits
    bounds = [*range(0, size * num_splits, size), length]
    parts = [slice(*ends) for ends in pairwise(bounds)]
    return sum(naive_attention(q, k[:, :, part], v[:, :, part], scale=scale) for part in parts)


def merged_on_arrival(partials: Sequence[Partial], runs: int, *, seed: int = 0) -> list[Partial]:
    """The same pieces, merged in the order in which they arrive: another one in each run.

    So it is when programs that run side by side add to one result as soon as they are done, under a lock or by atomics.

    Args:
        partials: the pieces.
        runs: how many results to return.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(partials), generator=generator).tolist() for _ in range(runs))
    return [fold(partials[i] for i in order) for order in orders]


def distinct(results: Iterable[Tensor]) -> int:
    """How many different tensors there are, to the last bit."""
    return len({result.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for result in results})
