"""The grader's side of the sandbox: start children, send arrays, receive arrays, and end what does not end itself."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import secrets
import select
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from flashlib.course.grader.sandbox import cgroup, scratch, wire
from flashlib.course.grader.sandbox.confine import MIB, Fence, Protections
from flashlib.course.grader.sandbox.handout import PIECE, Guarded, Handout, Seen
from flashlib.course.grader.text import clean, clean_tree

ZYGOTE_START_SECONDS = 120.0
ZYGOTE_ANSWER_SECONDS = 15.0
FORK_SECONDS = 30.0
ENDING_SECONDS = 0.5  # for a process that hangs up, to end by itself
POLL_SECONDS = 0.05
FEW_FILES = 8  # open at a time, the four that a child begins with included
SYSTEM_PLACES = {"/usr", "/lib", "/lib64", "/sys/devices/system", "/proc", "/dev/urandom", "/dev/zero"}
SYSTEM_PLACES |= {"/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"}
ALWAYS_FORBIDDEN = "compile-called"  # the group that every child refuses
OUTPUT_KEPT = 8_000  # bytes of what a submission printed that are kept for its report
REPOSITORY = Path(__file__).resolve().parents[4]
PACKAGE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Limits:
    """What one submission may use.

    Attributes:
        seconds: wall-clock time for one call; importing the file counts as one.
        total_seconds: wall-clock time for the whole submission.
        memory: bytes on top of what PyTorch itself takes.
        answer: bytes of arrays in one answer.
        output: bytes printed in one property's check; more ends the process.
        disk: bytes in its temporary directory.
        processes: whether it may start processes.
        threads: that may run in it at a time.
    """

    seconds: float = 20.0
    total_seconds: float = 180.0
    memory: int = 2048 * MIB
    answer: int = 256 * MIB
    output: int = MIB
    disk: int = 64 * MIB
    processes: bool = False
    threads: int = 64


class StudentError(Exception):
    """The submission gave no usable answer.

    Attributes:
        kind: `"timeout"`, `"memory-limit"`, `"process-ended"`, `"output-flood"`, `"disk-flood"`,
            `"too-many-threads"`, `"tampered"`, or what
            the child itself reported: `"exception"`, `"syntax"`, `"missing"`, `"not-implemented"`, `"forbidden"`,
            `"exit"`, `"unsendable"`, and of Triton kernels `"out-of-bounds-load"`, `"out-of-bounds-store"`, `"race"`.
        message: what happened, one sentence.
        traceback: the frames in the student's own file, or "".
        group: for `"forbidden"`, which group of operations.
    """

    def __init__(self, kind: str, message: str, traceback: str = "", group: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.traceback, self.group = kind, message, traceback, group


class SandboxError(RuntimeError):
    """The sandbox itself could not work; no fault of the submission."""


@dataclass(frozen=True)
class Reply:
    """What one call gave: the value, its traffic if metered, the arguments it changed, seconds, and kernels that were compiled.

    `compiled` is None but in a sandbox for compiling. There it holds, by the name of each kernel that was launched, how it
    multiplies tiles: pairs such as `("ieee", "f32")`. `seen` is what was handed out of guarded tensors, or None.
    """

    value: Any
    meter: dict[str, Any] | None
    changed: tuple[str, ...]
    seconds: float
    compiled: dict[str, list[tuple[str, str]]] | None = None
    seen: Seen | None = None


@dataclass(frozen=True)
class Ending:
    """How a child went.

    Attributes:
        memory_growth: the most resident memory it took on top of what it began with, in bytes.
        strays: processes it left behind.
        status: its exit status, as from `os.wait`.
        stopped: whether the grader had to stop it, so that the status is not its own doing.
        cpu_seconds: the processor time that it took.
    """

    memory_growth: int = 0
    strays: int = 0
    status: int = 0
    stopped: bool = True
    cpu_seconds: float = 0.0


# ------------------------------------------------------------------------------------------------------------- reading


def readable_paths(hidden: Sequence[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths a child may read, and directories it may only list, so that nothing under `hidden` can be read.

    A child needs Python, its packages and a few system files; not this repository, nor anyone's home.
    """
    places = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *site.getsitepackages(), *_import_path()}
    places |= SYSTEM_PLACES
    hidden = [path.resolve() for path in (*hidden, PACKAGE)]
    allowed: set[str] = set()
    listable: set[str] = set()
    for place in places:
        path = Path(place).resolve()
        if path != REPOSITORY and path.exists():
            _allow_around(path, hidden, allowed, listable)
    return tuple(sorted(allowed)), tuple(sorted(listable))


def _allow_around(path: Path, hidden: list[Path], allowed: set[str], listable: set[str]) -> None:
    if any(path == secret or secret in path.parents for secret in hidden):
        return
    if not any(path in secret.parents for secret in hidden):
        allowed.add(str(path))
        return
    listable.add(str(path))
    for entry in path.iterdir():
        if not entry.is_symlink():
            _allow_around(entry, hidden, allowed, listable)


def _import_path() -> list[str]:
    here = Path.cwd()
    return [
        entry
        for entry in sys.path
        if entry and os.path.isdir(entry) and Path(entry).resolve() not in (here, REPOSITORY)
    ]


# -------------------------------------------------------------------------------------------------------------- zygote


class Sandbox:
    """A zygote and the children forked from it, one at a time. One sandbox per job: its descendants are that job's.

    Args:
        preload: modules to import before forking (`("triton",)`), so that each child has them at once.
        environment: variables for the zygote and its children, set before anything is imported.
        hidden: files and directories that no child may read.
        kernel_fences: use Landlock and seccomp where there are; False stands for a system without, in tests.
        must_fence: run nobody's code where a fence is missing.
        compiles: launches of Triton kernels are compiled for GPUs in place of run; not in the interpreter.

    Raises:
        SandboxError: this system cannot fork, or the zygote did not start.
    """

    def __init__(
        self,
        *,
        preload: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        hidden: Sequence[Path] = (),
        kernel_fences: bool = True,
        must_fence: bool = False,
        compiles: bool = False,
    ) -> None:
        if not hasattr(os, "fork"):
            raise SandboxError("the grader needs Linux or macOS (on Windows, run it under WSL): it forks processes")
        self.preload = tuple(preload)
        self.kernel_fences, self.must_fence, self.compiles = kernel_fences, must_fence, compiles
        self._hidden, self._compiling = tuple(hidden), None
        self.environment = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **(environment or {}),
        }
        self.readable, self.listable = readable_paths(hidden)
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def for_compiling(self) -> Sandbox:
        """The sandbox beside this one in which launches are compiled; it is started when it is needed, and closed with this one."""
        if self._compiling is None:
            environment = {name: value for name, value in self.environment.items() if name != "TRITON_INTERPRET"}
            self._compiling = Sandbox(
                preload=self.preload,
                environment=environment,
                hidden=self._hidden,
                kernel_fences=self.kernel_fences,
                must_fence=self.must_fence,
                compiles=True,
            )
        return self._compiling

    def close(self) -> None:
        """End the zygote and everything under it. It forks no more children."""
        self._closed = True
        if self._compiling is not None:
            self._compiling.close()
        self._stop()

    def fences(self) -> Protections:
        """Which fences stand around a child here, tried with a child that does nothing.

        Raises:
            SandboxError: the sandbox does not work.
        """
        child = self.open_child(b"", "nothing.py", Limits(), {})
        try:
            return child.fence_in()
        finally:
            child.end()

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            self._kill_tree()
            self._process = None

    def open_child(
        self,
        source: bytes | Mapping[str, bytes],
        filename: str,
        limits: Limits,
        forbidden: dict[str, Sequence[str]],
        *,
        metered: bool = False,
    ) -> Child:
        """A fresh process in a fresh directory that holds `source` as `filename`; `Child.end` removes both.

        `source` may also be several files by name, `filename` among them, which may import the others.

        Args:
            metered: its first call will be metered, so make sure that what the meter needs is loaded.
        """
        directory = scratch.make()
        try:
            for name, content in ({filename: source} if isinstance(source, bytes) else source).items():
                (directory / name).write_bytes(content)
            return self._fork(directory, directory / filename, limits, forbidden, metered)
        except BaseException:
            scratch.remove(directory)
            raise

    def _fork(
        self, directory: Path, file: Path, limits: Limits, forbidden: dict[str, Sequence[str]], metered: bool
    ) -> Child:
        self._start()
        ours, theirs = socket.socketpair()
        output, their_output = os.pipe()
        fence = Fence(
            readable=self.readable,
            listable=self.listable,
            writable=str(directory),
            memory=limits.memory,
            cpu_seconds=math.ceil(limits.total_seconds),
            processes=limits.processes,
            kernel=self.kernel_fences,
        )
        order = {
            "do": "fork",
            "metered": metered,
            "directory": str(directory),
            "file": str(file),
            "environment": {**self.environment, **dict.fromkeys(("HOME", "TMPDIR", "TRITON_HOME"), str(directory))},
            "forbidden": forbidden,
            "fence": asdict(fence),
        }
        with theirs:
            try:
                answer = self._ask(order, FORK_SECONDS, fds=[theirs.fileno(), their_output])
            except SandboxError:
                ours.close()
                os.close(output)
                raise
            finally:
                os.close(their_output)
        return Child(self, answer["pid"], ours, output, directory, limits, frozenset({*forbidden, ALWAYS_FORBIDDEN}))

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        if self._closed:
            raise SandboxError("the sandbox was closed")
        self._stop()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-E", "-B", str(Path(__file__).with_name("zygote.py")), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=tempfile.gettempdir(),
                env=self.environment,
                start_new_session=True,
            )
        setup = {
            "sys_path": _import_path(),
            "package": str(PACKAGE),
            "preload": self.preload,
            "compiles": self.compiles,
        }
        self._ask({**setup, "environment": self.environment}, ZYGOTE_START_SECONDS)

    def _ask(self, order: dict[str, Any], seconds: float, fds: Sequence[int] = ()) -> dict[str, Any]:
        text = json.dumps(order).encode()
        try:
            self._control.settimeout(seconds)
            socket.send_fds(self._control, [len(text).to_bytes(8, "big")], list(fds))
            self._control.sendall(text)
            size = int.from_bytes(self._receive(8), "big")
            return json.loads(self._receive(size))
        except (OSError, EOFError) as error:
            self._kill_tree()
            raise SandboxError(
                f"the process that forks children does not answer ({error or type(error).__name__})"
            ) from error

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (more := self._control.recv(size - len(data))):
                raise EOFError("it has ended")
            data += more
        return data

    def _kill_tree(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            zygote = psutil.Process(self._process.pid)
            for process in [*zygote.children(recursive=True), zygote]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()


# --------------------------------------------------------------------------------------------------------------- child


@dataclass
class Child:
    """One process with one student's file in it. Every method that waits has a deadline."""

    sandbox: Sandbox
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
        with _Arena(tensors, guarded or {}) as arena:
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
                time.sleep(0.001)  # all writers are gone; the channel will say so
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


# --------------------------------------------------------------------------------------------------------------- arena


class _Arena:
    """The arguments of one call in memory that grader and child share.

    The child computes on these very bytes. So whether it changed its inputs is not its word: the grader reads the bytes
    back and compares them with its own. What is guarded is not put there: it is handed out during the call.
    """

    def __init__(
        self, tensors: list[torch.Tensor], guarded: Mapping[str, tuple[torch.Tensor, int]] | None = None
    ) -> None:
        guards = {tensor.untyped_storage()._cdata: (name, room) for name, (tensor, room) in (guarded or {}).items()}
        self.guarded: list[Guarded] = []
        self.descriptions: list[dict[str, Any]] = []
        self._pristine: dict[int, bytes] = {}  # position -> bytes of one storage
        self._positions: list[int] = []
        placed: dict[int, int] = {}
        end = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in placed:
                data = bytes(wire.storage_bytes(tensor.detach()))
                if storage._cdata in guards:
                    end = _whole_pieces(end)
                    self.guarded.append(Guarded(guards[storage._cdata][0], end, data, guards[storage._cdata][1]))
                else:
                    self._pristine[end] = data
                placed[storage._cdata] = end
                end += wire.padded(len(data))
                if storage._cdata in guards:
                    end = _whole_pieces(end)
            self._positions.append(placed[storage._cdata])
            self.descriptions.append(wire.describe(tensor, placed[storage._cdata]))
        self.fd = _shared_memory(max(end, mmap.PAGESIZE))
        for position, data in self._pristine.items():
            written = 0
            while written < len(data):
                written += os.pwrite(self.fd, data[written : written + (1 << 26)], position + written)

    def __enter__(self) -> _Arena:
        return self

    def __exit__(self, *exc) -> None:
        os.close(self.fd)

    def changed(self) -> list[int]:
        """Indices of the tensors whose storage no longer holds what was sent."""
        different = {
            position
            for position, data in self._pristine.items()
            if any(
                os.pread(self.fd, len(part), position + start) != part
                for start in range(0, len(data), 1 << 26)
                if (part := data[start : start + (1 << 26)])
            )
        }
        return [index for index, position in enumerate(self._positions) if position in different]

    def spoil(self) -> None:
        """Write NaN over the arguments: they are the caller's, and an object that holds on to them is seen to."""
        for position, data in self._pristine.items():
            os.pwrite(self.fd, b"\xff" * len(data), position)


def _whole_pieces(size: int) -> int:
    return -(-size // PIECE) * PIECE


def _shared_memory(size: int) -> int:
    """A file descriptor of anonymous shared memory. Sealed where it can be, so that nobody changes its size."""
    if hasattr(os, "memfd_create"):
        import fcntl

        fd = os.memfd_create("flashlib-arguments", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())
