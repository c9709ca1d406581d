"""One protocol for any machine: short, middle and long prompts, alone and in batches, and for each what a user would notice.

    flashlib bench protocol

Latency and tokens per second of calls as a program makes them, peak memory, how many processors are kept busy, and misses of the last
cache where the machine has counters for them.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable

import torch

from flashlib.measure.counting.events import EventsUnavailableError, count_events
from flashlib.measure.racing.cases import DTYPES, Case
from flashlib.measure.racing.contender import draw_inputs, failure, prepared, witness_of
from flashlib.measure.racing.memory import peak_bytes
from flashlib.measure.racing.peers import MAKE_THE_MATRIX, Peer
from flashlib.measure.racing.plan import Plan
from flashlib.measure.records.tables import format_bytes

__all__ = ["Protocol", "protocol_cases", "protocol_peers"]

LENGTHS, BATCHES = (128, 1024, 4096, 8192), (1, 4, 16)
PEERS = {
    "cuda": ("triton", "torch_sdpa_cudnn", "torch_sdpa_flash", "naive"),
    "cpu": ("cpu", "torch_sdpa_flash", "naive"),
}
MATRICES = 3  # of N x N, that unfused attention holds at once: scores, hidden or not, and weights
LEAST_CALLS, MOST_CALLS, SLOW_SECONDS = 3, 200, 5.0  # once so long is over, fewer calls will do


def protocol_cases(device: str) -> list[Case]:
    """Every length in every batch: on a GPU 32 query and 8 KV heads of 128 channels in bf16, on a CPU 8 and 2 of 64 in fp32."""
    shape = (32, 8, 128, "bf16") if device == "cuda" else (8, 2, 64, "fp32")
    q_heads, kv_heads, head_dim, dtype = shape
    return [
        Case(batch, q_heads, kv_heads, length, head_dim, "causal", "forward", dtype)
        for length in LENGTHS
        for batch in BATCHES
    ]


def protocol_peers(device: str) -> tuple[str, ...]:
    return PEERS[device]


class Protocol:
    """Measures cases for :func:`flashlib.measure.racing.bench.run`.

    A row's columns beside the case and ``peer``: ``ms``, ``p90_ms`` and ``p99_ms`` of calls of which each is waited for; ``calls``, how
    many; ``tokens_per_s``, at the mean; ``peak_bytes``, beyond q, k and v; ``processors``, seconds of processor time a second; ``cache_references``
    and ``cache_misses`` of a call, None where nobody counts, and then ``cache_why_not``; ``why_not``.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.rng = plan, random.Random(plan.seed)

    def __call__(self, case: Case) -> list[dict]:
        device = torch.device(self.plan.device)
        generator = torch.Generator(device=device).manual_seed(self.rng.getrandbits(48))
        drawn = draw_inputs(case, device, generator)[:1]
        witness, rows = witness_of(case, drawn, self.rng), []
        for peer in self.plan.peers:
            row = {**case.columns(), "peer": peer.name, "ms": None, "why_not": too_large(peer, case, device)}
            if row["why_not"] is None:
                try:
                    comparison, _, (call,) = prepared(peer, case, drawn, witness)
                    row |= {"why_not": None if comparison.passed else f"wrong: {comparison.message}"}
                    row |= self._measured(call, case, device) if comparison.passed else {}
                except Exception as error:  # other people's code may fail in any way, and the protocol goes on
                    row |= {"why_not": failure(error)}
            rows.append(row)
        return rows

    def _measured(self, call: Callable[[], object], case: Case, device: torch.device) -> dict:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        peak = peak_bytes(call, device)  # and warm; before, the result was checked
        times: list[float] = []
        busy, started = time.process_time(), time.perf_counter()
        while len(times) < MOST_CALLS:
            begun = time.perf_counter()
            call()
            wait()
            ended = time.perf_counter()
            times.append(1e3 * (ended - begun))
            if ended - started > (self.plan.seconds if len(times) >= LEAST_CALLS else SLOW_SECONDS):
                break
        busy = time.process_time() - busy
        figures = latencies(times)
        figures["tokens_per_s"] = 1e3 * case.batch * case.length * len(times) / sum(times)
        figures["processors"] = 1e3 * busy / sum(times)
        try:
            counted = {**count_events(call), "cache_why_not": None}
        except EventsUnavailableError as error:
            counted = {"cache_references": None, "cache_misses": None, "cache_why_not": str(error)}
        return {**figures, "peak_bytes": peak, **counted}


def latencies(times: Iterable[float]) -> dict[str, float]:
    """Percentiles of milliseconds: the least time that no smaller a share of all is below or at."""
    ordered = sorted(times)

    def percentile(share: float) -> float:
        return ordered[max(1, math.ceil(share * len(ordered))) - 1]

    return {"ms": percentile(0.5), "p90_ms": percentile(0.9), "p99_ms": percentile(0.99), "calls": len(ordered)}


def too_large(peer: Peer, case: Case, device: torch.device) -> str | None:
    """Why a peer that makes the N x N matrix is not run: on a CPU nothing stops it but the system, which ends some process."""
    if peer.name not in MAKE_THE_MATRIX:
        return None
    import psutil

    needed = MATRICES * case.batch * case.q_heads * case.length**2 * DTYPES[case.dtype].itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed <= 0.8 * free:
        return None
    return f"its matrices of scores take {format_bytes(needed)}, and {format_bytes(free)} are free"
