"""One peer on one case, ready to be timed: its inputs, its result held against the oracle, and its calls as one burst."""

from __future__ import annotations

import functools
import math
import random
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashlib.masks import Mask
from flashlib.measure.racing.cases import DTYPES, Case
from flashlib.measure.racing.decoding import DecodeCase, nbytes
from flashlib.measure.racing.peers import Attend, Peer, PeerUnavailableError
from flashlib.measure.racing.timing import capture
from flashlib.reference import Comparison, check, check_gradients

__all__ = [
    "Contender",
    "Inputs",
    "SampledRows",
    "Witness",
    "draw_inputs",
    "failure",
    "inputs_for",
    "prepared",
    "witness_of",
]

ROWS_CHECKED = 256
CACHES_FULL = 3  # all input sets together are at least so many times the L2 cache


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of out, ``[B, H, S, D]``; k and v as their peer arranged them."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor


def draw_inputs(case: Case | DecodeCase, device: torch.device, generator: torch.Generator) -> list[Inputs]:
    """Random inputs, in so many sets that on a GPU a set has left the L2 cache before its next turn."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    size = sum(math.prod(shape) for shape in case.shapes) * DTYPES[case.dtype].itemsize
    count = max(1, math.ceil(CACHES_FULL * cache / size))
    q, k, v = case.shapes

    def tensor(shape):
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[case.dtype])

    drawn = [Inputs(*(tensor(shape) for shape in (q, k, v, q))) for _ in range(count)]
    if isinstance(case, DecodeCase):
        for one in drawn:
            case.share_prefix(one.k)
            case.share_prefix(one.v)
    return drawn


def inputs_for(peer: Peer, case: Case | DecodeCase, drawn: Inputs) -> Inputs:
    """The same inputs in the peer's own type and layout, with gradients wanted where the backward is timed."""

    def tensor(x: Tensor, wants_grad: bool) -> Tensor:
        x = x.to(DTYPES[peer.dtype or case.dtype])
        if peer.rows_first:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.detach().requires_grad_(wants_grad)

    q, k, v = (tensor(x, case.needs_grad) for x in (drawn.q, drawn.k, drawn.v))
    return Inputs(q, *peer.arrange(case, k, v), tensor(drawn.grad_out, False))


class SampledRows(Mask):
    """Some rows of a mask, as a mask: row i is row ``rows[i]`` of the one it was taken from, which has ``q_len`` rows."""

    def __init__(self, mask: Mask, rows: Tensor, q_len: int) -> None:
        self.mask, self.rows, self.q_len = mask, rows, q_len

    def bounds(self, batch, q_len, kv_len, device):
        whole = self.mask.intervals(batch, self.q_len, kv_len, device)
        return whole.start[:, self.rows], whole.stop[:, self.rows]


class Witness:
    """Checks results of one case on one batch entry, one KV head with its query heads, and some of their rows.

    Gradients can be checked on a few rows exactly: where the gradient of out is 0 in all others, those rows add nothing to dK
    and dV. The rows are drawn anew for each case, and all peers are checked on the same ones.
    """

    def __init__(self, case: Case, rng: random.Random) -> None:
        (batch, _, tokens, _), group = case.shapes[0], case.q_heads // case.kv_heads
        self.entry, self.kv_head = rng.randrange(batch), rng.randrange(case.kv_heads)
        self.heads = slice(self.kv_head * group, (self.kv_head + 1) * group)
        drawn = rng.sample(range(tokens), min(tokens, ROWS_CHECKED))
        self.rows = torch.tensor(sorted({0, tokens - 1, *drawn}), device="cpu")
        self.mask = SampledRows(case.mask_rule(), self.rows, tokens)
        self.case = case

    def check(self, attend: Attend, inputs: Inputs) -> Comparison:
        """Run once, and hold what comes out against the float64 oracle within the error budget."""
        rows = self.rows.to(inputs.q.device)
        entry, kv = slice(self.entry, self.entry + 1), slice(self.kv_head, self.kv_head + 1)

        def queries(x: Tensor) -> Tensor:
            return x.detach()[entry, self.heads, rows]

        sampled = (queries(inputs.q), inputs.k.detach()[entry, kv], inputs.v.detach()[entry, kv])
        if not self.case.needs_grad:
            with torch.no_grad():
                out = attend(inputs.q, inputs.k, inputs.v)
            return check(queries(out), None, *sampled, mask=self.mask)
        grad_out = torch.zeros_like(inputs.grad_out)
        grad_out[entry, self.heads, rows] = queries(inputs.grad_out)
        out = attend(inputs.q, inputs.k, inputs.v)
        dq, dk, dv = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), grad_out)
        gradients = (queries(dq), dk[entry, kv], dv[entry, kv])
        return check_gradients(gradients, *sampled, queries(grad_out), mask=self.mask)


class DecodeWitness:
    """Checks a decoding step on the shortest request, the longest and one more, and one KV head with its query heads."""

    def __init__(self, case: DecodeCase, drawn: Inputs, rng: random.Random) -> None:
        order = sorted(range(case.batch), key=case.lengths.__getitem__)
        self.entries = sorted({order[0], order[-1], rng.randrange(case.batch)})
        group, self.kv_head = case.q_heads // case.kv_heads, rng.randrange(case.kv_heads)
        self.heads = slice(self.kv_head * group, (self.kv_head + 1) * group)
        self.case, self.drawn = case, drawn

    def check(self, attend: Attend, inputs: Inputs) -> Comparison:
        """Run once, and hold what comes out against the float64 oracle on the keys as they were drawn."""
        with torch.no_grad():
            out = attend(inputs.q, inputs.k, inputs.v)
        kv = slice(self.kv_head, self.kv_head + 1)
        q, out = (x[self.entries][:, self.heads] for x in (self.drawn.q, out))
        k, v = (x[self.entries, kv] for x in (self.drawn.k, self.drawn.v))
        return check(out, None, q, k, v, mask=self.case.mask_rule(self.entries))


def witness_of(case: Case | DecodeCase, drawn: list[Inputs], rng: random.Random) -> Witness | DecodeWitness:
    """Who checks results of a case."""
    return DecodeWitness(case, drawn[0], rng) if isinstance(case, DecodeCase) else Witness(case, rng)


class Contender:
    """A peer that gave a correct result and can be timed.

    Attributes:
        comparison: its result against the oracle.
        burst: runs the case once on each set of inputs. eager: the same on a GPU as a program does it, one call after another from Python, and
            waits; None without a GPU.
        calls: how many runs that is. once: one of them.
        cache_bytes: of k and v as the peer holds them.
        no_graph: None if a burst is one CUDA graph; else why it is not, so that its time holds Python's launches too.

    Raises:
        flashlib.measure.racing.peers.PeerUnavailableError: the peer cannot run the case.
    """

    def __init__(
        self, peer: Peer, case: Case | DecodeCase, drawn: list[Inputs], witness: Witness | DecodeWitness
    ) -> None:
        on_gpu = drawn[0].q.is_cuda
        stream = torch.cuda.Stream() if on_gpu else None
        # Autograd runs a backward on the stream of its forward, so everything runs on the one that is captured.
        with _on(stream):
            self.comparison, sets, runs = prepared(peer, case, drawn, witness)
            for run in runs:
                run()
        self.calls, self.once, self.cache_bytes = len(runs), runs[0], nbytes((sets[0].k, sets[0].v))
        self.no_graph = "no GPU" if not on_gpu else None if peer.captures else "reads the host's memory"
        self.burst: Callable[[], object] = lambda: [run() for run in runs]
        self.eager = None if stream is None else functools.partial(_in_a_row, runs, stream)
        if stream is not None and peer.captures:
            self._capture(runs, stream)

    def _capture(self, runs: list[Callable[[], object]], stream: torch.cuda.Stream) -> None:
        # A graph keeps no tensor alive that existed before it: inputs, block masks, what a forward saved. These do.
        self._alive = runs
        torch.cuda.synchronize()
        try:
            self.burst, self.no_graph = capture(runs, stream), None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises if more is broken than the capture
            self.no_graph = str(error).splitlines()[0]


def prepared(
    peer: Peer, case: Case | DecodeCase, drawn: list[Inputs], witness: Witness | DecodeWitness
) -> tuple[Comparison, list[Inputs], list[Callable[[], object]]]:
    """A peer's result held against the oracle, the inputs as the peer arranged them, and on each set the call that is timed.

    Raises:
        flashlib.measure.racing.peers.PeerUnavailableError: the peer cannot run the case.
    """
    sets = [inputs_for(peer, case, one) for one in drawn]
    with torch.set_grad_enabled(case.needs_grad):
        attend = peer.prepare(case, sets[0].q, sets[0].k, sets[0].v)
    return witness.check(attend, sets[0]), sets, [_run(attend, case, one) for one in sets]


def failure(error: Exception) -> str:
    """In words.

    Raises:
        torch.AcceleratorError: the GPU itself no longer works, and nothing measured from here on would mean anything.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if isinstance(error, PeerUnavailableError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]} ({Path(where.filename).name}:{where.lineno})"


def _in_a_row(runs: list[Callable[[], object]], stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    stream.synchronize()


def _on(stream: torch.cuda.Stream | None):
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def _run(attend: Attend, case: Case | DecodeCase, inputs: Inputs) -> Callable[[], object]:
    """What is timed. A backward alone runs again and again on what one forward kept."""
    qkv = (inputs.q, inputs.k, inputs.v)
    if not case.needs_grad:
        return torch.no_grad()(functools.partial(attend, *qkv))
    if case.direction == "both":
        return lambda: torch.autograd.grad(attend(*qkv), qkv, inputs.grad_out)
    return functools.partial(torch.autograd.grad, attend(*qkv), qkv, inputs.grad_out, retain_graph=True)
