"""Fence in the current process: resource limits everywhere, and on Linux Landlock, seccomp and dropped capabilities.

Landlock (https://docs.kernel.org/userspace-api/landlock.html) says which files may be read and written, and keeps the
process from TCP and from signalling others. It does not cover changing a file's mode, UDP, or starting processes; a
seccomp filter (https://docs.kernel.org/userspace-api/seccomp_filter.html) refuses those. Both are called through
ctypes, because the package on PyPI covers files alone. What a system lacks is reported, never assumed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
LINUX = sys.platform == "linux"


@dataclass
class Protections:
    """Which fences stand around a child, and which this system does not have. Lines for people to read."""

    active: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fence:
    """What a child may use.

    Attributes:
        readable: files and directories it may read.
        listable: directories whose names it may read, but not the files in them.
        writable: the one directory it may write to.
        memory: bytes of address space on top of what it has now.
        cpu_seconds: of processor time, then the kernel ends it.
        file_bytes: largest file it may write.
        processes: whether it may start processes (a compiler, say).
        kernel: use Landlock and seccomp where the system has them. Off in tests, to stand for a system without.
    """

    readable: tuple[str, ...]
    listable: tuple[str, ...]
    writable: str
    memory: int
    cpu_seconds: int
    file_bytes: int = 16 * MIB
    processes: bool = False
    kernel: bool = True


def confine(fence: Fence) -> Protections:
    """Put the fence up around this process and all it will start. There is no way back."""
    found = Protections()
    _limit_resources(fence, found)
    if not (LINUX and fence.kernel):
        if not fence.processes:
            _set_limit(resource.RLIMIT_NPROC, 0)
            if os.geteuid() == 0:
                found.missing.append("the limit on processes does not hold root: grade as an ordinary user")
            else:
                found.active.append("no new processes (RLIMIT_NPROC)")
        reason = "not on this system" if not LINUX else "switched off"
        found.missing.append(f"Landlock ({reason}): it can read and write what you can, and use the network")
        found.missing.append(f"seccomp ({reason}): it can send signals to your other processes")
        return found
    _drop_capabilities()
    _restrict_files(fence, found)
    _restrict_system_calls(fence, found)
    return found


# ------------------------------------------------------------------------------------------------------------- limits


def _limit_resources(fence: Fence, found: Protections) -> None:
    _set_limit(resource.RLIMIT_CORE, 0)
    if LINUX:
        _set_limit(resource.RLIMIT_MSGQUEUE, 0)
        _set_limit(resource.RLIMIT_MEMLOCK, 0)
    _set_limit(resource.RLIMIT_NOFILE, 256)
    _set_limit(resource.RLIMIT_FSIZE, fence.file_bytes)
    _set_limit(resource.RLIMIT_CPU, fence.cpu_seconds)
    found.active.append(f"processor time at most {fence.cpu_seconds} s, files at most {fence.file_bytes // MIB} MiB")
    if LINUX:
        _set_limit(resource.RLIMIT_AS, _address_space() + fence.memory)
        found.active.append(f"memory at most {fence.memory // MIB} MiB (address space, and watched by the grader)")
    else:
        found.active.append(f"memory at most {fence.memory // MIB} MiB (watched by the grader)")


def _set_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


# ------------------------------------------------------------------------------------------------------- system calls

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int, pointer: object = None) -> None:
    zero = ctypes.c_ulong(0)
    if _libc().prctl(option, ctypes.c_ulong(argument), zero if pointer is None else pointer, zero, zero):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux)."""
    if LINUX:
        _prctl(_PR_SET_PDEATHSIG, 9)


def become_subreaper() -> bool:
    """Let orphaned descendants become this process's children (Linux), so that none can slip away. True if it works."""
    if LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    return LINUX


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapabilityData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def _drop_capabilities() -> None:
    """Give up root's powers, if any, except to read files regardless of their mode (Landlock decides about those)."""
    version_3, read_search = 0x20080522, 1 << 2
    if os.geteuid() != 0:
        return
    data = (_CapabilityData * 2)()
    data[0].effective = data[0].permitted = read_search
    if _libc().capset(ctypes.byref(_CapabilityHeader(version_3, 0)), data):
        # A root without that one power (some containers) gives up all of them.
        data[0].effective = data[0].permitted = 0
        if _libc().capset(ctypes.byref(_CapabilityHeader(version_3, 0)), data):
            raise OSError(ctypes.get_errno(), "capset failed")


# ----------------------------------------------------------------------------------------------------------- Landlock

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NET_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract unix sockets, signals


class _RulesetAttributes(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def landlock_abi() -> int:
    """Version of Landlock that this kernel speaks; 0 for none."""
    if not LINUX:
        return 0
    return max(0, _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _restrict_files(fence: Fence, found: Protections) -> None:
    abi = landlock_abi()
    if abi < 1:
        found.missing.append("Landlock (needs Linux 5.13 or newer): it can read and write what you can, and use TCP")
        return
    rights = (1 << (13 + (abi >= 2) + (abi >= 3))) - 1
    rights |= _IOCTL_DEV if abi >= 5 else 0
    attributes = _RulesetAttributes(rights, _NET_TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    libc = _libc()
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset failed")
    reading = (_READ_FILE | _READ_DIR | (_EXECUTE if fence.processes else 0)) & rights
    _allow(ruleset, fence.readable, reading)
    _allow(ruleset, fence.listable, _READ_DIR)
    _allow(ruleset, ["/dev/null"], (_READ_FILE | _WRITE_FILE) & rights)
    _allow(ruleset, [fence.writable], rights & ~(_EXECUTE | _IOCTL_DEV))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self failed")
    os.close(ruleset)
    covers = ["files"] + (["TCP"] if abi >= 4 else []) + (["signals"] if abi >= 6 else [])
    found.active.append(f"Landlock (version {abi}: {', '.join(covers)}): writes only to its own temporary directory")


def _allow(ruleset: int, paths: Iterable[str], rights: int) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what is not there need not be allowed
        allowed = rights if os.path.isdir(path) else rights & _FILE_RIGHTS
        rule = _PathBeneath(allowed, fd)
        failed = allowed and _libc().syscall(
            _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0)
        )
        os.close(fd)
        if failed:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule failed for {path}")


# ------------------------------------------------------------------------------------------------------------ seccomp

# Numbers of system calls: (x86-64, arm64); None where the architecture has no such call.
_STARTS_PROCESS = {"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)}
_REACHES_OUT = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
}
# What outlives its process, is seen by others of the same user, or holds memory that no limit counts.
_LEAVES_TRACES = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}
# What watches others, or reaches files past the paths that Landlock decides about. Most need powers that were dropped.
_WATCHES = {
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "kcmp": (312, 272),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "lookup_dcookie": (212, 18),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "personality": (135, 92),
    "io_setup": (206, 0),
    "mlock": (149, 228),
    "mlock2": (325, 284),
    "mlockall": (151, 230),
}
# Landlock lets a process change the mode, owner, times and attributes of any file that its user owns.
_CHANGES_ATTRIBUTES = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
# Allowed only on the caller itself: the first argument is its process id (or 0, which means the same, where listed).
_ONLY_ON_SELF = {
    "kill": ((62, 129), False),
    "tkill": ((200, 130), False),
    "tgkill": ((234, 131), False),
    "prlimit64": ((302, 261), True),
    "sched_setaffinity": ((203, 122), True),
    "sched_setscheduler": ((144, 119), True),
    "sched_setparam": ((142, 118), True),
    "sched_setattr": ((314, 274), True),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_CLONE_THREAD = 0x00010000

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
_X32_BIT = 0x40000000  # a second set of numbers for the same calls


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def _restrict_system_calls(fence: Fence, found: Protections) -> None:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        found.missing.append(f"seccomp (not for {machine}): it can start processes and signal yours")
        return
    program = _filter(*_ARCHITECTURES[machine], processes=fence.processes)
    array = (_Instruction * len(program))(*program)
    try:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_SECCOMP, 2, ctypes.byref(_Program(len(program), array)))
    except OSError as error:
        found.missing.append(f"seccomp ({error.strerror}): it can start processes and signal yours")
        return
    starts = "may start processes" if fence.processes else "no new processes"
    found.active.append(
        f"seccomp ({starts}, no sockets, no signals to others, no change of file modes, no shared memory or queues)"
    )


def _filter(column: int, audit_arch: int, *, processes: bool) -> list[_Instruction]:
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data, low words
    refuse = _Instruction(_RETURN, 0, 0, _REFUSE | errno.EPERM)
    allow = _Instruction(_RETURN, 0, 0, _ALLOW)
    program = [
        _Instruction(_LOAD, 0, 0, architecture),
        _Instruction(_JUMP_EQUAL, 1, 0, audit_arch),
        refuse,
        _Instruction(_LOAD, 0, 0, number),
        _Instruction(_JUMP_AT_LEAST, 0, 1, _X32_BIT),
        refuse,
    ]
    refused = {
        **_REACHES_OUT,
        **_LEAVES_TRACES,
        **_WATCHES,
        **_CHANGES_ATTRIBUTES,
        **({} if processes else _STARTS_PROCESS),
    }
    for numbers in refused.values():
        if numbers[column] is not None:
            program += [_Instruction(_JUMP_EQUAL, 0, 1, numbers[column]), refuse]
    if not processes:
        # glibc makes threads by clone3 and falls back to clone, whose flags a filter can read, when there is none.
        program += [
            _Instruction(_JUMP_EQUAL, 0, 1, _CLONE3[column]),
            _Instruction(_RETURN, 0, 0, _REFUSE | errno.ENOSYS),
            _Instruction(_JUMP_EQUAL, 0, 4, _CLONE[column]),
            _Instruction(_LOAD, 0, 0, first_argument),
            _Instruction(_JUMP_ANY_BIT, 0, 1, _CLONE_THREAD),
            allow,
            refuse,
        ]
        for numbers, zero_means_self in _ONLY_ON_SELF.values():
            program += [
                _Instruction(_JUMP_EQUAL, 0, 5, numbers[column]),
                _Instruction(_LOAD, 0, 0, first_argument),
                _Instruction(_JUMP_EQUAL, 2, 0, os.getpid()),
                _Instruction(_JUMP_EQUAL, 1 if zero_means_self else 0, 0, 0),
                refuse,
                allow,
            ]
    return [*program, allow]
