"""What a process can leave behind that outlives it: shared memory, queues and semaphores of both kinds, and files of memory.

The seccomp filter refuses to make any of it. This looks, where there is no filter, and in the tests of the filter.
"""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEM_V = {"shm": "shared memory", "msg": "message queue", "sem": "semaphores"}
_POSIX = {"/dev/shm": "shared memory", "/dev/mqueue": "message queue"}


def leftovers() -> frozenset[str]:
    """All that there is now of this user's, a line for each. What a submission left is what was not there before it."""
    user = os.geteuid()
    found = set()
    for name, what in _SYSTEM_V.items():
        try:
            heading, *lines = Path(f"/proc/sysvipc/{name}").read_text().splitlines()
        except (OSError, ValueError):
            continue  # not Linux, or without System V
        columns = heading.split()
        for line in lines:
            entry = dict(zip(columns, line.split(), strict=False))
            if str(user) in (entry.get("uid"), entry.get("cuid")):
                found.add(f"{what} of System V, number {entry.get(f'{name}id')}")
    for directory, what in _POSIX.items():
        try:
            entries = list(os.scandir(directory))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.stat(follow_symlinks=False).st_uid == user:
                    found.add(f"{what} {entry.path}")
            except OSError:
                continue
    return frozenset(found)
