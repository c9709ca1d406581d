"""A child's temporary directory: made, measured and removed, whatever the child built in it.

A submission may nest directories deeper than a path can name or Python can recurse, make them unreadable, or fill them with
names. So nothing here recurses, builds a path out of what it finds, or holds more than a few descriptors. Standard library only:
the zygote uses it too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PREFIX = "flashlib-grader-"
DEPTH_LIMIT = 64  # directories within each other
ENTRIES_LIMIT = 2_000
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Usage:
    """What lies in a directory: bytes of files, entries, and the deepest nesting. Counting stops where a limit is passed."""

    bytes: int
    entries: int
    depth: int


def make() -> Path:
    """A fresh directory that only this user may enter."""
    return Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()


def usage(directory: Path) -> Usage:
    """How much is in `directory`. What vanishes meanwhile, or cannot be read, counts as an entry without bytes."""
    size = entries = deepest = 0
    try:
        fds = [os.open(directory, _OPEN)]
    except OSError:
        return Usage(0, 0, 0)
    stack = [os.scandir(fds[0])]
    try:
        while stack and entries <= ENTRIES_LIMIT and len(stack) <= DEPTH_LIMIT:
            entry = _next(stack[-1])
            if entry is None:
                stack.pop().close()
                os.close(fds.pop())
                continue
            entries += 1
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    fds.append(os.open(entry.name, _OPEN, dir_fd=fds[-1]))
                    stack.append(os.scandir(fds[-1]))
                else:
                    size += entry.stat(follow_symlinks=False).st_size
            deepest = max(deepest, len(stack) - 1)
        return Usage(size, entries, deepest)
    finally:
        for scan in stack:
            scan.close()
        for fd in fds:
            os.close(fd)


def unlinked_bytes(pid: int) -> int:
    """Bytes of files that process `pid` holds open and that no directory names any more (Linux; elsewhere 0).

    Not those of memory that the grader shares with it, which has no file behind it.
    """
    total = 0
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{pid}/fd/{name}")
                shared = os.readlink(f"/proc/{pid}/fd/{name}").startswith("/memfd:")
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 0 and not shared:
                    total += found.st_size
    return total


def _next(scan) -> os.DirEntry | None:
    try:
        return next(scan, None)
    except OSError:
        return None


def remove(directory: Path | str) -> bool:
    """Remove `directory` with all that is in it. Nobody may be writing to it any more. True if nothing is left.

    What is in a directory is moved up before that goes, so that however deep the nesting is, only two are ever open.
    """
    try:
        top = os.open(directory, _OPEN)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    moved, waiting = secrets.token_hex(8), 0
    try:
        _try(os.fchmod, top, 0o700)
        names = _names(top)
        while names:
            name = names.pop()
            if not _is_directory(name, top):
                _try(os.unlink, name, dir_fd=top)
                continue
            _try(os.chmod, name, 0o700, dir_fd=top)
            try:
                inner = os.open(name, _OPEN, dir_fd=top)
            except OSError:
                continue
            try:
                for entry in _names(inner):
                    if not _is_directory(entry, inner):
                        _try(os.unlink, entry, dir_fd=inner)
                        continue
                    _try(os.chmod, entry, 0o700, dir_fd=inner)  # a directory that moves must be writable itself
                    waiting += 1
                    if _try(os.rename, entry, f"{moved}-{waiting}", src_dir_fd=inner, dst_dir_fd=top):
                        names.append(f"{moved}-{waiting}")
            finally:
                os.close(inner)
            _try(os.rmdir, name, dir_fd=top)
    finally:
        os.close(top)
    return _try(os.rmdir, directory)


def _names(fd: int) -> list[str]:
    try:
        return os.listdir(fd)
    except OSError:
        return []


def _is_directory(name: str, fd: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _try(function: Callable[..., object], *args: object, **kwargs: object) -> bool:
    try:
        function(*args, **kwargs)
    except OSError:
        return False
    return True
