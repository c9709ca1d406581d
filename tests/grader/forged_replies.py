"""Replies that no honest child sends: an honest one, changed at random, as JSON or as bytes."""

import contextlib
import json
import mmap
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

from flashlib.course.grader.sandbox import child as honest
from flashlib.course.grader.sandbox import wire
from flashlib.course.grader.sandbox.conversation import Child
from flashlib.course.grader.sandbox.outcome import Limits

ODD = [
    None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "=1+1", "\ud800\x1b[2J", "a" * 9000,
    [], {}, [[]], [None] * 50, {"tensor": 0}, {"tensor": 10**9}, {"tensor": -1}, {"handle": 1}, {"dtype": "float128"}, {"float": "nan"},
    {"float": "1"}, {"tuple": {}}, {"tuple": []}, {"dict": []}, {"a": 1, "b": 2}, {"": ""},
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def changed(node: Any, rng: random.Random, odds: float = 0.15) -> Any:
    """A JSON value with some of its nodes replaced, removed, doubled or swapped."""
    if rng.random() < odds:
        return nested(rng.choice([3, 30, 300])) if rng.random() < 0.05 else rng.choice(ODD)
    if isinstance(node, dict):
        items = [(key, changed(value, rng, odds)) for key, value in node.items()]
        if items and rng.random() < odds:
            items.pop(rng.randrange(len(items)))
        if rng.random() < odds:
            items.append(
                (rng.choice(["tensor", "kind", "group", "id", "error", "meter", "bytes", "\ud800"]), rng.choice(ODD))
            )
        return dict(items)
    if isinstance(node, list):
        items = [changed(value, rng, odds) for value in node]
        if items and rng.random() < odds:
            items.pop(rng.randrange(len(items)))
        if items and rng.random() < odds:
            items *= 2
        rng.shuffle(items) if rng.random() < odds else None
        return items
    if type(node) is int and rng.random() < odds:
        return rng.choice([node + 1, -node, node * 2**20, str(node), float(node)])
    return node


def forged(header: dict[str, Any], data: bytes, rng: random.Random) -> bytes:
    """A frame with that header and data, changed somewhere."""
    way = rng.randrange(8)
    if way == 0:  # random bytes in its place
        return rng.randbytes(rng.randrange(200))
    if way == 1:  # an error of any kind
        kinds = [
            "exception",
            "forbidden",
            "missing",
            "syntax",
            "exit",
            "race",
            "unsendable",
            "memory-limit",
            "no-such-kind",
            "timeout",
        ]
        error: Any = {
            key: rng.choice([*ODD[12:16], "softmax-called"]) for key in ("type", "message", "traceback", "group")
        }
        header = {"id": header["id"], "error": {**error, "kind": rng.choice(kinds)}}
    elif way < 6:
        kept = {key: header[key] for key in ("id", "bytes") if rng.random() < 0.9}
        mutated = changed(
            {key: value for key, value in header.items() if key not in kept}, rng, rng.choice([0.05, 0.3])
        )
        header = {**mutated, **kept} if isinstance(mutated, dict) else mutated
    text = json.dumps(header).encode()
    if way == 6 and text:  # bits turned in the text
        text = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    if way == 7 and data:  # other numbers
        data = rng.randbytes(len(data)) if rng.random() < 0.5 else bytes([rng.choice([0, 0x7F, 0xFF])]) * len(data)
    size = len(text) if rng.random() < 0.95 else rng.choice([0, 1 << 40, len(text) - 1])
    return size.to_bytes(8, "big") + bytes(text) + data


def forge(frame: bytes, rng: random.Random) -> bytes:
    """An honest frame, forged."""
    size = int.from_bytes(frame[:8], "big")
    return forged(json.loads(frame[8 : 8 + size]), frame[8 + size :], rng)


NOWHERE = "/nowhere/at/all"


class NoSandbox:
    """Stands for the zygote of a child that is a thread of this process: there is nothing to end."""

    must_fence = False

    def _ask(self, order, seconds, fds=()):
        return {"status": 0, "peak_memory": 0, "cpu": 0.0, "strays": 0, "stopped": True}


class Forger:
    """In place of a submission's process: a right solution, of whose answers one is forged.

    Args:
        module: the solution.
        at: which of its answers; later ones are never asked for, unless the check goes on.
    """

    def __init__(self, module: Any, at: int, rng: random.Random, groups: tuple[str, ...]) -> None:
        self.module, self.left, self.rng, self.groups = module, at, rng, frozenset(groups)
        self.objects: dict[int, Any] = {}
        self.handles = 0
        self.honest: list[bytes] = []  # every answer as it would have been

    hands_out = False  # a thread of this process has no memory of its own, whose pages could be handed out or counted

    def child(self, *, metered: bool) -> "Forger":
        return self

    def memory_peak(self) -> int:
        return 0

    def end(self) -> int:
        return 0

    def take_printed(self) -> str:
        return ""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        with answering(self._answer, self.groups) as child:
            child._handles = self.handles
            try:
                return child.call(*args, **kwargs)
            finally:
                self.handles = child._handles

    def _answer(self, frame: bytes, fd: int | None) -> bytes:
        header = wire.decode_header(frame[8:])
        memory = mmap.mmap(fd, 0) if fd is not None else None
        sent: list[bytes] = []
        link = honest._Link(_Sink(sent))
        try:
            answer, tensors = honest._call(header, memory, self.module, self.objects)
            link.reply({"id": header["id"], **answer}, tensors)
        except Exception as error:
            link.reply({"id": header["id"], "error": honest._explain(error, self.module.__file__)})
        whole = b"".join(sent)
        self.honest.append(whole)
        self.left -= 1
        if self.left == 0:
            whole = forge(whole, self.rng)
        return whole


@contextlib.contextmanager
def answering(answer: Callable[[bytes, int | None], bytes], groups: frozenset[str]) -> Iterator[Child]:
    """The grader's side of a child whose answers this process makes, from the request and the memory that comes with it."""
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    for each in (ours, theirs):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
    theirs.settimeout(2.0)
    child = Child(NoSandbox(), os.getpid(), ours, reader, NOWHERE, Limits(seconds=2.0), groups)

    def send(frame: bytes, fd: int | None, deadline: float) -> None:
        theirs.sendall(answer(frame, fd))
        theirs.shutdown(socket.SHUT_WR)

    child._send = send
    try:
        yield child
    finally:
        child.end()
        theirs.close()
        os.close(writer)


class _Sink:
    def __init__(self, sent: list[bytes]) -> None:
        self._sent = sent

    def sendall(self, data: bytes) -> None:
        self._sent.append(bytes(data))
