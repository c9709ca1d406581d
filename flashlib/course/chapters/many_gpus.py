"""Chapter 17's ranks: as steps on paper, as generators that one process plays, and as processes that really send.

A rank of exercise 18 is a generator of requests. :class:`Network` answers those of all ranks, in one process, and sees when none can go on;
:func:`on_processes` answers them by ``torch.distributed``, on as many processes.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from flashlib.masks import Causal, Mask
from flashlib.measure.records.tables import Table, format_bytes, table
from flashlib.parallel.layout import part_positions
from flashlib.parallel.plan import Plan

__all__ = [
    "Deadlock",
    "Network",
    "Step",
    "by_heads",
    "by_methods",
    "decoding",
    "exercise_on_processes",
    "one_rank_fails",
    "play",
    "ring_steps",
    "run_on_ranks",
    "seen_keys",
    "step_table",
]

WITHIN = 60.0  # seconds until ranks that have not answered are ended
MOST_DIMENSIONS = 7


class Deadlock(Exception):
    """Every rank that has not ended waits for another one. The message says who for whom."""


class BadRequest(ValueError):
    """What was yielded is no request."""


Request = tuple["int | None", Any, "int | None"]  # to whom, what, from whom


@dataclass
class Network:
    """What joins ranks, played in one process: who waits for whom, and what has been sent.

    A send and the receive that belongs to it are answered together, as between GPUs: who sends waits.

    Attributes:
        ranks: how many. sent: bytes from one rank to another, by (from, to). waiting: what each waiting rank still waits for.
    """

    ranks: int
    sent: dict[tuple[int, int], int] = field(default_factory=dict)
    waiting: dict[int, Request] = field(default_factory=dict)
    came: dict[int, Any] = field(default_factory=dict)  # to ranks that have yet to send

    def ask(self, rank: int, request: Any) -> None:
        """Take a rank's request: it waits from here on.

        Raises:
            BadRequest: it is none.
        """
        self.waiting[rank] = parsed(rank, request, self.ranks)

    def answers(self) -> dict[int, Tensor | None]:
        """Those of the waiting ranks that can go on, and what they are told.

        Raises:
            Deadlock: ranks wait, and none of them can go on.
        """
        pairs = [
            (rank, to)
            for rank, (to, _, _) in self.waiting.items()
            if to in self.waiting and self.waiting[to][2] == rank
        ]
        for rank, to in pairs:
            _, x, source = self.waiting[rank]
            self.sent[rank, to] = self.sent.get((rank, to), 0) + x.nbytes
            self.came[to] = x
            self.waiting[rank] = (None, None, source)
        for _, to in pairs:
            self.waiting[to] = (*self.waiting[to][:2], None)
        done = [rank for rank, (to, _, source) in self.waiting.items() if to is None and source is None]
        if self.waiting and not pairs and not done:
            raise Deadlock(self.told())
        for rank in done:
            del self.waiting[rank]
        return {rank: self.came.pop(rank, None) for rank in done}

    def told(self) -> str:
        """Who waits for whom."""
        lines = []
        for rank, (to, _, source) in sorted(self.waiting.items()):
            parts = [] if to is None else [f"rank {to} to receive"]
            parts += [] if source is None else [f"rank {source} to send"]
            lines.append(f"rank {rank} waits for {' and '.join(parts)}")
        return "; ".join(lines)


def parsed(rank: int, request: Any, ranks: int) -> Request:
    """What a rank asks the network for.

    Raises:
        BadRequest: it is no request.
    """
    fields = {"send": 2, "receive": 1, "exchange": 3}
    if not isinstance(request, (tuple, list)) or not request:
        raise BadRequest(f"rank {rank} yielded {type(request).__name__}; expected a tuple")
    kind, *rest = request
    if not isinstance(kind, str) or len(rest) != fields.get(kind, -1):
        raise BadRequest(
            f"rank {rank} yielded {str(kind)[:40]!r} with {len(rest)} more; expected one of {', '.join(fields)}"
        )
    to, x = rest[:2] if kind != "receive" else (None, None)
    source = None if kind == "send" else rest[-1]
    for other in [to] * (kind != "receive") + [source] * (kind != "send"):
        if not isinstance(other, int) or isinstance(other, bool) or not 0 <= other < ranks or other == rank:
            raise BadRequest(f"rank {rank} names rank {str(other)[:40]}; expected another one of 0 to {ranks - 1}")
    if kind != "receive" and not isinstance(x, Tensor):
        raise BadRequest(f"rank {rank} sends {type(x).__name__}; expected a tensor")
    return to, x, source


def play(generators: Sequence[Generator[Any, Any, Any]]) -> tuple[list[Any], Network]:
    """Run generators of ranks side by side in this process: what each returned, and the network they ran on.

    Raises:
        Deadlock: they wait for one another.
    """
    network, results = Network(len(generators)), [None] * len(generators)
    ready: dict[int, Any] = dict.fromkeys(range(len(generators)))
    while ready or network.waiting:
        for rank, answer in ready.items():
            try:
                network.ask(rank, generators[rank].send(answer))
            except StopIteration as end:
                results[rank] = end.value
        ready = network.answers() if network.waiting else {}
    return results, network


def seen_keys(places: Sequence[Sequence[int]], receiver: int, sender: int) -> list[int]:
    """Those keys of a rank that some row of another one sees, under a causal mask."""
    rows = places[receiver]
    return [key for key in places[sender] if rows and key <= rows[-1]]


# On paper


@dataclass(frozen=True)
class Step:
    """What one rank does in one step of a ring.

    Attributes:
        step, rank: which. source: whose keys it has. keys: how many of them. pairs: visible ones, which it computes.
        received: bytes that came for the step, keys and values.
    """

    step: int
    rank: int
    source: int
    keys: int
    pairs: int
    received: int


def ring_steps(
    length: int, ranks: int, layout: str, mask: Mask | None = None, *, kv_heads: int = 3, head_dim: int = 64, itemsize: int = 4
) -> list[Step]:  # fmt: skip
    """The steps of a ring over one sequence, from the plan that :func:`flashlib.parallel.parallel_attention` follows."""
    parts = part_positions(length, ranks, layout)
    plan = Plan.of(mask or Causal(), 1, length, length, parts, parts)
    found = []
    for step in range(ranks):
        for rank in range(ranks):
            source = (rank - step) % ranks
            keys = len(plan.at_hand(rank, source))
            pairs = sum(piece.pairs for piece in plan.pieces(rank, source))
            received = 0 if step == 0 else keys * 2 * kv_heads * head_dim * itemsize
            found.append(Step(step, rank, source, keys, pairs, received))
    return found


def idle_share(steps: Sequence[Step]) -> float:
    """The share of all ranks' time that is spent waiting, if all end a step together."""
    by_step: dict[int, list[int]] = {}
    for step in steps:
        by_step.setdefault(step.step, []).append(step.pairs)
    spent = sum(max(pairs) * len(pairs) for pairs in by_step.values())
    return 1 - sum(map(sum, by_step.values())) / max(1, spent)


def step_table(layouts: Sequence[str], length: int, ranks: int) -> Table:
    """Work and bytes of a ring in some layouts."""
    rows = []
    for layout in layouts:
        steps = ring_steps(length, ranks, layout)
        pairs = [sum(step.pairs for step in steps if step.rank == rank) for rank in range(ranks)]
        sent = sum(step.received for step in steps)
        rows.append(
            (layout, *pairs, f"{max(pairs) * ranks / sum(pairs):.2f}", f"{idle_share(steps):.0%}", format_bytes(sent))
        )
    headers = ["layout", *(f"pairs, rank {rank}" for rank in range(ranks)), "most / mean", "idle", "sent by all"]
    return table(rows, headers)


# On processes


def run_on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, within: float = WITHIN) -> list[Any]:
    """What ``function(mesh, *arguments)`` returns on each of ``ranks`` new processes, joined by gloo. None of them is left when this returns.

    Args:
        function: of a module that the processes can import. within: seconds, after which they are ended.

    Raises:
        RuntimeError: a rank raised, ended or took too long; says which, and what it said.
    """
    context = multiprocessing.get_context("forkserver")  # one process imports what all need, and is forked
    context.set_forkserver_preload([__name__, "flashlib.parallel", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(rank, ranks, port, within, theirs, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    answers: list[Any] = []
    deadline = time.monotonic() + within
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                answers.append((False, f"gave no answer within {within:.0f} s"))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError:
                processes[rank].join(1)
                answers.append((False, f"ended with exit code {processes[rank].exitcode}"))
        wrong = [f"rank {rank} {said}" for rank, (fine, said) in enumerate(answers) if not fine]
        if wrong:
            raise RuntimeError("; ".join(wrong))
        return [said for _, said in answers]
    finally:
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()


def _rank_main(
    rank: int, ranks: int, port: int, within: float, pipe: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=within))
        pipe.send((True, function(init_device_mesh("cpu", (ranks,)), *arguments)))
    except BaseException as error:
        pipe.send((False, f"raised {type(error).__name__}: {error}"))
    finally:
        pipe.close()
        os._exit(0)  # other ranks may be gone, and nothing is to wait for them


def on_processes(mesh: Any, file: str, inputs: list[tuple[Tensor, Tensor, Tensor]], places: list[list[int]]) -> tuple:
    """One rank of exercise 18 on a process of its own: its generator's requests are carried out by ``torch.distributed``.

    Args:
        file: with the reader's ``ring_attention``. inputs: q, k, v of each rank. places: as there.

    Returns:
        ``(out, lse, bytes sent)``, out and lse as lists.
    """
    import torch.distributed as dist

    from flashlib.parallel import count_sent

    rank, wait = mesh.get_local_rank(), timedelta(seconds=WITHIN)
    generator, answer, sent = _module_of(file).ring_attention(rank, *inputs[rank], places), None, 0
    while True:
        try:
            to, x, source = parsed(rank, generator.send(answer), mesh.size())
        except StopIteration as end:
            out, lse = end.value
            return out.tolist(), lse.tolist(), sent
        # How large a message is, the receiver is told by a short one before it.
        works, shape = [], torch.zeros(1 + MOST_DIMENSIONS, dtype=torch.int64)
        if to is not None:
            told = torch.tensor([x.dim(), *x.shape, *[0] * (MOST_DIMENSIONS - x.dim())])
            works.append(dist.isend(told, to))
        if source is not None:
            dist.irecv(shape, source).wait(wait)
        answer = None if source is None else torch.empty(shape[1 : 1 + int(shape[0])].tolist())
        with count_sent() as counted:
            if to is not None:
                works.append(dist.isend(x.contiguous(), to))
        sent += counted.data
        if source is not None:
            works.append(dist.irecv(answer, source))
        for work in works:
            work.wait(wait)


def _module_of(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("of_the_reader", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What chapter 17 runs on its ranks. Arrays come as NumPy has them, which cross to another process as plain bytes.


def by_methods(mesh: Any, arrays: tuple, ways: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Forward and backward by each method and layout: bytes that this rank sent, and its part of the output and of dq."""
    from torch.distributed.device_mesh import init_device_mesh

    from flashlib.parallel import count_sent, parallel_attention, shard

    grid = init_device_mesh("cpu", (2, mesh.size() // 2)) if mesh.size() > 2 else None
    found = []
    for method, layout in ways:
        used = grid if method == "hybrid" else mesh
        q, k, v = (shard(torch.from_numpy(x), mesh, layout=layout).requires_grad_() for x in arrays)
        with count_sent() as forward:
            out = parallel_attention(q, k, v, mesh=used, method=method, layout=layout, causal=True)
        with count_sent() as backward:
            out.sum().backward()
        found.append(
            {"out": out.detach().numpy(), "dq": q.grad.numpy(), "forward": forward.data, "backward": backward.data}
        )
    return found


def by_heads(mesh: Any, arrays: tuple) -> tuple:
    """Tensor parallel: this rank's KV heads and the query heads that use them. ``(out, bytes sent)``."""
    from flashlib.attention import attention
    from flashlib.parallel import count_sent

    rank, ranks = mesh.get_local_rank(), mesh.size()
    with count_sent() as sent:
        q, k, v = (torch.from_numpy(x).chunk(ranks, dim=1)[rank] for x in arrays)
        out = attention(q, k, v, causal=True)
    return out.numpy(), sent.data


def decoding(mesh: Any, arrays: tuple) -> tuple:
    """One query against a cache that is spread over the ranks: ``(out, tokens held here, bytes held here, bytes sent)``."""
    from flashlib.parallel import ShardedKVCache, count_sent

    q, k, v = (torch.from_numpy(x) for x in arrays)
    cache = ShardedKVCache(mesh, 1, k.shape[1], k.shape[2], k.shape[3])
    cache.append(k, v)
    with count_sent() as sent:
        out = cache.attend(q[:, :, -1:])
    return out.numpy(), int(cache.local.lengths[0]), cache.nbytes, sent.data


def one_rank_fails(mesh: Any, arrays: tuple) -> None:
    """Rank 1 is out of memory in the middle of a ring, as it may be in life."""
    from flashlib.parallel import parallel_attention, ring, shard

    if mesh.get_local_rank() == 1:

        def out_of_memory(*_: Any) -> Any:
            raise MemoryError("no room for the keys that came")

        ring.unpack = out_of_memory  # type: ignore[assignment]
    q, k, v = (shard(torch.from_numpy(x), mesh) for x in arrays)
    parallel_attention(q, k, v, mesh=mesh, method="ring")


def exercise_on_processes(file: str, ranks: int = 4, length: int = 64) -> str:
    """Exercise 18's file on real processes: whether it gives what one process would, and what it sent. A line to print."""
    from flashlib.course.grader.front_door import find
    from flashlib.reference import check

    module = _module_of(str(find(file)))
    generator = torch.Generator().manual_seed(18)
    q, k, v = (torch.randn(2, length, 16, generator=generator) for _ in range(3))
    places = [part.tolist() for part in part_positions(length, ranks, "zigzag")]
    inputs = [tuple(x[:, part] for x in (q, k, v)) for part in places]
    try:
        play([module.ring_attention(rank, *inputs[rank], places) for rank in range(ranks)])
    except NotImplementedError:
        return f"{os.path.basename(file)} is not written yet: this cell runs it on {ranks} processes once it is."
    plain = [tuple(x.numpy() for x in one) for one in inputs]
    found = run_on_ranks(_on_process, ranks, file, plain, places)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    for part, (own_out, own_lse, _) in zip(places, found, strict=True):
        out[:, part], lse[:, part] = torch.tensor(own_out), torch.tensor(own_lse)
    verdict = check(out[None], lse[None], q[None], k[None], v[None], causal=True)
    sent = sum(one[2] for one in found)
    return f"{ranks} processes: {'within' if verdict.passed else 'OUTSIDE'} the error budget; {sent:,} bytes sent"


def _on_process(mesh: Any, file: str, inputs: list, places: list[list[int]]) -> tuple:
    return on_processes(mesh, file, [tuple(map(torch.from_numpy, one)) for one in inputs], places)
