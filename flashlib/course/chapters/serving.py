"""A server's memory, without its arithmetic: requests arrive, are read, grow token by token and go.

Two ways to reserve memory for them are compared: room for the longest possible text in each, or pages as they are needed. Both
run the same requests in the same order, as many at once as the memory takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashlib.inference.paged import OutOfPagesError, PagedKVCache


@dataclass(frozen=True)
class Request:
    """What somebody asks of the server: a prompt of so many tokens, and an answer of so many."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Moment:
    """One step of the server.

    Attributes:
        running: requests that got a token in it.
        held: tokens in memory.
        reserved: tokens that there is no room for because of them, themselves included.
    """

    running: int
    held: int
    reserved: int


@dataclass(frozen=True)
class Served:
    """What became of all requests.

    Attributes:
        moments: every step, from the first to the one in which the last request was done.
        preempted: how often a request had to leave before it was done, and to begin again.
    """

    moments: tuple[Moment, ...]
    preempted: int

    @property
    def mean_running(self) -> float:
        return sum(moment.running for moment in self.moments) / len(self.moments)

    @property
    def in_use(self) -> float:
        """The share of the reserved memory that held tokens, over all steps."""
        return sum(moment.held for moment in self.moments) / sum(moment.reserved for moment in self.moments)


def serve_contiguous(requests: Sequence[Request], memory: int, capacity: int) -> Served:
    """Serve them with room for ``capacity`` tokens reserved for each, in a memory for ``memory`` tokens.

    In every step the waiting ones are let in while there is room, and then each that is in gets one token of its answer.

    Raises:
        ValueError: a request is longer than ``capacity``, or ``capacity`` than ``memory``.
    """
    _check_sizes(requests, memory, capacity)
    waiting, running, moments = deque(requests), [], []
    while waiting or running:
        while waiting and len(running) < memory // capacity:
            request = waiting.popleft()
            running.append((request.prompt, request.total))
        running = [(length + 1, total) for length, total in running]
        moments.append(Moment(len(running), sum(length for length, _ in running), len(running) * capacity))
        running = [(length, total) for length, total in running if length < total]
    return Served(tuple(moments), preempted=0)


def serve_paged(requests: Sequence[Request], memory: int, page_size: int) -> Served:
    """Serve them from a :class:`flashlib.inference.paged.PagedKVCache` of ``memory // page_size`` pages.

    A request is let in if there are pages for its prompt and one token. When there are too few for a token of all that are running,
    the one that came last has to leave: its pages are freed, and it waits, first in line, to begin again.

    Raises:
        ValueError: a request is longer than the memory.
    """
    _check_sizes(requests, memory // page_size * page_size, max((request.total for request in requests), default=0))
    cache = PagedKVCache(memory // page_size, page_size, kv_heads=1, head_dim=1)
    waiting, running, moments, preempted = deque(requests), {}, [], 0
    while waiting or running:
        while waiting and (number := _let_in(cache, waiting[0])) is not None:
            running[number] = waiting.popleft()
        while not _append(cache, list(running), 1):
            last = next(reversed(running))
            waiting.appendleft(running.pop(last))
            cache.free(last)
            preempted += 1
        numbers = list(running)
        lengths = cache.lengths(numbers).tolist()
        moments.append(Moment(len(numbers), sum(lengths), (cache.num_pages - cache.free_pages) * page_size))
        for number, length in zip(numbers, lengths, strict=True):
            if length == running[number].total:
                cache.free(number)
                del running[number]
    return Served(tuple(moments), preempted)


def _let_in(cache: PagedKVCache, request: Request) -> int | None:
    """Its number in the cache, its prompt read; None if there are not pages enough for that and one token more."""
    if -(-(request.prompt + 1) // cache.page_size) > cache.free_pages:
        return None
    number = cache.add()
    _append(cache, [number], request.prompt)
    return number


def _append(cache: PagedKVCache, numbers: list[int], count: int) -> bool:
    nothing = torch.zeros(len(numbers), 1, count, 1)  # what the tokens are makes no difference to where they lie
    try:
        cache.append(numbers, nothing, nothing)
    except OutOfPagesError:
        return False
    return True


def _check_sizes(requests: Sequence[Request], memory: int, capacity: int) -> None:
    longest = max((request.total for request in requests), default=0)
    if not longest <= capacity <= memory:
        raise ValueError(
            f"the longest request, {longest} tokens, must fit into capacity, {capacity}, and that into memory, {memory}"
        )


# A script for the stepper: (name of the request, what happens to it, how many tokens or from whom)
SCRIPT: tuple[tuple[str, str, int | str], ...] = (
    ("a", "prompt", 11),
    ("b", "prompt", 6),
    ("a", "token", 1),
    ("b", "token", 1),
    ("a", "token", 1),
    ("b", "token", 1),
    ("b", "token", 1),
    ("c", "prompt", 3),
    ("b", "gone", 0),
    ("c", "token", 6),
    ("d", "fork", "a"),
    ("d", "token", 1),
    ("a", "token", 2),
    ("d", "token", 6),
    ("e", "prompt", 14),
    ("c", "gone", 0),
    ("e", "prompt", 14),
)


@dataclass(frozen=True)
class Replayed:
    """A cache after some lines of a script: who is who in it, and what the last line did."""

    cache: PagedKVCache
    names: dict[str, int]
    said: str


def replay(steps: int, *, slots: int = 48, page_size: int = 4, script: Sequence = SCRIPT) -> Replayed:
    """Run the first ``steps`` lines of a script on a cache of ``slots`` tokens in pages of ``page_size``.

    Raises:
        ValueError: there are not so many lines.
    """
    if not 0 <= steps <= len(script):
        raise ValueError(f"steps must be from 0 to {len(script)}, the lines of the script; got {steps}")
    cache, names, said = PagedKVCache(slots // page_size, page_size, kv_heads=1, head_dim=1), {}, "nothing has happened"
    for name, action, what in script[:steps]:
        said = _perform(cache, names, name, action, what)
    return Replayed(cache, names, said)


def _perform(cache: PagedKVCache, names: dict[str, int], name: str, action: str, what: int | str) -> str:
    free = cache.free_pages
    if action == "gone":
        cache.free(names.pop(name))
        return f"{name} is done: {_pages(cache.free_pages - free)} become free"
    if action == "fork":
        names[name] = cache.fork(names[what])
        return f"{name} continues {what}: no page is taken"
    if action == "prompt":
        names[name] = cache.add()
    count = f"{what} token" if what == 1 else f"{what} tokens"
    if not _append(cache, [names[name]], what):
        if action == "prompt":
            cache.free(names.pop(name))
        return f"{name} brings {count}: out of pages, nothing is written"
    taken = free - cache.free_pages
    return f"{name} brings {count}: {_pages(taken) if taken else 'no page'} taken"


def _pages(count: int) -> str:
    return f"{count} page" if count == 1 else f"{count} pages"
