"""What the Triton kernels really load and store, in Triton's interpreter, against what is counted. A program of its own: the
interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/cost/watched_bytes.py --seed 0 --problems 6
"""

import argparse
import random

import torch
import triton  # noqa: F401  (KernelWatch asks whether it interprets)

from flashlib import attention, masks
from flashlib.cost.counts import Problem, Work
from flashlib.cost.devices import device
from flashlib.cost.launches import backward_launches, decode_launches, forward_launches
from flashlib.inference import decode_attention
from flashlib.measure.counting.kernel_watch import KernelWatch
from flashlib.spec import AttentionSpec

H200 = device("h200")  # fp32 runs on the plain kernels there too, with the tiles that the interpreter takes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--problems", type=int, default=6)
    options = parser.parse_args()
    for number in range(options.problems):
        rng = random.Random(options.seed + number)
        torch.manual_seed(options.seed + number)
        training(rng, options.seed + number)
        decoding(rng, options.seed + number)
    print(f"{options.problems} problems: every byte as counted")


def training(rng: random.Random, seed: int) -> None:
    kv_heads, group, batch = rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 2))
    q_len, kv_len, head_dim = rng.randint(1, 90), rng.randint(1, 90), rng.choice((16, 32, 64))
    mask = rng.choice((masks.Unmasked(), masks.Causal(), masks.Window(20, 0), masks.KeyLengths([rng.randint(1, kv_len) for _ in range(batch)])))  # fmt: skip
    q = torch.randn(batch, kv_heads * group, q_len, head_dim, requires_grad=True)
    k, v = (torch.randn(batch, kv_heads, kv_len, head_dim, requires_grad=True) for _ in range(2))
    problem = Problem.from_spec(AttentionSpec.from_tensors(q, k, v, mask=mask))
    with KernelWatch(q=q.detach(), k=k.detach(), v=v.detach()) as watch:
        out, lse = attention(q, k, v, mask=mask, return_lse=True, backend="triton")
    (counted,) = (launch.work for launch in forward_launches(problem, H200))
    told = f"seed {seed}: {problem}"
    same({name: watch.bytes_read[name] for name in "qkv"}, {name: counted.read[name] for name in "qkv"}, told)
    assert watch.bytes_written["elsewhere"] == counted.written["out"] + counted.written["lse"], told
    assert watch.bytes_read["elsewhere"] == counted.read.get("intervals", 0), told

    grad = torch.randn_like(out)
    named = {
        "q": q.detach(),
        "k": k.detach(),
        "v": v.detach(),
        "out": out.detach(),
        "grad_out": grad,
        "lse": lse.detach(),
    }
    with KernelWatch(**named) as watch:
        torch.autograd.grad(out, (q, k, v), grad)
    counted = sum((launch.work for launch in backward_launches(problem, H200)), start=Work())
    names = ("q", "k", "v", "out", "grad_out")
    same({name: watch.bytes_read[name] for name in names}, {name: counted.read[name] for name in names}, told)
    gradients = sum(counted.written[name] for name in ("dq", "dk", "dv", "lse", "delta"))
    if isinstance(mask, masks.KeyLengths):  # what was looked up about the rows is written too
        assert watch.bytes_written["elsewhere"] > gradients, told
    else:
        assert watch.bytes_written["elsewhere"] == gradients, told


def decoding(rng: random.Random, seed: int) -> None:
    kv_heads, group, batch, queries = rng.choice((1, 2)), rng.choice((1, 4)), rng.choice((1, 3)), rng.choice((1, 2))
    capacity, head_dim = rng.randint(8, 90), rng.choice((16, 32))
    lengths = [rng.randint(queries, capacity) for _ in range(batch)]
    q = torch.randn(batch, kv_heads * group, queries, head_dim)
    k, v = (torch.randn(batch, kv_heads, capacity, head_dim) for _ in range(2))
    splits = rng.choice((1, 2, 3))
    problem = Problem.causal(batch, kv_heads * group, kv_heads, queries, capacity, head_dim, dtype="fp32")
    with KernelWatch(q=q, k=k, v=v) as watch, torch.no_grad():
        decode_attention(q, k, v, lengths=torch.tensor(lengths), num_splits=splits, backend="triton")
    counted = sum(
        (launch.work for launch in decode_launches(problem, H200, lengths=lengths, splits=splits)), start=Work()
    )
    told = f"seed {seed}: decoding {problem}, lengths {lengths}, {splits} splits"
    same({name: watch.bytes_read[name] for name in "kv"}, {name: counted.read[name] for name in "kv"}, told)


def same(watched: dict, counted: dict, told: str) -> None:
    assert watched == counted, f"{told}: watched {watched}, counted {counted}"


if __name__ == "__main__":
    main()
