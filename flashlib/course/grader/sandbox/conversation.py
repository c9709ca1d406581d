"""One process with one student's file in it, as the grader talks to it: calls, answers, deadlines, and its end."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from flashlib.course.grader.sandbox import cgroup, scratch, wire
from flashlib.course.grader.sandbox.arena import Arena
from flashlib.course.grader.sandbox.confine import MIB, Protections
from flashlib.course.grader.sandbox.handout import Handout
from flashlib.course.grader.sandbox.outcome import Ending, Limits, Reply, SandboxError, StudentError
from flashlib.course.grader.text import clean, clean_tree

ZYGOTE_ANSWER_SECONDS = 15.0
FORK_SECONDS = 30.0
ENDING_SECONDS = 0.5  # for a process that hangs up, to end by itself
POLL_SECONDS = 0.05
FEW_FILES = 8  # open at a time, the four that a child begins with included
OUTPUT_KEPT = 8_000  # bytes of what a submission printed that are kept for its report


@dataclass
class Child:
    """One process with one student's file in it. Every method that waits has a deadline."""

    sandbox: Any  # the `Sandbox` it was forked in, which stands on this module
    pid: int
    channel: socket.socket
    output_pipe: int
    directory: Path
    limits: Limits
    groups: frozenset[str] = frozenset()  # of forbidden operations
    ending: Ending | None = None
    base_memory: int = 0  # resident, before any of the student's code ran
    _printed: bytes = b""
    _printed_bytes: int = 0
    _silent: bool = False  # whether nothing can print to it any more
    _incoming: bytearray = field(default_factory=bytearray)
    _handles: int = 0
    _group: cgroup.ControlGroup | None = None
    _faults: int | None = None  # the descriptor of its page faults
    _handout: Handout | None = None  # during a call of which tensors are handed out

    def __post_init__(self) -> None:
        self.channel.setblocking(False)
        os.set_blocking(self.output_pipe, False)

    def load(self) -> Protections:
        """Fence in, then import the student's file.

        Raises:
            StudentError: importing failed.
            SandboxError: the child did not get as far as the student's file, or lacks a fence that it must have.
        """
        protections = self.fence_in()
        if protections.missing and self.sandbox.must_fence:
            raise SandboxError(f"not run, for want of a fence: {'; '.join(protections.missing)}")
        self._exchange({"do": "load"}, None, self.limits.seconds)
        return protections

    def fence_in(self) -> Protections:
        """Wait until the child has put up its fences; none of the student's code has run by then.

        Raises:
            SandboxError: it did not get that far.
        """
        try:
            self._take_faults(time.monotonic() + FORK_SECONDS)
            ready, _ = self._reply(time.monotonic() + FORK_SECONDS)
            protections = Protections(ready["active"], ready["missing"])
            self.base_memory = psutil.Process(self.pid).memory_info().rss
        except (StudentError, LookupError, psutil.Error) as error:
            said = self.take_printed().strip().splitlines()[-1:]
            raise SandboxError(f"the sandbox could not be set up: {' '.join(said) or error}") from error
        self._group = cgroup.enclose(self.pid, tasks=self.limits.threads, memory=self.base_memory + self.limits.memory)
        how = "control group" if self._group else "watched by the grader"
        protections.active.append(f"at most {self.limits.threads} threads ({how})")
        return protections

    def _take_faults(self, deadline: float) -> None:
        self._wait(deadline, writing=False)
        told, fds, _, _ = socket.recv_fds(self.channel, 1, 1)
        if not told:
            raise self._died()
        self._faults = fds[0] if fds else None

    @property
    def hands_out(self) -> bool:
        """Whether tensors can be handed out to it piece by piece."""
        return self._faults is not None

    def call(
        self,
        function: str,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        on: wire.Handle | None = None,
        keep: bool = False,
        meter: dict[str, torch.Tensor] | None = None,
        fast_memory: int = 0,
        guarded: Mapping[str, tuple[torch.Tensor, int]] | None = None,
        together: bool = False,
        seconds: float | None = None,
    ) -> Reply:
        """Run `function(*args, **kwargs)` of the student's file, or of the object `on`, in the child.

        Args:
            keep: leave the result in the child and answer with a `Handle` to it.
            meter: count tensors made and bytes moved; names and tensors (among the arguments) to follow.
            fast_memory: of the meter, in bytes: what is still in it is not moved again.
            guarded: tensors among the arguments, each with memory of its own, that are handed out piece by piece (`handout`), by
                name; and of each how many bytes may lie there at a time. Where `hands_out`.
            together: whether these share the largest room.

        Raises:
            StudentError: there was no usable answer.
        """
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        header = {
            "do": "call",
            "function": function,
            "on": on.number if on else None,
            "args": wire.to_json(list(args), tensors),
            "kwargs": {"dict": {name: wire.to_json(value, tensors) for name, value in kwargs.items()}},
            "fast_memory": fast_memory,
            "meter": None if meter is None else {name: _position(tensor, tensors) for name, tensor in meter.items()},
            "guarded": bool(guarded),
        }
        if keep:
            self._handles += 1
        header["keep"] = self._handles if keep else None
        began = time.monotonic()
        with Arena(tensors, guarded or {}) as arena:
            header["tensors"] = arena.descriptions
            handout = Handout(self._faults, arena.fd, arena.guarded, together) if guarded else None
            answer, results = self._exchange(header, arena.fd, seconds or self.limits.seconds, handout)
            seen = handout.end() if handout else None
            changed = _names(arena.changed(), function, args, kwargs, tensors)
            if on:
                arena.spoil()
        elapsed = time.monotonic() - began
        traffic = None if meter is None else _traffic(answer.get("meter"))
        if keep:
            return Reply(wire.Handle(self._handles), traffic, changed, elapsed)
        try:
            value = wire.from_json(answer.get("value"), results, {})
        except wire.WireError as error:
            raise _tampered(error) from error
        return Reply(value, traffic, changed, elapsed, _kernels(answer.get("compiled")), seen)

    def memory_peak(self) -> int:
        """The most bytes by which it had grown at any time so far; where the system does not say, by which it has grown now."""
        try:
            with open(f"/proc/{self.pid}/status") as file:
                peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            peak = psutil.Process(self.pid).memory_info().rss
        return max(0, peak - self.base_memory)

    def keep_to_memory(self) -> None:
        """From here on it can write no file and open no pipes to speak of: what it puts by is in its memory, and seen. Linux only."""
        process = psutil.Process(self.pid)
        process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
        process.rlimit(psutil.RLIMIT_NOFILE, (FEW_FILES, FEW_FILES))

    def take_printed(self) -> str:
        """What it printed since the last time this was asked, cut to size and cleaned."""
        if self.ending is None:
            with contextlib.suppress(StudentError):
                self._drain()
        text = clean(self._printed.decode("utf-8", errors="replace"))
        more = self._printed_bytes - len(self._printed)
        self._printed, self._printed_bytes = b"", 0
        return f"{text}\n... ({more:,} bytes more)" if more else text

    def end(self) -> Ending:
        """Kill it and all its descendants, and remove its directory. Safe to call again."""
        return self._end(grace=0.0)

    def _end(self, grace: float) -> Ending:
        """As `end`. A process that is ending by itself gets `grace` seconds for it, so that its own status is known."""
        if self.ending is not None:
            return self.ending
        self.ending = (
            Ending()
        )  # whatever fails below, nothing of it is done twice: a descriptor may be another child's by then
        self.channel.close()
        try:
            answer = self.sandbox._ask(
                {"do": "end", "pid": self.pid, "grace": grace, "directory": str(self.directory)}, ZYGOTE_ANSWER_SECONDS
            )
            growth = max(0, answer["peak_memory"] - self.base_memory)
            self.ending = Ending(growth, answer["strays"], answer["status"], answer["stopped"], answer["cpu"])
        except SandboxError:
            pass  # the zygote is gone, and all of its children with it; the next child gets a new one
        finally:
            with contextlib.suppress(OSError, StudentError):
                self._drain()
            os.close(self.output_pipe)
            if self._faults is not None:
                os.close(self._faults)
            scratch.remove(self.directory)
            if self._group is not None:
                self._group.remove()
        return self.ending

    # ------------------------------------------------------------------------------------------------------- waiting

    def _exchange(
        self, header: dict[str, Any], fd: int | None, seconds: float, handout: Handout | None = None
    ) -> tuple[dict[str, Any], list[torch.Tensor]]:
        nonce = secrets.token_hex(8)
        deadline = time.monotonic() + seconds
        frame = wire.encode_header({**header, "id": nonce})
        self._send(frame, fd, deadline)
        answer, results = self._reply(deadline)
        if handout is not None and "mapped" in answer:
            answer, results = self._while_handing_out(handout, answer["mapped"], deadline)
        if answer.get("id") != nonce:
            raise StudentError("tampered", "An answer arrived on the grader's channel that belongs to no question.")
        if "error" in answer:
            raise _reported(answer["error"], self.groups)
        return answer, results

    def _while_handing_out(
        self, handout: Handout, mapped: Any, deadline: float
    ) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """The reply to a call, whose process waits to be told to go on. Where its memory lies is its word, and is tried."""
        try:
            handout.begin(mapped if type(mapped) is int and 0 <= mapped < 1 << 62 else 0)
        except OSError as error:
            raise _tampered(error) from error
        self._handout = handout
        try:
            self._send(wire.encode_header({"do": "go on"}), None, deadline)
            return self._reply(deadline)
        finally:
            self._handout = None

    def _send(self, frame: bytes, fd: int | None, deadline: float) -> None:
        try:
            socket.send_fds(self.channel, [frame[:8]], [fd] if fd is not None else [])
            sent = 8
            while sent < len(frame):
                self._wait(deadline, writing=True)
                with contextlib.suppress(BlockingIOError):
                    sent += self.channel.send(frame[sent:])
        except OSError as error:
            raise self._died() from error

    def _reply(self, deadline: float) -> tuple[dict[str, Any], list[torch.Tensor]]:
        try:
            header = _cleaned(wire.decode_header(self._take(wire.header_size(self._take(8, deadline)), deadline)))
            size = header.get("bytes", 0)
            if type(size) is not int or not 0 <= size <= self.limits.answer:
                raise wire.WireError(f"{str(size)[:40]} bytes of arrays (at most {self.limits.answer:,})")
            data = memoryview(bytearray(self._take(size, deadline)))
            descriptions = header.get("tensors", [])
            if not isinstance(descriptions, list):
                raise wire.WireError("arrays that are not a list")
            return header, [wire.tensor_from(data, description, dense=True) for description in descriptions]
        except wire.WireError as error:
            raise _tampered(error) from error

    def _take(self, size: int, deadline: float) -> bytes:
        while len(self._incoming) < size:
            self._wait(deadline, writing=False)
            try:
                more = self.channel.recv(1 << 20)
            except BlockingIOError:
                continue
            except ConnectionError:
                more = b""
            if not more:
                raise self._died()
            self._incoming += more
        data = bytes(self._incoming[:size])
        del self._incoming[:size]
        return data

    def _wait(self, deadline: float, *, writing: bool) -> None:
        """Until the channel may be ready; meanwhile drain what is printed and watch the limits."""
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise StudentError("timeout", "No answer within the time limit; the process was stopped.")
            poll = select.poll()
            if not self._silent:  # a pipe that nobody can write to is always ready
                poll.register(self.output_pipe, select.POLLIN)
            poll.register(self.channel, select.POLLOUT if writing else select.POLLIN)
            if self._handout is not None:
                poll.register(self._faults, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(1000 * min(POLL_SECONDS, remaining))}
            if self._handout is not None and self._faults in ready:
                try:
                    self._handout.serve()
                except OSError as error:
                    raise self._died() if error.errno == errno.ESRCH else _tampered(error) from error
                continue
            if self.output_pipe in ready:
                self._drain()
            if self.channel.fileno() in ready:
                return
            self._watch()

    def _drain(self) -> None:
        while True:
            try:
                chunk = os.read(self.output_pipe, 1 << 16)
            except BlockingIOError:
                return
            if not chunk:
                self._silent = True  # all writers are gone; the channel will say so
                return
            self._printed += chunk[: OUTPUT_KEPT - len(self._printed)]
            self._printed_bytes += len(chunk)
            if self._printed_bytes > self.limits.output:
                raise StudentError(
                    "output-flood",
                    f"It printed more than {self.limits.output // 1024:,} KiB; the process was stopped.",
                )

    def _watch(self) -> None:
        """Limits that no kernel enforces everywhere: memory, disk, and a child that is dead while another holds its channel."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                raise self._died()
            memory, threads = process.memory_info().rss, process.num_threads()
        except psutil.NoSuchProcess as error:
            raise self._died() from error
        except psutil.AccessDenied:
            return
        if self.base_memory and memory > self.base_memory + self.limits.memory:  # before, it is not the student's yet
            raise _out_of_memory(self.limits)
        used = scratch.usage(self.directory)
        if used.bytes + scratch.unlinked_bytes(self.pid) > self.limits.disk:
            raise StudentError(
                "disk-flood", f"It wrote more than {self.limits.disk // MIB} MiB of files; the process was stopped."
            )
        if used.entries > scratch.ENTRIES_LIMIT or used.depth >= scratch.DEPTH_LIMIT:
            raise StudentError(
                "disk-flood",
                f"It made more than {scratch.ENTRIES_LIMIT:,} files or {scratch.DEPTH_LIMIT} directories within each other; "
                "the process was stopped.",
            )
        if threads > self.limits.threads:
            raise StudentError("too-many-threads", f"It ran {threads} threads; the process was stopped.")

    def _died(self) -> StudentError:
        with contextlib.suppress(OSError, StudentError):
            self._drain()
        ending = self._end(grace=ENDING_SECONDS)
        if ending.stopped:
            how = "it closed the channel to the grader, and was stopped"
        elif os.WIFSIGNALED(ending.status):
            number = os.WTERMSIG(ending.status)
            if number == signal.SIGXCPU:
                return StudentError("timeout", "It used up its processor time; the process was stopped.")
            how = f"killed by {_signal_name(number)}"
        else:
            how = f"exit status {os.WEXITSTATUS(ending.status)}"
        return StudentError("process-ended", f"The process ended before it answered ({how}).")


def _position(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> int:
    for index, known in enumerate(tensors):
        if known is tensor:
            return index
    raise ValueError("a metered tensor must be among the call's arguments")


def _names(changed: list[int], function: str, args, kwargs, tensors) -> tuple[str, ...]:
    named = {id(value): name for name, value in kwargs.items()}
    named |= {id(value): f"argument {position + 1}" for position, value in enumerate(args)}
    return tuple(named.get(id(tensors[index]), f"a tensor passed to {function}") for index in changed)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tampered(error: Exception) -> StudentError:
    return StudentError("tampered", f"Something other than an answer was written on the grader's channel: {error}.")


def _out_of_memory(limits: Limits) -> StudentError:
    return StudentError("memory-limit", f"It needed more than {limits.memory // MIB:,} MiB; the process was stopped.")


def _cleaned(header: dict[str, Any]) -> dict[str, Any]:
    try:
        return clean_tree(header)
    except ValueError as error:
        raise wire.WireError(str(error)) from error


COUNTS = ("largest_elements", "peak_bytes", "programs", "largest_block")
COUNTERS = ("bytes_read", "bytes_written", "calls", "launches", "left")


def _traffic(meter: Any) -> dict[str, Any]:
    """What a child says that its code moved, if it is of the form that an honest child sends. The numbers are its word."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    if (
        not isinstance(meter, dict)
        or not all(is_count(meter.get(name)) for name in COUNTS)
        or not all(isinstance(meter.get(name), dict) for name in COUNTERS)
        or not all(is_count(count) for name in COUNTERS for count in meter[name].values())
        or not isinstance(meter.get("largest_op"), str)
        or not isinstance(meter.get("largest_shape"), list)
        or not all(is_count(size) for size in meter["largest_shape"])
    ):
        raise StudentError("tampered", "A malformed count of traffic was written on the grader's channel.")
    return {name: meter[name] for name in (*COUNTS, *COUNTERS, "largest_op", "largest_shape")}


def _kernels(compiled: Any) -> dict[str, list[tuple[str, str]]] | None:
    """What a child says that it compiled, if it is of the form that an honest child sends."""
    if compiled is None:
        return None
    if not isinstance(compiled, dict) or not all(
        isinstance(dots, list)
        and all(isinstance(dot, list) and len(dot) == 2 and all(isinstance(word, str) for word in dot) for dot in dots)
        for dots in compiled.values()
    ):
        raise StudentError("tampered", "A malformed list of kernels was written on the grader's channel.")
    return {name: [tuple(dot) for dot in dots] for name, dots in compiled.items()}


def _reported(error: Any, groups: frozenset[str]) -> StudentError:
    """What the child says went wrong. It is the student's word: text, cut to size, and no more."""
    if not isinstance(error, dict):
        return StudentError("tampered", "A malformed error was written on the grader's channel.")
    said = {key: str(error.get(key, ""))[:4000] for key in ("kind", "type", "message", "traceback", "group")}
    messages = {
        "missing": f"There is no {said['message']} in the file.",
        "syntax": "The file is not valid Python.",
        "not-implemented": "Not written yet.",
        "forbidden": f"{said['message']}.",
        "exit": "It called exit instead of returning.",
        "memory-limit": "It ran out of the memory it may use.",
        "unsendable": f"It returned {said['message']}, which is no tensor, number or tuple of them.",
        "exception": f"It raised {said['type']}: {said['message']}",
        "out-of-bounds-load": f"A kernel loads from memory it was not given. {said['message']}.",
        "out-of-bounds-store": f"A kernel stores to memory it was not given. {said['message']}.",
        "compile-error": f"The compiler for GPUs refuses a kernel: {said['message']}",
        "race": f"Two programs of a kernel race. {said['message']}.",
    }
    if said["kind"] not in messages or (said["kind"] == "forbidden" and said["group"] not in groups):
        return StudentError("tampered", "A malformed error was written on the grader's channel.")
    return StudentError(said["kind"], messages[said["kind"]], said["traceback"], said["group"])
