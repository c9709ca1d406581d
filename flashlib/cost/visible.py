"""What a mask leaves: pairs and tiles, from a few integers, without the N x N matrix and without PyTorch.

Every mask of :mod:`flashlib.masks` shows each row one interval of keys. Over long stretches of rows the two ends of that interval
stand still or move on by one key per row; such a stretch is a :class:`Run`. A causal mask is two of them at most, a window four, a
packed batch a few for each sequence. Sums over a run are arithmetic series, and which tiles a block of rows needs follows from the
first and the last of its rows, so that counting costs as many steps as there are runs and blocks, however long they are.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

__all__ = ["BlockTiles", "Run", "Visible", "checked_count"]


@dataclass(frozen=True)
class Run:
    """Rows ``first <= i < last``, each of which sees at least one key: ``start + start_slope * (i - first)`` up to, not including,
    ``stop + stop_slope * (i - first)``. Both slopes are 0 or 1."""

    first: int
    last: int
    start: int
    start_slope: int
    stop: int
    stop_slope: int

    def starts_at(self, row: int) -> int:
        return self.start + self.start_slope * (row - self.first)

    def stops_at(self, row: int) -> int:
        return self.stop + self.stop_slope * (row - self.first)

    @property
    def pairs(self) -> int:
        """Visible pairs: an arithmetic series."""
        rows = self.last - self.first
        return rows * (self.stop - self.start) + (self.stop_slope - self.start_slope) * rows * (rows - 1) // 2

    def rows_that_see(self, first_key: int, last_key: int) -> range:
        """Those of its rows that see one of the keys ``first_key <= j < last_key``."""
        first, last = self.first, self.last
        if self.stop_slope:
            first = max(first, self.first + first_key + 1 - self.stop)
        elif self.stop <= first_key:
            return range(0)
        if self.start_slope:
            last = min(last, self.first + last_key - self.start)
        elif self.start >= last_key:
            return range(0)
        return range(first, max(first, last))


@dataclass(frozen=True)
class BlockTiles:
    """The tiles of keys that a block of rows meets (or the tiles of rows that a block of keys meets).

    Attributes:
        seen: tiles of which some pair is visible. full: of which every pair is.
        first, last: the first tile that is seen, and one past the last.
        span: keys (or rows) from the first that is seen to the last.
    """

    seen: int = 0
    full: int = 0
    first: int = 0
    last: int = 0
    span: int = 0

    @property
    def hull(self) -> int:
        """Tiles from the first to the last, gaps included: what a kernel visits."""
        return self.last - self.first


@dataclass(frozen=True)
class Visible:
    """The mask of one batch entry: which of ``kv_len`` keys each of ``q_len`` rows sees. Rows in no run see nothing.

    Attributes:
        q_len, kv_len: Sq, Sk. runs: stretches of rows, in order.
        widths: ``(left, right)`` if the mask is a plain band, aligned bottom-right, which kernels are told by two numbers. None if they are
            told the interval of each row.
    """

    q_len: int
    kv_len: int
    runs: tuple[Run, ...]
    widths: tuple[int | None, int | None] | None = None

    @classmethod
    def band(
        cls, q_len: int, kv_len: int, *, left: int | None = None, right: int | None = None, offset: int | None = None
    ) -> Visible:
        """Row i sees the keys ``i + offset - left`` to ``i + offset + right``, both included (:class:`flashlib.masks.Window`).

        Args:
            left, right: how far a row sees; None for no limit. ``right=0`` is causal.
            offset: the key at which row 0 sits; None aligns bottom-right, ``kv_len - q_len``.

        Raises:
            TypeError, ValueError: a length or a width is not a whole number of at least 0.
        """
        checked_count("q_len", q_len, 0), checked_count("kv_len", kv_len, 0)
        plain = offset is None or offset == kv_len - q_len
        runs = tuple(_band_runs(range(q_len), 0, kv_len, left, right, offset))
        return cls(q_len, kv_len, runs, (left, right) if plain else None)

    @classmethod
    def packed(
        cls,
        q_lens: Sequence[int],
        kv_lens: Sequence[int] | None = None,
        *,
        left: int | None = None,
        right: int | None = None,
    ) -> Visible:
        """Sequences laid end to end; each row sees only its own sequence, and a band in it, aligned bottom-right there.

        Args:
            q_lens: rows of each sequence. kv_lens: keys of each; None if they are the same tokens.
            left, right: as in :meth:`band`.

        Raises:
            ValueError: there are not as many ``kv_lens`` as ``q_lens``, or one is negative.
        """
        kv_lens = q_lens if kv_lens is None else kv_lens
        if len(q_lens) != len(kv_lens):
            raise ValueError(f"kv_lens must be one for each of the {len(q_lens)} q_lens; got {len(kv_lens)}")
        for name, lengths in (("q_lens", q_lens), ("kv_lens", kv_lens)):
            for length in lengths:
                checked_count(name, length, 0)
        runs: list[Run] = []
        row = key = 0
        for rows, keys in zip(q_lens, kv_lens, strict=True):
            runs += _band_runs(range(row, row + rows), key, key + keys, left, right, key + keys - rows - row)
            row, key = row + rows, key + keys
        return cls(row, key, tuple(runs))

    @classmethod
    def prefix_lm(cls, q_len: int, kv_len: int, prefix: int, *, offset: int | None = None) -> Visible:
        """Every row sees the first ``prefix`` keys, and beyond them its past (:class:`flashlib.masks.Prefix`)."""
        checked_count("prefix", prefix, 0)
        offset = kv_len - q_len if offset is None else offset
        prefix = min(prefix, kv_len)
        # Up to this row the past lies within the prefix.
        turn = min(max(prefix - 1 - offset, 0), q_len)
        within = _band_runs(range(turn), 0, prefix, None, None, 0)
        return cls(q_len, kv_len, (*within, *_band_runs(range(turn, q_len), 0, kv_len, None, 0, offset)))

    @classmethod
    def from_intervals(
        cls,
        start: Sequence[int],
        stop: Sequence[int],
        kv_len: int,
        widths: tuple[int | None, int | None] | None = None,
    ) -> Visible:
        """From the interval of every row, as :class:`flashlib.masks.RowIntervals` has them. Costs a step for each row.

        widths: of the band, if these are the intervals of one (:meth:`flashlib.masks.Mask.band`).
        """
        runs: list[Run] = []
        for row, (begin, end) in enumerate(zip(start, stop, strict=True)):
            if begin >= end:
                continue
            run = runs[-1] if runs and runs[-1].last == row else None
            if run is not None:
                slopes = _slopes(run, row, begin, end)
                if slopes is not None:
                    runs[-1] = Run(run.first, row + 1, run.start, slopes[0], run.stop, slopes[1])
                    continue
            runs.append(Run(row, row + 1, begin, 0, end, 0))
        return cls(len(start), kv_len, tuple(runs), widths)

    @cached_property
    def pairs(self) -> int:
        """How many (row, key) pairs are visible."""
        return sum(run.pairs for run in self.runs)

    @property
    def rows(self) -> int:
        """How many rows see anything."""
        return self.rows_seeing(0, self.q_len)

    def rows_seeing(self, first: int, last: int) -> int:
        """How many of the rows ``first <= i < last`` see anything."""
        return sum(max(0, min(run.last, last) - max(run.first, first)) for run in self.runs)

    @cached_property
    def seen_keys(self) -> int:
        """How many keys some row sees."""
        ends = sorted((run.start, run.stops_at(run.last - 1)) for run in self.runs)
        seen, reached = 0, 0
        for start, stop in ends:
            seen += max(0, stop - max(start, reached))
            reached = max(reached, stop)
        return seen

    def take(self, parts: Sequence[range]) -> Visible:
        """Some of the rows, one range after another, as rows 0, 1, ..., over the same keys: what one of several devices computes."""
        runs, at = [], 0
        for part in parts:
            for run in self.runs:
                first, last = max(run.first, part.start), min(run.last, part.stop)
                if first < last:
                    moved = first - part.start + at
                    ends = run.starts_at(first), run.start_slope, run.stops_at(first), run.stop_slope
                    runs.append(Run(moved, moved + last - first, *ends))
            at += len(part)
        return Visible(at, self.kv_len, tuple(runs))

    def trimmed(self) -> Visible:
        """The same over the keys from the first that is seen to the last, which become keys 0, 1, ..."""
        if not self.runs:
            return Visible(self.q_len, 0, (), self.widths)
        first = min(run.start for run in self.runs)
        last = max(run.stops_at(run.last - 1) for run in self.runs)
        runs = tuple(replace(run, start=run.start - first, stop=run.stop - first) for run in self.runs)
        return Visible(self.q_len, last - first, runs, self.widths)

    def by_rows(self, block_q: int, block_k: int) -> list[BlockTiles]:
        """For each block of ``block_q`` rows, the tiles of ``block_k`` keys that it meets."""
        checked_count("block_q", block_q, 1), checked_count("block_k", block_k, 1)
        firsts = [run.first for run in self.runs]
        key_tiles = _blocks(self.kv_len, block_k)
        blocks = []
        for row in range(0, self.q_len, block_q):
            end, ranges, covered, latest, earliest = min(row + block_q, self.q_len), [], 0, 0, self.kv_len
            for run in self.runs[max(0, bisect_right(firsts, row) - 1) :]:
                if run.first >= end:
                    break
                first, last = max(row, run.first), min(end, run.last) - 1
                if first > last:
                    continue
                ranges.append((run.starts_at(first), run.stops_at(last)))
                covered += last + 1 - first
                latest, earliest = max(latest, run.starts_at(last)), min(earliest, run.stops_at(first))
            full = 0
            if covered == end - row:
                whole = key_tiles if earliest == self.kv_len else earliest // block_k
                full = max(0, whole - _blocks(latest, block_k))
            blocks.append(_block(ranges, block_k, full))
        return blocks

    def by_keys(self, block_q: int, block_k: int) -> list[BlockTiles]:
        """For each block of ``block_k`` keys, the tiles of ``block_q`` rows that it meets. ``full`` is not counted here: 0."""
        checked_count("block_q", block_q, 1), checked_count("block_k", block_k, 1)
        blocks = []
        for key in range(0, self.kv_len, block_k):
            seeing = (run.rows_that_see(key, min(key + block_k, self.kv_len)) for run in self.runs)
            blocks.append(_block([(rows.start, rows.stop) for rows in seeing if rows], block_q, 0))
        return blocks

    def area(self, block_q: int, block_k: int) -> int:
        """Pairs in seen tiles, visible or not: what an algorithm by tiles computes. A tile at the edge counts as what it holds."""
        last_q, last_k = self.q_len % block_q or block_q, self.kv_len % block_k or block_k
        blocks = self.by_rows(block_q, block_k)
        seen = sum(block.seen for block in blocks[:-1]) * block_q + (blocks[-1].seen * last_q if blocks else 0)
        if last_k == block_k or not self.kv_len:
            return seen * block_k
        # The last tile of keys is narrower.
        edge = (_blocks(self.kv_len, block_k) - 1) * block_k
        rows_of = [
            min(row + block_q, self.q_len) - row
            for row in range(0, self.q_len, block_q)
            if any(
                run.first < row + block_q and run.last > row and run.stops_at(min(row + block_q, run.last) - 1) > edge
                for run in self.runs
            )
        ]
        return seen * block_k - sum(rows_of) * (block_k - last_k)


def checked_count(name: str, value: int, least: int) -> int:
    """``value``, or TypeError or ValueError that names it unless it is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def _band_runs(
    rows: range, first_key: int, last_key: int, left: int | None, right: int | None, offset: int | None
) -> Iterable[Run]:
    """The runs of a band over some rows and the keys ``first_key <= j < last_key``. ``offset``: the key of row 0."""
    for name, width in (("left", left), ("right", right)):
        if width is not None:
            checked_count(name, width, 0)
    offset = last_key - first_key - len(rows) if offset is None else offset
    # The end that moves meets the one that stands still at these rows.
    turns = [] if left is None else [first_key - offset + left]
    turns += [] if right is None else [last_key - offset - right - 1]
    cuts = sorted({rows.start, rows.stop, *(turn for turn in turns if rows.start < turn < rows.stop)})
    for begin, end in itertools.pairwise(cuts):
        start = first_key if left is None else max(first_key, begin + offset - left)
        stop = last_key if right is None else min(last_key, begin + offset + right + 1)
        start_moves = left is not None and begin + offset - left >= first_key
        stop_moves = right is not None and stop < last_key
        if start_moves and not stop_moves:  # rows that sit too far behind the keys see nothing
            end = min(end, begin + stop - start)
        elif stop_moves and not start_moves and stop <= start:  # and so do rows too far before them
            begin, stop = begin + start + 1 - stop, start + 1
        elif stop <= start:
            continue
        if begin < end:
            yield Run(begin, end, start, int(start_moves), stop, int(stop_moves))


def _slopes(run: Run, row: int, start: int, stop: int) -> tuple[int, int] | None:
    """The slopes of a run that this row goes on; None if it does not. A run of one row has none yet."""
    slopes = []
    for before, slope, now in (
        (run.starts_at(row - 1), run.start_slope, start),
        (run.stops_at(row - 1), run.stop_slope, stop),
    ):
        step = now - before
        if step not in (0, 1) or (row - run.first > 1 and step != slope):
            return None
        slopes.append(step)
    return slopes[0], slopes[1]


def _block(ranges: list[tuple[int, int]], block: int, full: int) -> BlockTiles:
    """From ranges of keys, which may overlap, in tiles of ``block``."""
    if not ranges:
        return BlockTiles()
    seen, reached = 0, 0
    for first, last in sorted((first // block, _blocks(last, block)) for first, last in ranges):
        seen += max(0, last - max(first, reached))
        reached = max(reached, last)
    start, stop = min(first for first, _ in ranges), max(last for _, last in ranges)
    return BlockTiles(seen, full, start // block, _blocks(stop, block), stop - start)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
