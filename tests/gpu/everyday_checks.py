"""What programs do with attention, on a GPU: packs bit by bit, dropout, CUDA graphs of packed calls, every way of use, and what it costs.

python tests/gpu/everyday_checks.py all --workers 14 --out results

Each check writes its record as it goes. Without a GPU everything but the prices runs small in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from device_checks import _captured
from everyday.packs import ALIGNED, PackSet, check_pack
from everyday.ways import subjects_here, try_all
from feature_sets import FeatureSet
from in_sets import count_failures, now, of_budget, run_in_sets, started_kernels, summary_of

from flashlib import FlashAttentionConfig, attention, check_values, masks, use_config
from flashlib.interop import flash_attn
from flashlib.measure.racing.timing import time_call
from flashlib.measure.records.record import Record, new_record, save_record
from flashlib.measure.records.sources import decode_sources, kernel_sources, launching_sources
from flashlib.reference import check, check_gradients

BACKEND = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED_ON = sorted({
    *("attention.py", "autocast.py", "dropout.py", "engines.py", "masks.py", "launch/operators.py", "packing.py", "partial.py", "reference.py"),
    *("spec.py", "values.py", "backends/pytorch.py", "backends/torch_sdpa.py", "interop/flash_attn/flash_attn_interface.py", "interop/flash_attn/kv_cache.py", "interop/flash_attn/pages.py"),
    *kernel_sources(), *decode_sources(), *launching_sources(),
})  # fmt: skip
LONGEST = 3000 if DEVICE == "cuda" else 150


def one_pack(features: PackSet, seed: int) -> dict:
    started, kernels = time.monotonic(), Counter()
    with started_kernels(kernels):
        compared = check_pack(features, random.Random(seed), BACKEND, DEVICE, LONGEST)
    seconds = [now() - started, 0.0]
    return {
        "passed": True,
        "of_budget": {},
        "message": None,
        "kernels": dict(kernels),
        "seconds": seconds,
        "told": {"sequences": str(compared)},
    }


def packs(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    """Packs whose sequences must give alone what they give together, bit by bit; small ones against the oracle too."""
    options = {"count": count, "seed": seed, "workers": workers, "out": out, "limit_s": limit_s}
    return run_in_sets(PackSet.draw, one_pack, _packs_record, **options)


def _packs_record(rows: list[dict], asked: int, **extra) -> Record:
    summary = summary_of(rows, asked, lambda seed: PackSet.draw(seed).told(), ())
    note = "Random packs (tests/everyday/packs.py) with packing='aligned': out, LSE, dq, dk and dv of each sequence bitwise as in a pack of its own."
    return new_record("everyday_packs", [{"check": "packs", **summary}], CHECKED_ON, note, **extra)


def one_dropout(features: FeatureSet, seed: int) -> dict:
    """A problem of the usual kinds with dropout, forward and backward, against a dense reference that is given the same bits."""
    problem, rng = features.problem(seed, DEVICE), random.Random(seed)
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    seed_tensor = torch.tensor([rng.getrandbits(63)], device=DEVICE)
    options = {**problem.options, "dropout_p": rng.choice((0.1, 0.1, 0.5, 0.9)), "dropout_seed": seed_tensor}
    started, kernels = time.monotonic(), Counter()
    with started_kernels(kernels):
        out, lse = attention(q, k, v, **options, return_lse=True, backend=BACKEND)
        given = [torch.randn_like(out), torch.randn_like(lse)]
        gradients = torch.autograd.grad((out, lse), (q, k, v), given)
    computed = now()
    forward = check(out, lse, q, k, v, **options)
    backward = check_gradients(gradients, q, k, v, *given, **options)
    passed = forward.passed and backward.passed
    return {
        "passed": passed,
        "of_budget": of_budget(forward, backward),
        "message": None if passed else f"{problem!r}: {options}: {forward.message} | {backward.message}",
        "kernels": dict(kernels),
        "seconds": [computed - started, now() - computed],
    }


def dropout(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    options = {"count": count, "seed": seed, "workers": workers, "out": out, "limit_s": limit_s}
    return run_in_sets(FeatureSet.draw, one_dropout, _dropout_record, **options)


def _dropout_record(rows: list[dict], asked: int, **extra) -> Record:
    summary = summary_of(rows, asked, lambda seed: FeatureSet.draw(seed).told(), ("out", "lse", "dq", "dk", "dv"))
    note = "Random problems with dropout, forward and backward, against a dense float64 reference with the same bits, within the error budget."
    return new_record("everyday_dropout", [{"check": "dropout", **summary}], CHECKED_ON, note, **extra)


def packed_calls() -> dict[str, Callable[..., Tensor]]:
    """Every packed call of flash_attn by name: of ``(tokens, cu_seqlens or lengths, block_table)``."""
    f, longest = flash_attn, LONGEST

    def with_pages(q, k, v, ends, lengths, table):
        pages = (x.view(-1, 16, *x.shape[1:]) for x in (k, v))
        return f.flash_attn_varlen_func(q, *pages, ends, ends, longest, longest, causal=True, block_table=table)

    def cache(q, k, v, ends, lengths, table):
        rows = lengths.shape[0]
        k, v = (x[: rows * (len(x) // rows)].view(rows, -1, *x.shape[1:]) for x in (k, v))
        return f.flash_attn_with_kvcache(q[:rows, None], k, v, cache_seqlens=lengths, causal=True)

    def paged_cache(q, k, v, ends, lengths, table):
        pages = (x.view(-1, 16, *x.shape[1:]) for x in (k, v))
        return f.flash_attn_with_kvcache(
            q[: len(lengths), None], *pages, cache_seqlens=lengths, block_table=table, causal=True
        )

    return {
        "flash_attn_varlen_func": lambda q, k, v, ends, *_: f.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True),
        "flash_attn_varlen_func, window": lambda q, k, v, ends, *_: f.flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest, window_size=(100, 0)
        ),
        "flash_attn_varlen_qkvpacked_func": lambda q, k, v, ends, *_: f.flash_attn_varlen_qkvpacked_func(
            torch.stack([k, k, v], 1), ends, longest, causal=True
        ),
        "flash_attn_varlen_kvpacked_func": lambda q, k, v, ends, *_: f.flash_attn_varlen_kvpacked_func(
            q, torch.stack([k, v], 1), ends, ends, longest, longest, causal=True
        ),
        "flash_attn_varlen_func, pages": with_pages,
        "flash_attn_with_kvcache": cache,
        "flash_attn_with_kvcache, pages": paged_cache,
    }  # fmt: skip


def graphs(out: Path, seed: int, replays: int = 4) -> Record:
    """Every packed call captured once and replayed with other tokens and other lengths: bitwise what the same call gives without a graph?

    Those with a backward pass are captured with it. Without a GPU there is nothing to capture, and the graph is the call itself.
    """
    rng, rows = random.Random(seed), []
    generator = torch.Generator(DEVICE).manual_seed(seed)
    total, count, dtype = (4096, 8, torch.bfloat16) if DEVICE == "cuda" else (64, 4, torch.float32)
    for name, call in packed_calls().items():
        trains = "cache" not in name and "pages" not in name

        def drawn(name=name) -> list[Tensor]:
            tokens = [
                torch.randn(total, heads, 64, generator=generator, device=DEVICE).to(dtype) for heads in (4, 2, 2)
            ]
            cuts = sorted(rng.sample(range(min(total - 4, LONGEST)), count - 1))
            ends = torch.tensor([0, *cuts, total - rng.randint(0, 3)], dtype=torch.int32, device=DEVICE)
            if int(ends.diff().max()) > LONGEST:
                ends[-1] = ends[-2] + LONGEST
            pages = torch.randperm(total // 16, generator=generator, device=DEVICE).to(torch.int32).view(count, -1)
            if "pages" in name and "varlen" in name:
                ends = (torch.arange(count + 1, device=DEVICE) * rng.randint(1, pages.shape[1] * 16)).to(torch.int32)
            lengths = torch.tensor(
                [rng.randint(1, total // count) for _ in range(count)], dtype=torch.int32, device=DEVICE
            )
            return [*tokens, ends, lengths, pages]

        def both(q, k, v, *rest, call=call, trains=trains) -> list[Tensor]:
            with (
                use_config(FlashAttentionConfig(backend=BACKEND)),
                contextlib.nullcontext() if trains else torch.no_grad(),
            ):
                inputs = [x.detach().requires_grad_(trains) for x in (q, k, v)]
                result = call(*inputs, *rest)
                grads = torch.autograd.grad(result.float().square().sum(), inputs, allow_unused=True) if trains else ()
            return [result.detach(), *(x for x in grads if x is not None)]

        static = drawn()
        results, replay = _captured(lambda static=static, both=both: both(*static))
        differ = []
        for number in range(replays):
            fresh = drawn()
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
            replay()
            if not all(torch.equal(a, b) for a, b in zip(both(*fresh), results, strict=True)):
                differ.append(number)
        rows.append({"case": name, "backward": trains, "replays": replays, "differ": differ})
        note = "Packed calls in a CUDA graph, replayed with other lengths, against the same calls without it, bitwise."
        save_record(record := new_record("everyday_graphs", rows, CHECKED_ON, note, seed=seed), out)
    return record


def ways(out: Path) -> Record:
    """Every way of use on every backend and function (tests/everyday/ways.py)."""
    rows = try_all(subjects_here(), DEVICE)
    for row in rows:
        row["failed"] = [row["message"]] if row["outcome"] == "FAILS" else []
    save_record(record := new_record("everyday", rows, CHECKED_ON, "tests/everyday/ways.py on a GPU."), out)
    return record


def prices(out: Path, seed: int) -> Record:
    """What each property costs: time on the device (a CUDA graph of the call) and of a call from Python, with it and without it, in turns."""
    generator, rows = torch.Generator(DEVICE).manual_seed(seed), []

    def tokens(length: int, dim: int, heads: tuple[int, ...] = (32, 8, 8)) -> list[Tensor]:
        return [
            torch.randn(1, n, length, dim, generator=generator, device=DEVICE).bfloat16().requires_grad_()
            for n in heads
        ]

    rng = random.Random(seed)
    for dim in (64, 128):
        lengths = []
        while sum(lengths) < 32768 - 4000:
            lengths.append(rng.randint(50, 4000))
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE)
        sequences = masks.Varlen(ends)
        mask = sequences & masks.Causal(sequences.offset(int(ends[-1]), DEVICE))
        packed = tokens(int(ends[-1]), dim)
        square = tokens(8192, dim)
        sinks = torch.randn(32, device=DEVICE, requires_grad=True)
        pairs = {
            f"packing='aligned', {len(lengths)} sequences of 50 to 4,000 tokens": (
                packed, {"mask": mask}, {"mask": mask, "config": ALIGNED}),
            "dropout 0.1, causal, 8k": (square, {"causal": True}, {"causal": True, "dropout_p": 0.1}),
            "sinks, causal, 8k": (square, {"causal": True}, {"causal": True, "sinks": sinks}),
        }  # fmt: skip
        for name, (inputs, without, having) in pairs.items():
            timed = {}
            for label, options in (("without", without), ("with", having)):

                def forward(options=options, inputs=inputs):
                    with torch.no_grad():
                        return attention(*inputs, **options, backend=BACKEND)

                def both(options=options, inputs=inputs):
                    result = attention(*inputs, **options, backend=BACKEND)
                    return torch.autograd.grad(result, inputs, result)

                for direction, call in (("forward", forward), ("both", both)):
                    timed[direction, label] = time_call(call, device=DEVICE, budget_s=0.2)
            for direction in ("forward", "both"):
                a, b = (timed[direction, label].median_ms for label in ("without", "with"))
                rows.append(
                    {
                        "property": name,
                        "head_dim": dim,
                        "direction": direction,
                        "without_ms": a,
                        "with_ms": b,
                        "ratio": round(b / a, 3),
                    }
                )
    q, k, v = (x.detach() for x in tokens(1, 128, (32, 8, 8)))
    k, v = (x.expand(-1, -1, 4096, -1).contiguous() for x in (k, v))
    known = masks.KeyLengths(torch.tensor([4000], device=DEVICE))
    for name, asked in (("nothing read", False), ("check_values()", True)):
        with check_values() if asked else contextlib.nullcontext():
            made = time_call(
                lambda: attention(q, k, v, mask=masks.KeyLengths(known.lengths), backend=BACKEND),
                device=DEVICE,
                budget_s=0.2,
            )
        rows.append(
            {
                "property": f"a mask of lengths on the device, {name}",
                "head_dim": 128,
                "direction": "forward",
                "with_ms": made.median_ms,
            }
        )
    note = "bf16, 32 query heads and 8 KV heads; eager calls between two device events, medians; with and without, one after the other."
    for row in rows:
        row["failed"] = []
    save_record(record := new_record("everyday_prices", rows, CHECKED_ON, note, seed=seed), out)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["packs", "dropout", "graphs", "ways", "prices", "all"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--packs", type=int, default=200)
    parser.add_argument("--dropouts", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which no random problem is begun"
    )
    options = parser.parse_args()
    sets = options.workers, options.out, options.limit
    checks = {
        "packs": lambda: packs(options.packs, options.seed, *sets),
        "dropout": lambda: dropout(options.dropouts, options.seed, *sets),
        "graphs": lambda: graphs(options.out, options.seed),
        "ways": lambda: ways(options.out),
        "prices": lambda: prices(options.out, options.seed),
    }
    if DEVICE == "cpu":
        del checks["prices"]
    failures = sum(count_failures(name, run) for name, run in checks.items() if options.check in (name, "all"))
    print(f"{failures} failures" if failures else "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
