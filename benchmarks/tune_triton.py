"""On a GPU: the Triton kernels against the oracle on random problems, and a sweep over their tile sizes.

python benchmarks/tune_triton.py --out results --problems 1000
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import random_problem

from flashlib import AttentionSpec
from flashlib.backends import triton as backend
from flashlib.backends.triton import TileConfig, TritonBackend, launch_backward, launch_forward
from flashlib.reference import check, check_gradients

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def correctness(problems: int, seed: int, seconds: float) -> list[str]:
    failures, started, done = [], time.monotonic(), 0
    for number in range(seed, seed + problems):
        if time.monotonic() - started > seconds:
            break
        rng = random.Random(number)
        problem = random_problem(rng, device="cuda", dtypes=DTYPES)
        spec = problem.spec
        if spec.is_empty:
            continue
        done += 1
        q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
        out, lse = TritonBackend().run(q, k, v, spec, None)
        generator = torch.Generator(device="cuda").manual_seed(number)
        grads = [torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in (out, lse)]
        gradients = torch.autograd.grad((out, lse), (q, k, v), grads)
        forward = check(out, lse, q, k, v, **problem.options)
        backward = check_gradients(gradients, q, k, v, *grads, **problem.options)
        if not (forward.passed and backward.passed):
            failures.append(f"{number} {problem!r} {forward.message} | {backward.message}")
    print(
        f"correctness: {done} problems, {len(failures)} outside the budget, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    for failure in failures[:5]:
        print("  ", failure[:700].replace("\n", " "), flush=True)
    return failures


def milliseconds(call, repeats=12) -> float:
    call()
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[repeats // 2]


def sweep(kernel: str, configs, head_dim: int, tokens: int, causal: bool) -> dict:
    heads, batch = 2048 // head_dim, 16384 // tokens
    q, k, v, do = (torch.randn(batch, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    spec = AttentionSpec.from_tensors(q, k, v, causal=causal)
    flops = 4 * batch * heads * tokens * tokens * head_dim * (0.5 if causal else 1)
    rows = {}
    if kernel == "forward":
        for config in configs:
            try:
                ms = milliseconds(functools.partial(launch_forward, q, k, v, spec, tiles=config))
                rows[str(config)] = flops / ms / 1e9
            except Exception as error:
                rows[str(config)] = f"{type(error).__name__}: {str(error)[:80]}"
        for name, peer in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash2", SDPBackend.FLASH_ATTENTION)):
            with sdpa_kernel(peer):
                rows[name] = (
                    flops / milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)) / 1e9
                )
        return rows
    out, lse, _ = launch_forward(q, k, v, spec)
    saved = dict(backend._SIXTEEN_BIT[kernel])
    for config in configs:
        backend._SIXTEEN_BIT[kernel][head_dim] = config
        try:
            launch_backward(q, k, v, out, lse, do, None, spec)
            torch.cuda.synchronize()
            profile = kernel_ms(lambda: launch_backward(q, k, v, out, lse, do, None, spec), f"backward_{kernel}")
            rows[str(config)] = profile
        except Exception as error:
            rows[str(config)] = f"{type(error).__name__}: {str(error)[:80]}"
    backend._SIXTEEN_BIT[kernel].update(saved)
    rows["flops"] = flops
    return rows


def kernel_ms(call, name: str) -> float:
    """Milliseconds of one kernel inside a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    times = [e.device_time_total / e.count for e in profile.key_averages() if name in e.key]
    return times[0] / 1e3


FORWARD = [
    TileConfig(*c)
    for c in [
        (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
        (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 4, 2), (128, 32, 8, 4), (128, 32, 4, 4),
        (64, 32, 4, 4),
    ]
]  # fmt: skip
BACKWARD = [
    TileConfig(*c)
    for c in [
        (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 2), (32, 128, 4, 2), (32, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3), (128, 64, 4, 2),
        (32, 128, 8, 3), (64, 64, 8, 2), (64, 128, 4, 2),
    ]
]  # fmt: skip


def compile_one(job):
    """Fill the compilation cache: one tiny launch in a process of its own."""
    kernel, config, head_dim, causal = job
    q, k, v, do = (torch.randn(1, 2, 256, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    spec = AttentionSpec.from_tensors(q, k, v, causal=causal)
    try:
        if kernel == "forward":
            launch_forward(q, k, v, spec, tiles=config)
        else:
            out, lse, _ = launch_forward(q, k, v, spec)
            backend._SIXTEEN_BIT[kernel][head_dim] = config
            launch_backward(q, k, v, out, lse, do, None, spec)
        torch.cuda.synchronize()
    except Exception:
        return


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    options = parser.parse_args()
    results = {"failures": correctness(options.problems, options.seed, options.seconds)}
    jobs = [
        (kernel, config, head_dim, causal)
        for head_dim in (64, 128)
        for kernel, configs in (("forward", FORWARD), ("dkdv", BACKWARD), ("dq", BACKWARD))
        for config in configs
        for causal in ((False, True) if kernel == "forward" else (False,))
    ]
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_one, jobs, chunksize=2)
    print(f"compiled {len(jobs)} in {time.monotonic() - started:.0f} s", flush=True)
    for head_dim in (64, 128):
        for kernel, configs in (("forward", FORWARD), ("dkdv", BACKWARD), ("dq", BACKWARD)):
            for tokens, causal in ((16384, False), (4096, True)):
                if kernel != "forward" and tokens == 4096:
                    continue
                rows = sweep(kernel, configs, head_dim, tokens, causal)
                results[f"{kernel} D{head_dim} S{tokens} causal={causal}"] = rows
                numbers = {name: x for name, x in rows.items() if isinstance(x, float) and name != "flops"}
                best = sorted(numbers.items(), key=lambda item: item[1], reverse=kernel == "forward")[:5]
                print(kernel, head_dim, tokens, causal, [(n, round(x, 3)) for n, x in best], flush=True)
                print("   ", {n: round(x) for n, x in numbers.items() if n in ("cudnn", "flash2")}, flush=True)
                (options.out / "sweep.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
