"""The process that children are forked from: PyTorch loaded, no flashlib, no secrets. Run as a script by `session.py`.

It obeys two orders, read from the socket whose number is its only argument: fork a child, and end a child with all that
descends from it. On Linux it is the reaper of orphaned descendants, so a process that a submission detached (double fork,
new session) is still found under it. When the grader goes away it ends what runs and exits.
"""

import contextlib
import gc
import importlib
import importlib.abc
import json
import os
import signal
import socket
import sys
import time
import types
import warnings

SWEEP_SECONDS = 5.0


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    setup, _ = receive(control)
    sys.path[:] = setup["sys_path"]
    os.environ.update(setup["environment"])
    own_modules(setup["package"])
    for name in setup["preload"]:
        importlib.import_module(name)
    child = importlib.import_module("flashlib.course.grader.sandbox.child")
    confine = importlib.import_module("flashlib.course.grader.sandbox.confine")
    if setup["compiles"]:
        child.compiler = importlib.import_module("flashlib.course.grader.sandbox.compiling").Compiled
    if child.interpreting():
        importlib.import_module("flashlib.course.grader.sandbox.rehearsal").rehearse_kernel()
    scratch = importlib.import_module("flashlib.course.grader.sandbox.scratch")
    confine.become_subreaper()
    calm_torch()
    shut_flashlib()
    gc.freeze()
    send(control, {"ready": True})
    directories = set()  # of children that have not been ended
    while True:
        order, fds = receive(control, gone=lambda: [scratch.remove(directory) for directory in directories])
        if order["do"] == "fork":
            if order["metered"]:
                child.rehearse_meter()
            directories.add(order["directory"])
            pid = os.fork()
            if pid == 0:
                control.close()
                child.run(channel=fds[0], output=fds[1], setup=order)
            for fd in fds:
                os.close(fd)
            send(control, {"pid": pid})
        else:
            send(control, end(order["pid"], order["grace"]))
            directories.discard(order["directory"])


def own_modules(package: str) -> None:
    """Make modules of flashlib importable one by one, without running its `__init__`, which would bring all of it."""
    for name, directory in [
        ("flashlib", ""),
        ("flashlib.course", "course"),
        ("flashlib.course.grader", "course/grader"),
        ("flashlib.course.grader.sandbox", "course/grader/sandbox"),
    ]:
        module = types.ModuleType(name)
        module.__path__ = [os.path.join(package, directory)]
        sys.modules[name] = module


class FlashlibIsTheAnswer(importlib.abc.MetaPathFinder):
    """Refuses `import flashlib` with a message that says why."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "flashlib":
            raise ImportError("an exercise cannot import flashlib: it holds the answer. Use torch alone.")
        return None


def shut_flashlib() -> None:
    """From here on flashlib cannot be imported; what the harness itself needs stays in memory under no name."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashlib"]:
        del sys.modules[name]
    sys.meta_path.insert(0, FlashlibIsTheAnswer())


def calm_torch() -> None:
    """One thread (a pool of threads does not survive a fork), and the one-time warning about replaced operators spent."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = torch.library.Library("aten", "IMPL")
        library.impl("_softmax", lambda *args: NotImplemented, "CPU")
        library._destroy()
    torch.softmax(torch.ones(4, 4) @ torch.ones(4, 4), dim=-1)


def end(pid: int, grace: float) -> dict:
    """Kill a child and every descendant; answer how it ended, the most memory it held, and its processor time in seconds.

    It first has `grace` seconds to end by itself; `stopped` says that it did not.
    """
    deadline = time.monotonic() + grace
    ended, status, usage = os.wait4(pid, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.002)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
    if not ended:
        kill(pid)
        _, status, usage = os.wait4(pid, 0)
    strays = sweep()
    unit = 1024 if sys.platform == "linux" else 1
    peak = usage.ru_maxrss * unit
    seconds = usage.ru_utime + usage.ru_stime
    return {"status": status, "peak_memory": peak, "cpu": seconds, "strays": len(strays), "stopped": not ended}


def sweep() -> set:
    """Kill and bury all descendants; answers which there were."""
    found, deadline = set(), time.monotonic() + SWEEP_SECONDS
    while children_left() and time.monotonic() < deadline:
        for pid in descendants():
            found.add(pid)
            kill(pid)
        time.sleep(0.002)
    return found


def children_left() -> bool:
    """Whether any child is still there, once the dead ones are buried. Orphans count: this process is their reaper."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def descendants() -> set:
    import psutil

    return {process.pid for process in psutil.Process().children(recursive=True)}


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def receive(control: socket.socket, gone=lambda: None) -> tuple:
    """The next order. When the grader has gone away, kill what runs, call `gone`, and end."""
    prefix, fds, _, _ = socket.recv_fds(control, 8, 4)
    text = b""
    while prefix and len(text) < (size := int.from_bytes(prefix, "big")):
        if not (more := control.recv(size - len(text))):
            prefix = b""
        text += more
    if not prefix:
        sweep()
        gone()
        os._exit(0)
    return json.loads(text), fds


def send(control: socket.socket, message: dict) -> None:
    text = json.dumps(message).encode()
    control.sendall(len(text).to_bytes(8, "big") + text)


if __name__ == "__main__":
    main()
