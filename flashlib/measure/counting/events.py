"""Hardware events of a processor, such as cache misses, by Linux's ``perf_event_open``; and why there are none."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path

__all__ = ["CACHE_EVENTS", "EventsUnavailableError", "count_events"]

HARDWARE, SOFTWARE = 0, 1
# Of the last cache before memory: (type, number), as in linux/perf_event.h.
CACHE_EVENTS = {"cache_references": (HARDWARE, 2), "cache_misses": (HARDWARE, 3)}
SYSCALLS = {"x86_64": 298, "aarch64": 241}
ATTRIBUTES = 112  # bytes of perf_event_attr in its fifth version
DISABLED, EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR = 1 << 0, 1 << 5, 1 << 6
ENABLE, DISABLE = 0x2400, 0x2401
REASONS = {
    errno.ENOENT: "this processor, or the virtual machine, shows no such counter",
    errno.EOPNOTSUPP: "this processor, or the virtual machine, shows no such counter",
    errno.EACCES: "they are for administrators here (kernel.perf_event_paranoid)",
    errno.EPERM: "they are for administrators here (kernel.perf_event_paranoid)",
    errno.ENOSYS: "the system has no perf_event_open",
}


class EventsUnavailableError(RuntimeError):
    """The events cannot be counted here. The message says why."""


def count_events(call: Callable[[], object], events: dict[str, tuple[int, int]] = CACHE_EVENTS) -> dict[str, int]:
    """How many events all threads of this process had while ``call`` ran, outside of the kernel.

    Threads that the call starts are not counted; those of PyTorch's pools are there after a first call.

    Args:
        events: by name, type and number as in ``linux/perf_event.h``.

    Raises:
        EventsUnavailableError: the machine does not count them; says why.
    """
    if platform.system() != "Linux" or platform.machine() not in SYSCALLS:
        raise EventsUnavailableError(
            f"hardware events are read on Linux only; this is {platform.system()} on {platform.machine()}"
        )
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    with contextlib.ExitStack() as stack:
        counters = {name: [_open(event, thread, stack) for thread in threads] for name, event in events.items()}
        every = [counter for of_event in counters.values() for counter in of_event if counter is not None]
        for counter in every:
            _control(counter, ENABLE)
        call()
        for counter in every:
            _control(counter, DISABLE)
        return {
            name: sum(_value(counter) for counter in found if counter is not None) for name, found in counters.items()
        }


def _open(event: tuple[int, int], thread: int, stack: contextlib.ExitStack) -> int | None:
    """A counter of one event on one thread; None if the thread has ended meanwhile."""
    kind, number = event
    flags = DISABLED | EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR
    attributes = struct.pack("IIQQQQQ", kind, ATTRIBUTES, number, 0, 0, 0, flags).ljust(ATTRIBUTES, b"\0")
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(SYSCALLS[platform.machine()], attributes, thread, -1, -1, 0)
    if found >= 0:
        stack.callback(os.close, found)
        return found
    code = ctypes.get_errno()
    if code == errno.ESRCH:
        return None
    raise EventsUnavailableError(f"hardware events cannot be counted: {REASONS.get(code, os.strerror(code))}")


def _control(counter: int, request: int) -> None:
    import fcntl

    fcntl.ioctl(counter, request, 0)


def _value(counter: int) -> int:
    return struct.unpack("Q", os.read(counter, 8))[0]
