"""Processes that stand for the ranks of a machine: started once, asked many times, and never left behind."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

START = 180  # seconds for a rank to import all it needs, on a machine that has much to do


class World:
    """``ranks`` processes, each of which has the default process group, gloo, and a mesh of one dimension.

    Args:
        ranks: how many. timeout: seconds, of the process group.
    """

    def __init__(self, ranks: int, timeout: float = 60.0) -> None:
        context = mp.get_context("forkserver")  # one process imports what all need, and is forked
        context.set_forkserver_preload(["worlds", "parallel_ranks", "torch._dynamo"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, port, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        for answer in self.answers(START):
            assert answer == "ready", answer

    @property
    def size(self) -> int:
        return len(self.pipes)

    def ask(self, function: str, *arguments: Any) -> None:
        """Have every rank call ``module:function(mesh, *arguments)``."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((function, arguments))

    def answers(self, within: float = 250.0, ranks: Sequence[int] | None = None) -> list[Any]:
        """What the ranks, or some of them, returned; an exception where one was raised, EOFError where the rank is gone, TimeoutError where nothing came."""
        found: list[Any] = []
        for rank in range(self.size) if ranks is None else ranks:
            pipe = self.pipes[rank]
            try:
                found.append(pipe.recv() if pipe.poll(within) else TimeoutError())
            except (EOFError, ConnectionResetError):
                found.append(EOFError())
        return found

    def run(self, function: str, *arguments: Any, within: float = 250.0) -> list[Any]:
        """What each rank returned. If one raised, that is raised here."""
        self.ask(function, *arguments)
        found = self.answers(within)
        errors = [answer for answer in found if isinstance(answer, BaseException)]
        if errors:
            told = "\n".join("".join(traceback.format_exception(error)) for error in errors)
            raise AssertionError(told)
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for process in self.processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, ranks: int, port: int, timeout: float, pipe: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
        pipe.send("ready")
        while True:
            name, arguments = pipe.recv()
            module, function = name.split(":")
            try:
                answer = getattr(importlib.import_module(module), function)(mesh, *arguments)
            except BaseException as error:
                answer = _sendable(error)
            pipe.send(answer)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)  # not by way of process groups, whose other ranks may be gone


def _sendable(error: BaseException) -> BaseException:
    error.add_note("".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = error.__traceback__ = None
    return error
