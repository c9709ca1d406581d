"""What a call costs the program that makes it: host time, beside PyTorch's own, in one process on one GPU.

    python benchmarks/host_time.py --out benchmarks/h200

The device is idle when ten calls in a row begin, and is not waited for when they end: what is timed is Python, PyTorch and the driver, and the
device has less to do than they. Peers take turns in shuffled order; medians of a tenth. A step is wall time of forward and backward, many in a row, divided by their number. The first call is timed in a fresh
process with the compilers' caches on disk filled and modules compiled to bytecode, as an installation has them, after PyTorch has its context on
the GPU.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashlib import attention
from flashlib.inference import decode_attention
from flashlib.interop.flash_attn import flash_attn_varlen_func
from flashlib.masks import KeyLengths, Varlen, Window
from flashlib.measure.records.record import new_record, save_record
from flashlib.measure.records.sources import decode_sources, kernel_sources, launching_sources

SOURCES = sorted({*launching_sources(), *kernel_sources(), *decode_sources()})
Call = Callable[[], object]


def drawn(batch: int, heads: int, length: int, dim: int, dtype=torch.bfloat16, grad=False) -> Tensor:
    return torch.randn(batch, heads, length, dim, device="cuda", dtype=dtype).requires_grad_(grad)


IN_A_ROW = 10


def host_us(calls: dict[str, Call], rounds: int = 60) -> dict[str, float]:
    """Median microseconds of each call, which take turns."""
    for call in calls.values():
        for _ in range(5):
            call()
    times = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            call = calls[name]
            torch.cuda.synchronize()
            started = time.perf_counter_ns()
            for _ in range(IN_A_ROW):
                call()
            times[name].append((time.perf_counter_ns() - started) / IN_A_ROW)
    return {name: statistics.median(each) / 1e3 for name, each in times.items()}


def few_us(calls: dict[str, Call]) -> dict[str, float]:
    """The same where cuDNN makes a plan for each length, which takes it tens of milliseconds."""
    return host_us({"flashlib": calls["flashlib"]}) | host_us({"sdpa": calls["sdpa"]}, rounds=2)


def wall_us(calls: dict[str, Call], steps: int = 20, rounds: int = 15) -> dict[str, float]:
    """Median microseconds of a step, of many in a row."""
    times = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            torch.cuda.synchronize()
            started = time.perf_counter_ns()
            for _ in range(steps):
                calls[name]()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter_ns() - started) / steps)
    return {name: statistics.median(each) / 1e3 for name, each in times.items()}


def sdpa(*tensors: Tensor, backend: SDPBackend | None = None, **options) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(*tensors, **options)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, **options)


def cudnn(*tensors: Tensor, **options) -> Tensor:
    return sdpa(*tensors, backend=SDPBackend.CUDNN_ATTENTION, **options)


def both(call: Callable[..., Tensor], *tensors: Tensor) -> Call:
    out = call(*tensors)
    given = torch.randn_like(out)
    return lambda: torch.autograd.grad(call(*tensors), tensors, given)


def forward_cases() -> list[tuple[str, dict[str, Call]]]:
    q, k, v = (drawn(1, 8, 128, 64) for _ in range(3))
    a, b, c = (drawn(1, 8, 128, 64, grad=True) for _ in range(3))
    causal, plain = {"is_causal": True}, {"causal": True}
    lengths = KeyLengths(torch.tensor([100], device="cuda"))
    ends = torch.tensor([0, 30, 128], dtype=torch.int32, device="cuda")
    packed = Varlen(ends)
    slopes = torch.rand(8, device="cuda")
    q32, k32, v32 = (drawn(1, 8, 128, 64, torch.float32) for _ in range(3))
    q256, k256, v256 = (drawn(1, 8, 128, 256) for _ in range(3))
    rows = [x.transpose(1, 2)[0].contiguous() for x in (q, k, v)]
    ours = lambda **options: lambda: attention(q, k, v, **options)  # noqa: E731
    reference = {"sdpa": lambda: sdpa(q, k, v, **causal)}
    grad = lambda call: lambda: call(a, b, c)  # noqa: E731
    return [
        ("forward", {"flashlib": ours(**plain), **reference, "sdpa_cudnn": lambda: cudnn(q, k, v, **causal)}),
        ("forward, gradients wanted", {"flashlib": grad(lambda *x: attention(*x, **plain)), "sdpa": grad(lambda *x: sdpa(*x, **causal))}),
        ("forward and backward", {
            "flashlib": both(lambda *x: attention(*x, **plain), a, b, c), "sdpa": both(lambda *x: sdpa(*x, **causal), a, b, c),
            "sdpa_cudnn": both(lambda *x: cudnn(*x, **causal), a, b, c),
        }),
        ("forward, LSE returned", {"flashlib": ours(**plain, return_lse=True), **reference}),
        ("forward, window", {"flashlib": ours(mask=Window(left=64, right=0)), **reference}),
        ("forward, key lengths", {"flashlib": ours(mask=lengths), **reference}),
        ("forward, packed, mask at hand", {"flashlib": ours(mask=packed), **reference}),
        ("forward, packed, from cu_seqlens", {"flashlib": lambda: flash_attn_varlen_func(*rows, ends, ends, 98, 98, causal=True), **reference}),
        ("forward, ALiBi", {"flashlib": ours(**plain, alibi_slopes=slopes), **reference}),
        ("forward, softcap", {"flashlib": ours(**plain, softcap=20.0), **reference}),
        ("forward, fp32", {"flashlib": lambda: attention(q32, k32, v32, **plain), "sdpa": lambda: sdpa(q32, k32, v32, **causal)}),
        ("forward, head_dim 256", {"flashlib": lambda: attention(q256, k256, v256, **plain), "sdpa": lambda: sdpa(q256, k256, v256, **causal)}),
    ]  # fmt: skip


def decode_cases_() -> list[tuple[str, dict[str, Call]]]:
    q = drawn(1, 32, 1, 128)
    k, v = (drawn(1, 8, 4096, 128) for _ in range(2))
    pages = [x.view(8, 64, 64, 128).transpose(0, 1).contiguous() for x in (k, v)]
    table = torch.arange(64, dtype=torch.int32, device="cuda")[None]
    lengths = torch.tensor([4000], dtype=torch.int32, device="cuda")
    peer = {"sdpa_cudnn": lambda: cudnn(q, k, v, enable_gqa=True), "sdpa": lambda: sdpa(q, k, v, enable_gqa=True)}
    return [
        ("decode", {"flashlib": lambda: decode_attention(q, k, v), **peer}),
        ("decode, lengths", {"flashlib": lambda: decode_attention(q, k, v, lengths=lengths), **peer}),
        (
            "decode, paged",
            {"flashlib": lambda: decode_attention(q, *pages, lengths=lengths, block_table=table), **peer},
        ),
        ("decode through attention()", {"flashlib": lambda: attention(q, k, v, causal=True), **peer}),
    ]


def new_classes() -> list[tuple[str, dict[str, Call]]]:
    """Calls that no call before them was like."""
    lengths = iter(range(129, 100_000))
    heads = iter(range(2, 100_000))
    memory = [torch.randn(1, 8, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def other_length():
        length = next(lengths)
        return attention(*(x[:, :, :length] for x in memory), causal=True)

    def other_scale():
        return attention(*(x[:, :, :128] for x in memory), causal=True, scale=0.125 + 1e-6 * next(heads))

    lengths_sdpa, keys, keys_sdpa = (iter(range(129, 100_000)) for _ in range(3))
    query = drawn(1, 8, 1, 64)

    def sdpa_length():
        length = next(lengths_sdpa)
        return sdpa(*(x[:, :, :length] for x in memory), is_causal=True)

    def one_key_more():
        length = next(keys)
        return attention(query, *(x[:, :, :length] for x in memory[1:]), causal=True)

    def sdpa_key_more():
        length = next(keys_sdpa)
        return sdpa(query, *(x[:, :, :length] for x in memory[1:]))

    return [
        ("forward, another length at every call", {"flashlib": other_length, "sdpa": sdpa_length}),
        ("forward, a class never seen", {"flashlib": other_scale, "sdpa": sdpa_length}),
        ("decode, one key more at every call", {"flashlib": one_key_more, "sdpa": sdpa_key_more}),
    ]


def steps() -> list[tuple[str, dict[str, Call]]]:
    found = []
    for name, batch, (heads, kv_heads), length, dim in (
        ("GPT-2 step", 16, (12, 12), 1024, 64), ("Llama-8B layer step", 1, (32, 8), 2048, 128), ("small step", 1, (8, 8), 128, 64),
    ):  # fmt: skip
        a = drawn(batch, heads, length, dim, grad=True)
        b, c = (drawn(batch, kv_heads, length, dim, grad=True) for _ in range(2))
        grouped = {"enable_gqa": True} if heads != kv_heads else {}
        peers = {
            "flashlib": both(lambda *x: attention(*x, causal=True), a, b, c),
            "sdpa": both(lambda *x, grouped=grouped: sdpa(*x, is_causal=True, **grouped), a, b, c),
        }
        peers["sdpa_cudnn"] = both(lambda *x, grouped=grouped: cudnn(*x, is_causal=True, **grouped), a, b, c)
        found.append((name, peers))
    return found


def compiled() -> list[tuple[str, dict[str, Call]]]:
    q, k, v = (drawn(1, 8, 128, 64) for _ in range(3))
    a, b, c = (drawn(1, 8, 128, 64, grad=True) for _ in range(3))
    ours = torch.compile(lambda *x: attention(*x, causal=True))
    theirs = torch.compile(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))
    return [
        ("torch.compile, forward", {"flashlib": lambda: ours(q, k, v), "sdpa": lambda: theirs(q, k, v)}),
        ("torch.compile, forward and backward", {"flashlib": both(ours, a, b, c), "sdpa": both(theirs, a, b, c)}),
    ]


FIRST = """
import sys, time, torch
compilers = lambda: sum(name.split(".")[0] == "sympy" or name.startswith(("torch._dynamo", "torch._inductor")) for name in sys.modules)
q, k, v = (torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
given = torch.randn_like(q)
out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.autograd.grad(out, (q, k, v), given)
torch.cuda.synchronize()
modules, times = [compilers()], [time.perf_counter()]
def lap():
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    modules.append(compilers())
from flashlib import attention
lap()
out = attention(q, k, v, causal=True)
lap()
torch.autograd.grad(out, (q, k, v), given)
lap()
print(*(b - a for a, b in zip(times, times[1:])), *(b - a for a, b in zip(modules, modules[1:])))
"""


def first_call(cache: str | None) -> dict:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", ""),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "flashlib_bytecode")
    if cache:
        environment["TRITON_CACHE_DIR"] = cache
    done = subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, check=True)
    imported, forward, backward, *modules = map(float, done.stdout.split())
    times = {
        "import_s": imported,
        "forward_s": forward,
        "backward_s": backward,
        "both_s": imported + forward + backward,
    }
    return {name: round(value, 3) for name, value in times.items()} | {"compiler_modules": int(sum(modules))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no group is begun")
    options = parser.parse_args()
    started, rows = time.monotonic(), []
    groups = [
        (forward_cases, host_us),
        (decode_cases_, host_us),
        (steps, wall_us),
        (compiled, host_us),
        (new_classes, few_us),
    ]

    def save() -> None:
        notes = __doc__.split("\n\n")[2].replace("\n", " ")
        save_record(new_record("host_time", rows, SOURCES, notes, cpu=_processor()), options.out)

    for make, measure in groups:
        if time.monotonic() - started > options.limit:
            break
        try:
            cases = make()
        except Exception as error:
            print(make.__name__, "failed:", repr(error)[:300], flush=True)
            continue
        for name, calls in cases:
            try:
                figures = measure(calls)
            except Exception as error:
                print(name, "failed:", repr(error)[:300], flush=True)
                continue
            unit = "wall_us" if measure is wall_us else "host_us"
            rows += [{"case": name, "peer": peer, unit: round(us, 2)} for peer, us in figures.items()]
            print(name, {peer: round(us, 1) for peer, us in figures.items()}, flush=True)
            save()
    for name, cache in (("first call, caches on disk", None), ("first call, nothing in caches", "/tmp/flashlib_cold")):
        if time.monotonic() - started > options.limit:
            break
        found = [first_call(cache) for _ in range(1 if cache else 3)]
        best = min(found, key=lambda each: each["both_s"])
        rows.append({"case": name, "peer": "flashlib", **best})
        print(name, found, flush=True)
        save()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
