"""Bound a child's threads and memory by a control group of its own, where this process may make one (Linux).

That is so for root with cgroup v1, and with v2 where a group was delegated to the user (`systemd-run --user --scope -p
Delegate=yes ...`). Elsewhere the grader watches the child, which bounds what stays, but not what is there for some milliseconds.
Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/pids.html.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from functools import cache
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "flashlib-grader-"


class ControlGroup:
    """One group for one child: made, joined, and removed when the child is dead."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remove(self) -> None:
        """Remove it. Nothing may be left in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def enclose(pid: int, *, tasks: int, memory: int) -> ControlGroup | None:
    """Put process `pid` into a group of at most so many tasks (threads and processes), and with v2 of so many bytes of memory.

    None where that cannot be done.
    """
    parent = _parent()
    if parent is None:
        return None
    group = ControlGroup(parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(6)}")
    try:
        group.path.mkdir()
        (group.path / "pids.max").write_text(str(tasks))
        with contextlib.suppress(OSError):
            if (group.path / "memory.max").exists():
                (group.path / "memory.max").write_text(str(memory))
        (group.path / "cgroup.procs").write_text(str(pid))
        return group
    except OSError:
        group.remove()
        return None


@cache
def _parent() -> Path | None:
    """The group under which this process may make others that bound tasks."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "pids" in controllers.split(","):
            candidate = ROOT / "pids" / path.lstrip("/")
        elif number == "0":
            candidate = ROOT / path.lstrip("/")
            if "pids" not in _words(candidate / "cgroup.subtree_control"):
                continue
        else:
            continue
        if os.access(candidate, os.W_OK) and (candidate / "cgroup.procs").exists():
            _sweep(candidate)
            return candidate
    return None


def _sweep(parent: Path) -> None:
    """Remove the groups of graders that were killed. Those that hold a process cannot be removed, and stay."""
    for group in parent.glob(f"{PREFIX}*-*"):
        owner = group.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            ControlGroup(group).remove()


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
