"""The grader's side of the sandbox: what may be read in it, the process that children are forked from, and starting them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from flashlib.course.grader.sandbox import scratch
from flashlib.course.grader.sandbox.confine import Fence, Protections
from flashlib.course.grader.sandbox.conversation import FORK_SECONDS, Child
from flashlib.course.grader.sandbox.outcome import Limits, SandboxError

ZYGOTE_START_SECONDS = 120.0
SYSTEM_PLACES = {"/usr", "/lib", "/lib64", "/sys/devices/system", "/proc", "/dev/urandom", "/dev/zero"}
SYSTEM_PLACES |= {"/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"}
ALWAYS_FORBIDDEN = "compile-called"  # the group that every child refuses
REPOSITORY = Path(__file__).resolve().parents[4]
PACKAGE = Path(__file__).resolve().parents[3]


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
