"""Attention on several devices: what each of them does, what all do together, and what they send each other.

Three ways to share one attention call, which may be combined:

* **tensor**: each device has some of the heads (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3).
* **sequence**: each device holds some of the tokens; before attention they are exchanged for some of the heads, afterwards back
  (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1). To attention itself that is the same as tensor.
* **context**: each device has some of the rows, and the keys of all pass by (Liu et al. 2023, Ring Attention, arXiv 2310.01889). Under a
  causal mask the last rows have most to do: in ``"zigzag"`` order a device gets one part from the front and its mirror image from
  the back, in ``"contiguous"`` order the last device does nearly twice the mean.

A count of one device and a count of all are different numbers. Everything here says which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flashlib.cost.counts import Problem, Work, formula
from flashlib.cost.visible import Visible, checked_count

__all__ = ["ORDERS", "Parallel", "Shared"]

ORDERS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Shared:
    """One attention call, shared.

    Attributes:
        problems: of each device with rows of its own; each occurs on ``copies`` devices, with other heads.
        copies: devices that differ in their heads alone.
        sent: bytes that one device sends, forward.
    """

    problems: tuple[Problem, ...]
    copies: int
    sent: float

    @property
    def per_device(self) -> list[Work]:
        """By the formula, of each device with rows of its own."""
        return [formula(problem) for problem in self.problems]

    @property
    def slowest(self) -> Problem:
        """That of the device which has most to do."""
        return max(self.problems, key=lambda problem: problem.pairs)

    @property
    def total(self) -> Work:
        """Of all devices together. Bytes are more than those of one device alone would be: keys are read on several."""
        return sum(self.per_device, start=Work()) * self.copies

    @property
    def imbalance(self) -> float:
        """The slowest device's products over the mean."""
        products = [work.products for work in self.per_device]
        return max(products) * len(products) / max(1, sum(products))


@dataclass(frozen=True)
class Parallel:
    """How many devices share attention, and in which ways.

    Raises:
        TypeError, ValueError: a number is not a whole number of at least 1, or there is no such order.
    """

    tensor: int = 1
    sequence: int = 1
    context: int = 1
    order: str = "zigzag"

    def __post_init__(self) -> None:
        for name in ("tensor", "sequence", "context"):
            checked_count(name, getattr(self, name), 1)
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")

    @property
    def devices(self) -> int:
        return self.tensor * self.sequence * self.context

    def heads(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        """Query and KV heads of one device. Where there are fewer KV heads than devices, several hold the same one.

        Raises:
            ValueError: the devices do not divide the heads.
        """
        ways = self.tensor * self.sequence
        if q_heads % ways:
            raise ValueError(f"tensor x sequence must divide the {q_heads} query heads; got {ways}")
        if kv_heads % ways and ways % kv_heads:
            raise ValueError(
                f"tensor x sequence must divide the {kv_heads} KV heads, or be a multiple of them; got {ways}"
            )
        return q_heads // ways, max(1, kv_heads // ways)

    def share(self, problem: Problem) -> Shared:
        """What each device does of one call.

        Raises:
            ValueError: heads or rows cannot be shared like that.
        """
        q_heads, kv_heads = self.heads(problem.q_heads, problem.kv_heads)
        rows_of = self.rows(problem.q_len)
        problems = tuple(
            replace(
                problem, q_heads=q_heads, kv_heads=kv_heads, q_len=sum(map(len, rows)),
                visible=tuple(_taken(mask, rows) for mask in problem.visible),
            )
            for rows in rows_of
        )  # fmt: skip
        return Shared(problems, self.tensor * self.sequence, self.sent(problem))

    def rows(self, q_len: int) -> list[tuple[range, ...]]:
        """The rows of each of the ``context`` devices.

        Raises:
            ValueError: there are fewer rows than parts.
        """
        parts = self.context if self.order == "contiguous" or self.context == 1 else 2 * self.context
        if q_len < parts:
            raise ValueError(f"context must leave each part a row: {q_len} rows do not make {parts} parts")
        cuts = [q_len * n // parts for n in range(parts + 1)]
        pieces = [range(cuts[n], cuts[n + 1]) for n in range(parts)]
        if parts == self.context:
            return [(piece,) for piece in pieces]
        return [(pieces[n], pieces[-1 - n]) for n in range(self.context)]

    def sent(self, problem: Problem) -> float:
        """Bytes that one device sends in the forward of one call, on average.

        sequence: of its tokens' q, k and v what other devices' heads need, and then of out all but its own share. context: of its keys those that the rows of
        another device see, once for each device.
        """
        exchanged = self.batch_bytes(problem, self._rows_sent(problem), self._keys_exchanged(problem))
        per_device = self.batch_bytes(problem, 0, sum(self.received(problem)) / self.context * self._kv_heads(problem))
        return exchanged + per_device

    def sent_backward(self, problem: Problem) -> float:
        """The same of the backward: what was exchanged for heads goes back as gradients. Keys that passed by do so again, and their gradients return."""
        exchanged = self.batch_bytes(problem, self._rows_sent(problem), self._keys_exchanged(problem))
        return exchanged + 2 * (self.sent(problem) - exchanged)

    def batch_bytes(self, problem: Problem, rows: float, keys: float) -> float:
        """Bytes of so many rows, query and output, and of so many keys with their values, each of one head; of all batch entries."""
        row = (problem.head_dim + problem.v_head_dim) * problem.itemsize
        key = (problem.head_dim + problem.v_head_dim) * problem.kv_itemsize
        return problem.batch * (rows * row + keys * key)

    def received(self, problem: Problem) -> list[int]:
        """Keys that come to each of the ``context`` devices: those of others that its rows see, in any batch entry."""
        own = self.rows(problem.kv_len) if self.context > 1 else []
        rows = self.rows(problem.q_len) if self.context > 1 else []
        return [
            _size(seen := _seen(problem, part)) - sum(_size(_cut(seen, keys)) for keys in held)
            for part, held in zip(rows, own, strict=True)
        ] or [0]  # fmt: skip

    def sent_by(self, problem: Problem) -> list[int]:
        """Keys that each of the ``context`` devices sends: to all others together what they see of its own."""
        seen = [_seen(problem, part) for part in self.rows(problem.q_len)]
        return [
            sum(_size(_cut(found, keys)) for to, found in enumerate(seen) if to != n for keys in held)
            for n, held in enumerate(self.rows(problem.kv_len))
        ]

    def _kv_heads(self, problem: Problem) -> int:
        return self.heads(problem.q_heads, problem.kv_heads)[1]

    def _rows_sent(self, problem: Problem) -> float:
        """Rows, each of one head, of a device's tokens that go to others of its ``sequence`` devices."""
        tokens = problem.q_len / (self.sequence * self.context)
        return tokens * problem.q_heads / self.tensor * (self.sequence - 1) / self.sequence

    def _keys_exchanged(self, problem: Problem) -> float:
        """The same of keys. Where there are fewer KV heads than devices, several are sent the same one."""
        tokens = problem.kv_len / (self.sequence * self.context)
        return tokens * (self.sequence - 1) * self._kv_heads(problem)


Ranges = list[tuple[int, int]]


def _seen(problem: Problem, rows: Sequence[range]) -> Ranges:
    """The keys that some rows see, in any batch entry, as ranges that do not touch."""
    ends = sorted(
        (run.starts_at(first), run.stops_at(last - 1))
        for mask in problem.visible
        for run in mask.runs
        for part in rows
        if (first := max(run.first, part.start)) < (last := min(run.last, part.stop))
    )
    joined: Ranges = []
    for start, stop in ends:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _cut(ranges: Ranges, part: range) -> Ranges:
    return [(a, b) for start, stop in ranges if (a := max(start, part.start)) < (b := min(stop, part.stop))]


def _size(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def _taken(mask: Visible, rows: Sequence[range]) -> Visible:
    """Some rows of a mask; the mask itself if they are all of them."""
    return mask if sum(map(len, rows)) == mask.q_len else mask.take(rows)
