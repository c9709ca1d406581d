"""Decoding on a GPU: random caches against the oracle, the same bits in every batch, and CUDA graphs.

python tests/gpu/decode_checks.py all --cases 2000 --workers 14 --out results

Each check writes its record as it goes. Without a GPU everything runs small in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from in_sets import count_failures, now, of_budget, run_in_sets, started_kernels, summary_of

from flashlib.inference.decode import combine_splits, decode_attention
from flashlib.masks import KeyLengths, Window
from flashlib.measure.records.record import Record, new_record, save_record
from flashlib.measure.records.sources import decode_sources
from flashlib.partial import Partial, fold
from flashlib.reference import check, largest_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (*[torch.bfloat16] * 5, *[torch.float16] * 4, torch.float32)
HEAD_DIMS = (*[(64, 64)] * 3, *[(128, 128)] * 5, (256, 256), (96, 96), (128, 64), (64, 256), (40, 40), (59, 111))
GROUPS = (1, 1, 2, 3, 4, 4, 5, 8, 16)
PAGE_SIZES = (*[None] * 4, 1, 16, 16, 64, 128, 256)
SPLITS = (0, 1, 2, 3, 5, 8, 16, 33, 64, 100, 132, 133)
SPLIT_SIZES = {"cuda": (64, 100, 128, 256, 1024), "cpu": (16, 20, 32)}
LONGEST = {"cuda": 131072, "cpu": 90}
ORDINARY = {"cuda": (*range(1, 140), 255, 256, 257, 511, 1000, 1024, 2047, 4096, 5000), "cpu": (1, 3, 16, 17, 40)}
LONG_ONE_IN = 8
CHECKED_ON = ["reference.py", "masks.py", *decode_sources()]


@dataclass(frozen=True)
class CacheSet:
    """What the decoding kernel is compiled for, and what its rows are: problems that share it share the machine code.

    Attributes:
        group, q_len: query heads per KV head, and new tokens of each request. page_size: None for a contiguous cache.
        left, right: whether the window has those ends (right without causal only). causal.
        fixed_size: splits cut at multiples of a size, and not shared evenly.
        rows_first: the cache lies as [B, S, H, D].
    """

    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    kv_heads: int
    group: int
    q_len: int
    page_size: int | None
    left: bool
    right: bool
    causal: bool
    softcap: bool
    fixed_size: bool
    rows_first: bool
    lengths_dtype: torch.dtype

    @classmethod
    def draw(cls, seed: int) -> CacheSet:
        rng = random.Random(seed)
        head_dim, v_head_dim = rng.choice(HEAD_DIMS)
        return cls(
            dtype=rng.choice(DTYPES),
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            kv_heads=rng.choice((1, 2) if max(head_dim, v_head_dim) <= 128 else (1,)),
            group=rng.choice(GROUPS),
            q_len=rng.choice((1, 1, 1, 2, 3, 4, 5, 8)),
            page_size=rng.choice(PAGE_SIZES),
            left=rng.random() < 0.3,
            right=rng.random() < 0.1,
            causal=rng.random() < 0.8,
            softcap=rng.random() < 0.25,
            fixed_size=rng.random() < 0.35,
            rows_first=rng.random() < 0.5,
            lengths_dtype=rng.choice((torch.int32, torch.int64)),
        )

    def told(self) -> dict[str, str]:
        """The features by name, in words that a record can count."""
        window = {(True, True): "both", (True, False): "left", (False, True): "right"}.get(
            (self.left, self.right), "none"
        )
        return {
            **{"dtype": str(self.dtype).removeprefix("torch."), "head_dim": f"{self.head_dim}/{self.v_head_dim}"},
            **{"group": f"{self.group}", "q_len": f"{self.q_len}", "page_size": f"{self.page_size or 'contiguous'}"},
            **{"window": window, "causal": str(self.causal), "softcap": str(self.softcap)},
        }

    def problem(self, seed: int, device: str) -> DecodeProblem:
        """Requests with these features; now and then one of them is long."""
        rng, generator = random.Random(seed), torch.Generator(device=device).manual_seed(seed)
        longest = rng.randint(1, LONGEST[device]) if rng.randrange(LONG_ONE_IN) == 0 else None
        batch = rng.choice((1, 2)) if longest else rng.choice((1, 2, 3, 5))
        lengths = [0 if rng.random() < 0.1 else rng.choice(ORDINARY[device]) for _ in range(batch)]
        if longest:
            lengths[rng.randrange(batch)] = longest
        size = rng.choice((1.0, 1.0, 1.0, 0.0, 4.0))

        def tensor(heads, length, dim):
            return (size * torch.randn(batch, heads, length, dim, generator=generator, device=device)).to(self.dtype)

        room = -(-max(1, *lengths) // 16) * 16 + 16 * rng.randrange(2)  # some never filled
        q = tensor(self.kv_heads * self.group, self.q_len, self.head_dim)
        k, v = tensor(self.kv_heads, room, self.head_dim), tensor(self.kv_heads, room, self.v_head_dim)
        options = {"causal": self.causal}
        if self.left or self.right:
            options["window"] = tuple(
                rng.choice((0, 1, 7, 60, 300, 5000)) if end else None for end in (self.left, self.right)
            )
        if self.softcap:
            options["softcap"] = rng.choice((0.5, 5.0, 30.0))
        if rng.random() < 0.3:
            options["scale"] = rng.choice((0.05, 1.0))
        cuts = (
            {"split_size": rng.choice(SPLIT_SIZES[device])} if self.fixed_size else {"num_splits": rng.choice(SPLITS)}
        )
        return DecodeProblem(self, rng, q, k, v, torch.tensor(lengths, device=device), options, cuts)


class DecodeProblem:
    """Requests of unequal lengths, with NaN in every slot that holds no token.

    Attributes:
        lengths: int64 ``[B]``. q, k, v: what is to be attended to, contiguous, NaN behind the lengths. options: those that change
            the result. cuts: those that must not.
        call: arguments of ``decode_attention``, with the cache in the layout of the set.
    """

    def __init__(
        self, features: CacheSet, rng: random.Random, q, k, v, lengths: Tensor, options: dict, cuts: dict
    ) -> None:
        behind = torch.arange(k.shape[2], device=k.device)[None] >= lengths[:, None]
        self.q, self.k, self.v = q, *(x.masked_fill(behind[:, None, :, None], float("nan")) for x in (k, v))
        self.lengths, self.options, self.cuts = lengths, options, cuts
        cache = {"k": _laid_out(self.k, features.rows_first), "v": _laid_out(self.v, features.rows_first)}
        if features.page_size is not None:
            cache = _paged(self.k, self.v, lengths.tolist(), features, rng)
        self.call = {"q": q, **cache, "lengths": lengths.to(features.lengths_dtype), **options, **cuts}

    def run(self, **changes) -> tuple[Tensor, Tensor]:
        return decode_attention(**{**self.call, **changes}, return_lse=True, backend="triton")

    def check(self, out: Tensor, lse: Tensor):
        """Against float64. The rows of a group become rows of one long query, so that no key need be repeated for them."""
        kv_heads = self.k.shape[1]
        q_len, group = self.q.shape[2], self.q.shape[1] // kv_heads

        def rows(x):
            return x.unflatten(1, (kv_heads, group)).flatten(2, 3)

        token = torch.arange(q_len, device=self.q.device).repeat(group)
        offset = self.lengths[:, None] - q_len + token - torch.arange(group * q_len, device=self.q.device)
        left, right = self.options.get("window", (None, None))
        mask = Window(left, 0 if self.options["causal"] else right, offset=offset) & KeyLengths(self.lengths)
        numbers = {name: value for name, value in self.options.items() if name in ("scale", "softcap")}
        return check(rows(out), rows(lse), rows(self.q), self.k, self.v, mask=mask, **numbers)

    def __repr__(self) -> str:
        return f"lengths {self.lengths.tolist()}, room {self.k.shape[2]}, {self.options}, {self.cuts}"


def _laid_out(x: Tensor, rows_first: bool) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if rows_first else x


def _paged(k: Tensor, v: Tensor, lengths: list[int], features: CacheSet, rng: random.Random) -> dict[str, Tensor]:
    """The same keys and values in pages in random order. Pages that belong to nobody hold NaN; the table names them nowhere."""
    size, device = features.page_size, k.device
    held = [-(-length // size) for length in lengths]
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    pages = torch.randperm(sum(held) + 3, generator=generator).to(device)
    nowhere = rng.choice((-1, 2**31 - 1))
    table = torch.full((len(lengths), max(1, *held)), nowhere, dtype=torch.int32, device=device)
    pools = [
        torch.full((len(pages), x.shape[1], size, x.shape[3]), float("nan"), dtype=x.dtype, device=device)
        for x in (k, v)
    ]
    taken = 0
    for request, count in enumerate(held):
        mine = pages[taken : taken + count]
        table[request, :count] = mine.to(torch.int32)
        for pool, x in zip(pools, (k, v), strict=True):
            slots = x.new_full((x.shape[1], count * size, x.shape[3]), float("nan"))
            slots[:, : lengths[request]] = x[request, :, : lengths[request]]
            pool[mine] = slots.unflatten(1, (count, size)).transpose(0, 1)
        taken += count
    return {
        "k": _laid_out(pools[0], features.rows_first),
        "v": _laid_out(pools[1], features.rows_first),
        "block_table": table,
    }


def one_case(features: CacheSet, seed: int) -> dict:
    """Some requests: largest error as a fraction of its budget, and which kernels ran."""
    problem = features.problem(seed, DEVICE)
    started, kernels = now(), Counter()
    with started_kernels(kernels):
        out, lse = problem.run()
    computed = now()
    comparison = problem.check(out, lse)
    longest = int(problem.lengths.max())
    if DEVICE == "cuda" and longest > 10_000:
        torch.cuda.empty_cache()  # gigabytes in float64, which other processes need too
    splits = problem.cuts.get("num_splits")
    return {
        "passed": comparison.passed,
        "of_budget": of_budget(comparison),
        "message": None if comparison.passed else f"{features}: {problem}: {comparison.message}",
        "kernels": dict(kernels),
        "seconds": [computed - started, now() - computed],
        "told": {
            "longest": next(f"up to {bound}" for bound in (0, 128, 1024, 8192, 32768, 131072) if longest <= bound),
            "splits": "cut at multiples" if splits is None else "chosen" if splits == 0 else f"{splits}",
        },
    }


def random_cases(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    """``count`` decoding steps in so many processes."""
    options = {"count": count, "seed": seed, "workers": workers, "out": out, "limit_s": limit_s}
    return run_in_sets(CacheSet.draw, one_case, _cases_record, **options)


def _cases_record(rows: list[dict], asked: int, **extra) -> Record:
    summary = summary_of(rows, asked, lambda seed: CacheSet.draw(seed).told(), ("out", "lse"))
    note = "Random caches (tests/gpu/decode_checks.py), out and LSE, against float64 within the error budget."
    return new_record("decode_cases", [{"check": "random caches", **summary}], CHECKED_ON, note, **extra)


def batch_invariance(out: Path, seed: int, largest: int = 64) -> Record:
    """With a fixed split size: what a request gives alone, and in batches of 1 to 64 others, bit by bit."""
    rows = []
    for number, (head_dim, group, q_len, page_size, left) in enumerate(
        [
            (128, 4, 1, None, False),
            (128, 4, 1, 16, False),
            (64, 8, 3, 1, False),
            (128, 1, 1, 64, True),
            (256, 2, 1, None, False),
        ]
    ):
        features = CacheSet(torch.bfloat16, head_dim, head_dim, 2, group, q_len, page_size, left, False, True, False, True, False, torch.int32)  # fmt: skip
        rng = random.Random(seed + number)
        lengths = [rng.randint(q_len, 5000 if DEVICE == "cuda" else 50) for _ in range(largest)]
        generator = torch.Generator(device=DEVICE).manual_seed(seed + number)
        q, k, v = (
            torch.randn(largest, heads, length, head_dim, generator=generator, device=DEVICE).to(features.dtype)
            for heads, length in ((2 * group, q_len), (2, max(lengths)), (2, max(lengths)))
        )
        options = {"causal": True} | ({"window": (300, None)} if left else {})
        problem = DecodeProblem(
            features, rng, q, k, v, torch.tensor(lengths, device=DEVICE), options, {"split_size": 256}
        )
        alone = [_some(problem, [request]) for request in range(largest)]
        differ = []
        for size in range(1, largest + 1):
            members = rng.sample(range(largest), size)
            together = _some(problem, members)
            for place, request in enumerate(members):
                if not all(torch.equal(x[place], y[0]) for x, y in zip(together, alone[request], strict=True)):
                    differ.append({"batch": size, "request": request})
        rows.append({**features.told(), "batches": f"1 to {largest}", "differ": differ})
        note = (
            "Bitwise equality of out and LSE of each request alone and in random batches of every size, split_size=256."
        )
        record = new_record("decode_batches", rows, CHECKED_ON, note, seed=seed)
        save_record(record, out)
    return record


def _some(problem: DecodeProblem, members: list[int]) -> tuple[Tensor, Tensor]:
    """Some of the requests as a batch of their own."""
    by_request = ["q", "lengths"] + (["block_table"] if "block_table" in problem.call else ["k", "v"])
    return problem.run(**{name: problem.call[name][members] for name in by_request})


def determinism(out: Path, seed: int, repeats: int) -> Record:
    """The same step again and again, with splits chosen and with many, bit by bit."""
    rows, rng, enough = [], random.Random(seed), 1000 if DEVICE == "cuda" else 10
    for page_size, splits in ((None, 0), (None, 33), (16, 0), (1, 133)):
        features = CacheSet(torch.bfloat16, 128, 128, 2, 4, 1, page_size, False, False, True, False, False, False, torch.int32)  # fmt: skip
        problem = features.problem(rng.getrandbits(30), DEVICE)
        while int(problem.lengths.max()) < enough:
            problem = features.problem(rng.getrandbits(30), DEVICE)
        problem.call["num_splits"] = splits
        first = problem.run()
        differ = [
            number
            for number in range(1, repeats)
            if not all(torch.equal(x, y) for x, y in zip(first, problem.run(), strict=True))
        ]
        rows.append({**features.told(), "splits": splits, "repeats": repeats, "differ": differ})
    record = new_record("decode_determinism", rows, CHECKED_ON, "Bitwise equality over repeats.", seed=seed)
    save_record(record, out)
    return record


def graphs(out: Path, seed: int) -> Record:
    """A step captured once in a CUDA graph and replayed after lengths, queries and keys have changed, against the same without it."""
    rows = []
    for page_size in (None, 16):
        features = CacheSet(torch.bfloat16, 128, 128, 2, 4, 1, page_size, False, False, True, False, False, False, torch.int32)  # fmt: skip
        rng, room = random.Random(seed), 4096 if DEVICE == "cuda" else 64
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        q, k, v = (
            torch.randn(4, heads, length, 128, generator=generator, device=DEVICE).to(features.dtype)
            for heads, length in ((8, 1), (2, room), (2, room))
        )
        problem = DecodeProblem(features, rng, q, k, v, torch.full((4,), room, device=DEVICE), {"causal": True}, {})
        results, replay = _captured(problem.run)
        differ = []
        for number in range(4):
            lengths = torch.tensor([rng.randint(1, room) for _ in range(4)], dtype=torch.int32)
            problem.call["lengths"].copy_(lengths)
            problem.call["q"].normal_(generator=generator)
            replay()
            if not all(torch.equal(x, y) for x, y in zip(results, problem.run(), strict=True)):
                differ.append(number)
        rows.append({**features.told(), "replays": 4, "differ": differ})
    note = "A step captured in a CUDA graph, replayed with other lengths and queries, against the same call without it, bitwise."
    record = new_record("decode_graphs", rows, CHECKED_ON, note, seed=seed)
    save_record(record, out)
    return record


def combining(out: Path, seed: int, cases: int = 200) -> Record:
    """The kernel that merges splits, against the same algebra in float64: splits that saw nothing among them, and rows of nothing else."""
    rng, generator = random.Random(seed), torch.Generator(device=DEVICE).manual_seed(seed)
    failed, worst = [], 0.0
    for number in range(cases):
        shape = (
            rng.choice((1, 2, 3, 8, 33, 133)),
            rng.choice((1, 3)),
            rng.choice((1, 5)),
            rng.choice((1, 4)),
            rng.choice((64, 128, 59)),
        )
        partial = torch.randn(shape, generator=generator, device=DEVICE)
        lse = 5 * torch.randn(shape[:-1], generator=generator, device=DEVICE)
        lse[torch.rand(lse.shape, generator=generator, device=DEVICE) < rng.choice((0.0, 0.3, 0.9))] = float("-inf")
        partial[lse == float("-inf")] = float("nan")
        merged, merged_lse = combine_splits(partial, lse, backend="triton")
        nothing = Partial.identity(*shape[1:], dtype=torch.float64, device=DEVICE)
        exact = fold([nothing, *(Partial(o, m) for o, m in zip(partial.double(), lse.double(), strict=True))])
        # A weight is off by a few roundings of its exponent, of which the largest here is that of 5 * randn.
        budget = 64 * torch.finfo(torch.float32).eps * max(1.0, float(partial.nan_to_num().abs().max()))
        error = max(largest_error(merged, exact.out), largest_error(merged_lse, exact.lse) / 5)
        worst = max(worst, error / budget)
        if not error <= budget:
            failed.append({"case": number, "shape": shape, "error": error, "budget": budget})
    row = {"check": "combine", "asked": cases, "run": cases, "worst_of_budget": worst, "failed": failed}
    record = new_record(
        "decode_combine", [row], CHECKED_ON, "combine_splits against Partial's fold in float64.", seed=seed
    )
    save_record(record, out)
    return record


def _captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], object]]:
    """What the call returns, in memory that each replay writes anew; and the replay. Without a GPU, the call itself."""
    if DEVICE == "cpu":
        results = call()
        return results, lambda: [old.copy_(new) for old, new in zip(results, call(), strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return results, graph.replay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["determinism", "graphs", "batches", "combine", "cases", "all"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(30))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no random case is begun")
    options = parser.parse_args()
    checks = {
        "determinism": lambda: determinism(options.out, options.seed, options.repeats),
        "graphs": lambda: graphs(options.out, options.seed),
        "batches": lambda: batch_invariance(options.out, options.seed, 64 if DEVICE == "cuda" else 4),
        "combine": lambda: combining(options.out, options.seed, 200 if DEVICE == "cuda" else 20),
        "cases": lambda: random_cases(options.cases, options.seed, options.workers, options.out, options.limit),
    }
    failures = sum(count_failures(name, run) for name, run in checks.items() if options.check in (name, "all"))
    print(f"{failures} failures" if failures else "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
