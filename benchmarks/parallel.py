"""Attention over several ranks: forward, backward and decoding by each method, how much of the links is hidden, and beside it who else does it.

    torchrun --nproc-per-node 8 benchmarks/parallel.py --out benchmarks/h200          # GPUs, 128k to 1M tokens
    torchrun --nproc-per-node 2 benchmarks/parallel.py --small --out benchmarks/cpu   # processes on a CPU, over gloo
    python benchmarks/parallel.py --out benchmarks/h200                               # a world of one, beside flashlib.attention

Times are of the slowest rank, from a barrier on, medians. ``of_ideal`` is the time of flashlib.attention on one rank for the whole, over the ranks' number, over
the time taken; it is left out where one rank cannot be asked for the whole. ``hidden``: compute alone and links alone are timed as well, each with the other taken
out; what both together take less than their sum, over the smaller of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib import attention
from flashlib.inference import decode_attention
from flashlib.measure.records.record import PACKAGE, new_record, save_record
from flashlib.measure.records.sources import cpu_sources, kernel_sources
from flashlib.parallel import ShardedKVCache, count_sent, parallel_attention, shard
from flashlib.parallel import attention as front_door
from flashlib.parallel.link import Link, Pending

Call = Callable[[], object]
PEERS = ("torch_context_parallel", "ring_flash_attn", "yunchang")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**17, 2**18, 2**19, 2**20], help="tokens")
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole", type=int, default=2**18, help="longest sequence that one rank is asked for whole")
    parser.add_argument("--small", action="store_true", help="sizes that processes on a CPU can be asked for")
    parser.add_argument("--out", type=Path, help="folder of the record; none: only print")
    chosen = parser.parse_args()
    if chosen.small:
        chosen.lengths, chosen.heads, chosen.head_dim = [1024, 2048], [8, 2], 64
        chosen.dtype, chosen.whole = "float32", 2048
    return chosen


@contextlib.contextmanager
def world() -> Iterator[tuple[DeviceMesh, torch.device]]:
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29655"),
    ):
        os.environ.setdefault(name, value)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5))
    try:
        yield init_device_mesh(device.type, (dist.get_world_size(),)), device
    finally:
        dist.destroy_process_group()


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """This rank's part alone: none has to hold the whole."""
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    return [torch.randn(*shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def slowest_ms(call: Call, device: torch.device, repeats: int, before: Call = lambda: None) -> float:
    """Median over repeats of the slowest rank's time, from a barrier to the end of its device's work."""
    taken = []
    for turn in range(repeats + 2):
        before()
        settle(device)
        dist.barrier()
        started = time.perf_counter()
        call()
        settle(device)
        spent = torch.tensor([time.perf_counter() - started], dtype=torch.float64, device=device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        if turn >= 2:
            taken.append(1e3 * float(spent))
    return statistics.median(taken)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Links alone, and compute alone


def nothing_sent(self: Link, sends: dict, receives: dict, device: torch.device) -> Pending:
    buffers = {rank: torch.zeros(size, dtype=torch.uint8, device=device) for rank, size in receives.items()}
    return Pending([], buffers, [], self.timeout)


class NothingComputed:
    """An engine whose results are there at once, and mean nothing."""

    def forward(self, q, k, v, numbers):
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=torch.float32)

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, numbers):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def compute_alone():
    return mock.patch.object(Link, "exchange", nothing_sent)


def links_alone():
    return mock.patch.object(front_door, "_engine", lambda *_: NothingComputed())


# What is timed


def training_rows(chosen: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> list[dict]:
    rows, dtype, ranks = [], getattr(torch, chosen.dtype), dist.get_world_size()
    grid = init_device_mesh(device.type, (2, ranks // 2)) if ranks >= 4 and ranks % 2 == 0 else None
    for length in chosen.lengths:
        whole = whole_ms(chosen, length, dtype, device)
        for method, layout in (
            ("ring", "zigzag"), ("ring", "striped"), ("ring", "contiguous"), ("all_to_all", "contiguous"), ("hybrid", "zigzag"), ("gather", "zigzag"),
        ):  # fmt: skip
            if (method == "hybrid" and grid is None) or (ranks == 1 and (method, layout) != ("ring", "contiguous")):
                continue
            part = len(shard(torch.empty(length), mesh, layout=layout, dim=0))
            q_heads, kv_heads = chosen.heads
            q, k, v = drawn(
                [(1, heads, part, chosen.head_dim) for heads in (q_heads, kv_heads, kv_heads)], dtype, device
            )
            for x in (q, k, v):
                x.requires_grad_()
            used = grid if method == "hybrid" else mesh
            row = {"method": method, "layout": layout, "length": length, "ranks": ranks}
            try:
                row |= timed(q, k, v, used, method, layout, device, chosen.repeats)
            except torch.OutOfMemoryError as error:
                row["cannot"] = str(error).splitlines()[0]
                torch.cuda.empty_cache()
            for direction, alone in whole.items():
                if f"{direction}_ms" in row:
                    row[f"{direction}_of_ideal"] = alone / ranks / row[f"{direction}_ms"]
            rows.append(row)
            told(row)
    return rows


def timed(q, k, v, mesh, method: str, layout: str, device: torch.device, repeats: int) -> dict:
    def forward() -> Tensor:
        return parallel_attention(q, k, v, mesh=mesh, method=method, layout=layout, causal=True)

    kept: list[Tensor] = []

    def backward() -> None:
        torch.autograd.grad(kept[-1], (q, k, v), torch.ones_like(kept[-1]))

    def prepare() -> None:
        kept[:] = [forward()]

    with count_sent() as sent:
        forward()
    row: dict = {"sent_bytes": sent.data}
    ways = {"": contextlib.nullcontext, "_compute": compute_alone, "_links": links_alone}
    if method == "gather" or mesh.size() == 1:
        ways = {"": contextlib.nullcontext}
    for name, way in ways.items():
        with way():
            row[f"forward{name}_ms"] = slowest_ms(forward, device, repeats)
            row[f"backward{name}_ms"] = slowest_ms(backward, device, repeats, before=prepare)
    for direction in ("forward", "backward"):
        if f"{direction}_links_ms" in row:
            both, compute, links = (row[f"{direction}{name}_ms"] for name in ("", "_compute", "_links"))
            row[f"{direction}_hidden"] = max(0.0, min(1.0, (compute + links - both) / min(compute, links)))
    return row


def whole_ms(chosen, length: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Milliseconds of flashlib.attention for the whole, which every rank computes by itself at once."""
    if length > chosen.whole:
        return {}
    q_heads, kv_heads = chosen.heads
    q, k, v = drawn([(1, heads, length, chosen.head_dim) for heads in (q_heads, kv_heads, kv_heads)], dtype, device)
    for x in (q, k, v):
        x.requires_grad_()
    kept: list[Tensor] = []
    backend = {"backend": "cpu"} if device.type == "cpu" else {}

    def forward() -> Tensor:
        return attention(q, k, v, causal=True, **backend)

    def prepare() -> None:
        kept[:] = [forward()]

    def backward() -> None:
        torch.autograd.grad(kept[-1], (q, k, v), torch.ones_like(kept[-1]))

    return {
        "forward": slowest_ms(forward, device, chosen.repeats),
        "backward": slowest_ms(backward, device, chosen.repeats, before=prepare),
    }


def world_of_one(chosen, mesh: DeviceMesh, device: torch.device) -> list[dict]:
    """parallel_attention on a mesh of one rank beside flashlib.attention, in turns: how much is lost by asking for ranks."""
    rows, dtype = [], getattr(torch, chosen.dtype)
    q_heads, kv_heads = chosen.heads
    for length in sorted({2048, 16384, *chosen.lengths} if device.type == "cuda" else chosen.lengths):
        q, k, v = drawn([(1, heads, length, chosen.head_dim) for heads in (q_heads, kv_heads, kv_heads)], dtype, device)
        calls = {
            "attention": lambda q=q, k=k, v=v: attention(q, k, v, causal=True),
            "parallel_attention": lambda q=q, k=k, v=v: parallel_attention(q, k, v, mesh=mesh, causal=True),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(4 * chosen.repeats + 2):
            for name in list(calls) if turn % 2 else reversed(list(calls)):
                settle(device)
                started = time.perf_counter()
                calls[name]()
                settle(device)
                if turn >= 2:
                    times[name].append(1e3 * (time.perf_counter() - started))
        alone, parallel = (statistics.median(times[name]) for name in calls)
        rows.append({"method": "world of one", "length": length, "ranks": 1, "attention_ms": alone, "forward_ms": parallel, "ratio": parallel / alone})  # fmt: skip
        told(rows[-1])
    return rows


def decoding_rows(chosen, mesh: DeviceMesh, device: torch.device) -> list[dict]:
    rows, dtype, ranks = [], getattr(torch, chosen.dtype), dist.get_world_size()
    q_heads, kv_heads = chosen.heads
    for length in chosen.lengths:
        cache = ShardedKVCache(mesh, 1, kv_heads, length, chosen.head_dim, dtype=dtype, device=device)
        chunk = min(length, 2**14)
        for _ in range(length // chunk):
            k, v = drawn([(1, kv_heads, chunk, chosen.head_dim)] * 2, dtype, device)
            cache.append(k, v)
        (q,) = drawn([(1, q_heads, 1, chosen.head_dim)], dtype, device)
        dist.broadcast(q, 0)
        row = {"method": "decode", "length": length, "ranks": ranks}
        with count_sent() as sent:
            cache.attend(q)
        row |= {
            "sent_bytes": sent.data,
            "forward_ms": slowest_ms(lambda q=q, cache=cache: cache.attend(q), device, 4 * chosen.repeats),
        }
        if length <= chosen.whole:
            k, v = drawn([(1, kv_heads, length, chosen.head_dim)] * 2, dtype, device)
            alone = slowest_ms(lambda q=q, k=k, v=v: decode_attention(q, k, v), device, 4 * chosen.repeats)
            row["forward_of_ideal"] = alone / ranks / row["forward_ms"]
        rows.append(row)
        told(row)
    return rows


# Peers


def peer_rows(chosen, mesh: DeviceMesh, device: torch.device) -> list[dict]:
    rows, dtype, ranks = [], getattr(torch, chosen.dtype), dist.get_world_size()
    q_heads, kv_heads = chosen.heads
    for name in PEERS:
        for length in chosen.lengths:
            part = length // ranks
            row = {"method": name, "length": length, "ranks": ranks}
            heads = (q_heads,) * 3 if name == "torch_context_parallel" else (q_heads, kv_heads, kv_heads)
            try:
                call = globals()[f"of_{name}"](mesh, device)
                q, k, v = drawn([(1, count, part, chosen.head_dim) for count in heads], dtype, device)
                for x in (q, k, v):
                    x.requires_grad_()
                row["forward_ms"] = slowest_ms(lambda call=call, q=q, k=k, v=v: call(q, k, v), device, chosen.repeats)

                def both(call=call, q=q, k=k, v=v) -> None:
                    out = call(q, k, v)
                    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

                row["forward_and_backward_ms"] = slowest_ms(both, device, chosen.repeats)
            except Exception as error:  # a peer that is not there, or not for this device, says so in the record
                row["cannot"] = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
                )
            rows.append(row)
            told(row)
            if "cannot" in row:
                break
    return rows


def of_torch_context_parallel(mesh: DeviceMesh, device: torch.device) -> Callable:
    """PyTorch's ring, load balanced as it comes; KV heads repeated by the caller, as it takes no GQA everywhere."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.functional import scaled_dot_product_attention

    if mesh.size() == 1:
        raise RuntimeError("a world of one: nothing to be parallel")

    def call(q, k, v):
        # What is to be sharded is sharded already; it wants to be given something all the same.
        with context_parallel(mesh, buffers=[torch.zeros(2 * mesh.size(), device=device)], buffer_seq_dims=[0]):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def of_ring_flash_attn(mesh: DeviceMesh, device: torch.device) -> Callable:
    from ring_flash_attn import zigzag_ring_flash_attn_func

    def call(q, k, v):
        return zigzag_ring_flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)

    return call


def of_yunchang(mesh: DeviceMesh, device: torch.device) -> Callable:
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    set_seq_parallel_pg(1, mesh.size(), dist.get_rank(), mesh.size())
    run = LongContextAttention(
        ring_impl_type="zigzag", attn_type=AttnType.FA if device.type == "cuda" else AttnType.TORCH_EFFICIENT
    )

    def call(q, k, v):
        return run(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), causal=True)

    return call


def told(row: dict) -> None:
    if dist.get_rank() == 0:
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            ),
            flush=True,
        )


def main() -> None:
    chosen = parsed()
    with world() as (mesh, device):
        rows = world_of_one(chosen, mesh, device) if mesh.size() == 1 else training_rows(chosen, mesh, device)
        with torch.no_grad():
            rows += decoding_rows(chosen, mesh, device)
        rows += peer_rows(chosen, mesh, device)
        if chosen.out and dist.get_rank() == 0:
            sources = {f"parallel/{path.name}" for path in (PACKAGE / "parallel").glob("*.py")}
            sources |= set(cpu_sources() if device.type == "cpu" else kernel_sources())
            joined = "NCCL" if device.type == "cuda" else "gloo, processes on one machine"
            notes = (
                f"{chosen.heads[0]} query and {chosen.heads[1]} KV heads of {chosen.head_dim}, {chosen.dtype}, causal, one sequence; {mesh.size()} ranks over {joined}. "
                f"Slowest rank, from a barrier on, medians of {chosen.repeats}. Bytes as rank 0 handed them to its process group, forward."
            )
            if device.type == "cpu":
                notes += " Processes share the cores, so that times say that it runs, and nothing about scaling."
            print(save_record(new_record(f"parallel_{mesh.size()}", rows, sources, notes), chosen.out))


if __name__ == "__main__":
    main()
