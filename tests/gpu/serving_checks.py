"""Serving on a GPU, against the oracle: flash_attn_with_kvcache, PagedKVCache, shared prefixes and injected memories.

python tests/gpu/serving_checks.py --cases 300 --workers 14 --out results

Random cases, a kind for each set of them; the record is written as it goes. What must not be read is NaN. Without a GPU everything
runs small in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from in_sets import now, of_budget, run_in_sets, run_program, started_kernels, summary_of

from flashlib import attention
from flashlib.config import InjectionConfig
from flashlib.inference import (
    KVInjector,
    Memory,
    OutOfPagesError,
    PagedKVCache,
    SharedPrefix,
    decode_attention,
    shared_prefix_attention,
)
from flashlib.interop.flash_attn import flash_attn_with_kvcache
from flashlib.masks import Window
from flashlib.measure.records.record import Record, new_record
from flashlib.measure.records.sources import decode_sources, kernel_sources
from flashlib.reference import Comparison, check, error_budget, largest_error, one_rounding, oracle
from flashlib.rotary import rotary_frequencies, rotary_table, turn_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
DTYPES = (*[torch.bfloat16] * 4, *[torch.float16] * 3, torch.float32)
HEAD_DIMS = {"cuda": (64, 64, 128, 128, 128, 256, 96), "cpu": (8, 24)}[DEVICE]
HEADS = {"cuda": ((4, 1), (8, 2), (6, 2), (2, 2), (16, 1)), "cpu": ((4, 1), (4, 2), (1, 1))}[DEVICE]
LENGTHS = {"cuda": (0, 1, 9, 80, 513, 1500, 4000), "cpu": (0, 1, 9, 33)}[DEVICE]
PREFIXES = {"cuda": (1, 40, 500, 4096, 8192), "cpu": (1, 5, 24)}[DEVICE]
OWN = {"cuda": (1, 17, 200), "cpu": (1, 17)}[DEVICE]  # keys beside a memory
PAGE_SIZES = {"cuda": (1, 16, 16, 64, 256), "cpu": (1, 2, 16)}[DEVICE]
SERVING = {
    "kvcache": ["interop/flash_attn/kv_cache.py", "interop/flash_attn/pages.py", "rotary.py"],
    "pages": ["inference/paged.py", "rotary.py"],
    "prefix": ["inference/prefix.py"],
    "injection": ["inference/injection.py", "inference/prefix.py"],
}
CHECKED_ON = sorted(
    {"reference.py", "masks.py", "spec.py", "attention.py", *kernel_sources(), *decode_sources()}.union(*SERVING.values())
)  # fmt: skip


@dataclass(frozen=True)
class ServingSet:
    """A kind of case, and what its kernels are compiled for.

    Attributes:
        choices: the seed of all choices that change the machine code; cases of a set share them, and their kernels.
    """

    kind: str
    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int]
    page_size: int
    choices: int

    @classmethod
    def draw(cls, seed: int) -> ServingSet:
        rng = random.Random(seed)
        # Half of all are calls with a cache, of which there are most arguments.
        kind = rng.choice(("kvcache", "kvcache", "kvcache", "pages", "prefix", "injection"))
        sizes = rng.choice(HEAD_DIMS), rng.choice(HEADS), rng.choice(PAGE_SIZES)
        return cls(kind, rng.choice(DTYPES), *sizes, choices=rng.getrandbits(30))

    def told(self) -> dict[str, str]:
        """The features by name, in words that a record can count."""
        return {
            **{"kind": self.kind, "dtype": str(self.dtype).removeprefix("torch.")},
            **{"head_dim": f"{self.head_dim}", "heads": "{}/{}".format(*self.heads)},
        }


class Case:
    """One random case: draws its numbers, and collects what is found.

    Attributes:
        rng: for what differs from case to case; shared: for what the cases of a set share.
        told: features of it by name, as words. comparisons: with the oracle. wrong: what else was not as it should be.
    """

    def __init__(self, features: ServingSet, seed: int) -> None:
        self.features, self.rng, self.shared = features, random.Random(seed), random.Random(features.choices)
        self.generator = torch.Generator(device=DEVICE).manual_seed(seed)
        self.told: dict[str, str] = {}
        self.comparisons: list[Comparison] = []
        self.wrong: list[str] = []

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers ``[*shape, head_dim]``."""
        drawn = torch.randn(*shape, self.features.head_dim, generator=self.generator, device=DEVICE)
        return drawn.to(self.features.dtype)

    def expect(self, what: str, holds: bool) -> None:
        if not holds:
            self.wrong.append(what)

    def expect_bits(self, what: str, got: Tensor, wanted: Tensor) -> None:
        """Equal numbers, and NaN where NaN is wanted."""
        self.expect(what, torch.equal(got.nan_to_num(7.5), wanted.nan_to_num(7.5)))

    def compare(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
        self.comparisons.append(check(out, lse, q, k, v, **options))

    def softcap(self) -> float:
        return self.shared.choice((0.0, 0.0, 0.0, 15.0))


def kvcache(case: Case) -> None:
    """flash_attn_with_kvcache: every argument, in caches that lie in the three ways there are."""
    rng, (heads, kv_heads), head_dim = case.rng, case.features.heads, case.features.head_dim
    shared, batch, new = case.shared, rng.choice((1, 3)), rng.choice((None, 1, 6))
    q_len, layout = shared.choice((1, 1, 4)), shared.choice(("contiguous", "batch_idx", "paged"))
    lengths = [rng.choice(LENGTHS) for _ in range(batch)]
    padding = [rng.randint(0, n) if rng.random() < 0.5 else 0 for n in lengths] if rng.random() < 0.3 else [0] * batch
    room = max(LENGTHS) + 6 + shared.choice((0, 9))
    keys, values = ({"at": case.randn(batch, room, kv_heads)} for _ in range(2))
    stored = torch.arange(room, device=DEVICE)
    held = (stored >= _on_device(padding)[:, None]) & (stored < _on_device(lengths)[:, None])
    for memory in (keys, values):
        memory["at"] = memory["at"].masked_fill(~held[..., None, None], NAN)  # [batch, room, kv_heads, head_dim]
    where, page, slot, pools = _laid_out(case, layout, lengths, new or 0, room)
    for memory, pool in zip((keys, values), pools, strict=True):
        pool[page[held], slot[held]] = memory["at"][held]

    options = {"causal": shared.random() < 0.5, "softcap": case.softcap()}
    options["window_size"] = shared.choice(((-1, -1), (-1, -1), (3, -1), (0, 0), (200, 4)))
    left, right = (None if width < 0 else width for width in options["window_size"])
    exact = {"mask": Window(left, 0 if options["causal"] else right), "softcap": options["softcap"]}
    if rng.random() < 0.3:
        options["softmax_scale"] = exact["scale"] = rng.choice((0.05, 0.3))
    if any(padding):
        options["cache_leftpad"] = _on_device(padding).to(torch.int32)
    slopes = torch.rand(batch, heads, generator=case.generator, device=DEVICE) if rng.random() < 0.2 else None
    if slopes is not None:
        options["alibi_slopes"] = slopes
    q, starts = case.randn(batch, q_len, heads), _on_device(lengths)[:, None]
    turned, rotary = q, new is not None and rng.random() < 0.5
    if new is not None:
        options |= {"k": case.randn(batch, new, kv_heads), "v": case.randn(batch, new, kv_heads)}
        written = {"k": options["k"], "v": options["v"]}
    if rotary:
        interleaved = rng.random() < 0.5
        tables = rotary_table(
            torch.arange(room + 300, device=DEVICE), rotary_frequencies(rng.choice((8, head_dim)), 1e4)
        )
        options |= {"rotary_cos": tables[0], "rotary_sin": tables[1], "rotary_interleaved": interleaved}
        # Without a mask all queries stand where the first one does.
        advance = int(options["causal"] or options["window_size"] != (-1, -1))
        steps = advance * torch.arange(q_len, device=DEVICE)
        turned = _turned(case, "q", q, tables, starts + steps, interleaved)
        positions = starts + torch.arange(new, device=DEVICE)
        written["k"] = _turned(case, "k", options["k"], tables, positions, interleaved)
    options["cache_seqlens"] = _on_device(lengths).to(rng.choice((torch.int32, torch.int64)))
    options["num_splits"] = rng.choice((0, 1, 5))
    case.told = {
        "layout": layout,
        "rotary": str(rotary),
        "leftpad": str(any(padding)),
        "alibi": str(slopes is not None),
    }
    wanted = [pool.clone() for pool in pools]
    if new is not None:
        behind = (starts + torch.arange(new, device=DEVICE)).flatten()
        request = torch.arange(batch, device=DEVICE).repeat_interleave(new)
        for memory, name, pool in zip((keys, values), "kv", wanted, strict=True):
            memory["at"][request, behind] = written[name].flatten(0, 1)
            pool[page[request, behind], slot[request, behind]] = written[name].flatten(0, 1)

    out, lse = flash_attn_with_kvcache(q, *pools, **where, **options, return_softmax_lse=True)

    for name, pool, expected in zip(("k_cache", "v_cache"), pools, wanted, strict=True):
        case.expect_bits(f"{name} holds what it should", pool, expected)
    for request, (begin, length) in enumerate(zip(padding, lengths, strict=True)):
        seen, here = slice(begin, length + (new or 0)), slice(request, request + 1)
        biased = {} if slopes is None else {"alibi_slopes": slopes[request]}
        rows = (x[here].transpose(1, 2) for x in (turned, keys["at"][:, seen], values["at"][:, seen]))
        case.compare(out[here].transpose(1, 2), lse[here], *rows, **exact, **biased)


def _on_device(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def _laid_out(
    case: Case, layout: str, lengths: list[int], new: int, room: int
) -> tuple[dict, Tensor, Tensor, list[Tensor]]:
    """A cache of NaN: the arguments that say where requests lie, page and slot ``[batch, room]`` of each position, and K and V."""
    rng, (_, kv_heads), batch = case.rng, case.features.heads, len(lengths)
    positions = torch.arange(room, device=DEVICE).expand(batch, -1)
    if layout == "paged":
        size = case.features.page_size
        width, held = -(-room // size), [-(-(length + new) // size) for length in lengths]
        pages = torch.randperm(sum(held) + 2, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
        ends = [0, *torch.tensor(held).cumsum(0).tolist()]
        table = torch.full((batch, width), rng.choice((-1, 10**6)), dtype=torch.int32)
        for request, (begin, end) in enumerate(pairwise(ends)):
            table[request, : end - begin] = pages[begin:end]
        table = table.to(DEVICE)
        where, lead = {"block_table": table}, (len(pages), size)
        page, slot = table.long().gather(1, positions // size), positions % size
    else:
        rows = torch.arange(batch, device=DEVICE)
        where, lead = {}, (batch, room)
        if layout == "batch_idx":
            rows = torch.randperm(batch + 2, generator=case.generator, device=DEVICE)[:batch]
            where, lead = {"cache_batch_idx": rows.to(torch.int32)}, (batch + 2, room)
        page, slot = rows[:, None].expand(-1, room), positions
    return where, page, slot, [torch.full_like(case.randn(*lead, kv_heads), NAN) for _ in range(2)]


def _turned(
    case: Case, name: str, x: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor, interleaved: bool
) -> Tensor:
    """``[batch, tokens, heads, head_dim]`` turned as the call should turn it, itself held against float64."""
    cos, sin = (table[positions] for table in tables)
    turned = turn_pairs(x.transpose(1, 2), cos, sin, interleaved=interleaved).transpose(1, 2)
    exact = turn_pairs(x.double().transpose(1, 2), cos.double(), sin.double(), interleaved=interleaved).transpose(1, 2)
    # Two products and their sum in fp32, and one rounding to the dtype of x.
    allowed = one_rounding(exact, x.dtype) + 4 * one_rounding(exact, torch.float32)
    case.expect(f"{name} is turned", largest_error(turned, exact) <= allowed)
    return turned


def pages(case: Case) -> None:
    """A PagedKVCache whose requests come, grow, fork, are cut and go; then a step of decoding for all of them."""
    rng, (heads, kv_heads), size = case.rng, case.features.heads, case.features.page_size
    most = 6 * max(LENGTHS) // size + 40
    cache = PagedKVCache(most, size, kv_heads, case.features.head_dim, dtype=case.features.dtype, device=DEVICE)
    held: dict[int, list[Tensor]] = {}  # what each request should hold: k and v [kv_heads, tokens, head_dim]
    frequencies = rotary_frequencies(case.features.head_dim) if rng.random() < 0.5 else None
    done = Counter()
    _poison_free_pages(cache)
    for _ in range(14):
        action = rng.choice(("add", "append", "append", "append", "fork", "free", "truncate"))
        if action == "add" or not held:
            held[cache.add()] = [case.randn(kv_heads, 0) for _ in range(2)]
        elif action == "append":
            _append(case, cache, held, frequencies)
        elif action == "fork":
            parent = rng.choice(list(held))
            held[cache.fork(parent)] = list(held[parent])
        elif action == "free" and len(held) > 1:
            request = rng.choice(list(held))
            cache.free(request)
            del held[request]
            _poison_free_pages(cache)
        elif action == "truncate":
            request = rng.choice(list(held))
            length = rng.randint(0, held[request][0].shape[1])
            cache.truncate(request, length)
            held[request] = [x[:, :length] for x in held[request]]
        done[action] += 1
    _expect_out_of_pages(case, cache, held)
    case.told = {"page_size": f"{size}", "rotary": str(frequencies is not None), "forks": str(done["fork"] > 0)}
    requests = rng.sample(list(held), len(held))
    q_len, softcap = case.shared.choice((1, 1, 3)), case.softcap()
    q = case.randn(len(requests), heads, q_len)
    how = case.shared.choice(({}, {"num_splits": 3}, {"split_size": 128}))
    lengths, table = cache.lengths(requests), cache.block_table(requests)
    options = {"lengths": lengths, "block_table": table, "softcap": softcap, "return_lse": True, "backend": "triton"}
    if table.shape[1]:
        out, lse = decode_attention(q, cache.key_pages, cache.value_pages, **options, **how)
    for at, request in enumerate(requests):
        k, v = (x[None] for x in held[request])
        for name, got, wanted in zip(("keys", "values"), cache.gather(request), (k, v), strict=True):
            case.expect_bits(f"request {request} holds its {name}", got, wanted)
        if table.shape[1]:
            here = slice(at, at + 1)
            case.compare(out[here], lse[here], q[here], k, v, causal=True, softcap=softcap)


def _append(case: Case, cache: PagedKVCache, held: dict[int, list[Tensor]], frequencies: Tensor | None) -> None:
    rng = case.rng
    requests = rng.sample(list(held), rng.randint(1, len(held)))
    most = rng.choice((1, 7, max(LENGTHS) // 4))
    counts = [rng.randint(0, most) for _ in requests]
    k, v = (case.randn(len(requests), cache.key_pages.shape[1], most) for _ in range(2))
    for at, count in enumerate(counts):
        k[at, :, count:] = v[at, :, count:] = NAN
    positions = cache.next_positions(requests, most)
    try:
        cache.append(requests, k, v, counts, rotary=frequencies)
    except OutOfPagesError:
        return
    if frequencies is not None:
        k = turn_pairs(k, *rotary_table(positions, frequencies))
    for at, (request, count) in enumerate(zip(requests, counts, strict=True)):
        held[request] = [
            torch.cat([old, new[at, :, :count]], 1) for old, new in zip(held[request], (k, v), strict=True)
        ]


def _poison_free_pages(cache: PagedKVCache) -> None:
    used = cache.block_table(cache.requests).flatten().long()
    free = torch.ones(cache.num_pages + 1, dtype=torch.bool, device=DEVICE).index_fill(
        0, used.clamp(min=-1) % (cache.num_pages + 1), False
    )
    for memory in (cache.key_pages, cache.value_pages):
        memory[free[:-1]] = NAN


def _expect_out_of_pages(case: Case, cache: PagedKVCache, held: dict[int, list[Tensor]]) -> None:
    """More tokens than there is room for are refused, and nothing of them is kept."""
    request = case.rng.choice(list(held))
    too_many = (cache.free_pages + 2) * cache.page_size
    k = case.randn(1, 1, 1).expand(1, cache.key_pages.shape[1], too_many, -1)
    before = cache.free_pages
    try:
        cache.append([request], k, k)
    except OutOfPagesError:
        case.expect("a refused append takes no page", cache.free_pages == before)
    else:
        case.expect("the cache knows that it is full", False)


def prefix(case: Case) -> None:
    """shared_prefix_attention: few requests and many, one level or two, lengths or none; so that every way to attend is taken."""
    rng, (heads, kv_heads) = case.rng, case.features.heads
    shared = case.shared
    batch, q_len = shared.choice((2, 5, 40, 64) if DEVICE == "cuda" else (2, 5)), shared.choice((1, 1, 3))
    levels, of_request, lengths = [], [], []
    for _ in range(shared.choice((1, 1, 2))):
        count, longest = shared.choice((1, 1, 1, 3)), shared.choice(PREFIXES)
        real = [longest] * count if shared.random() < 0.6 else [rng.randint(0, longest) for _ in range(count)]
        k, v = (_nan_behind(case.randn(count, kv_heads, longest), real) for _ in range(2))
        members = None if count == 1 else [rng.randrange(count) for _ in range(batch)]
        levels.append(SharedPrefix(k, v, members=members, lengths=None if min(real) == longest else real))
        of_request.append(members or [0] * batch)
        lengths.append(real)
    room = q_len + shared.choice((0, 5, 100))
    own = [room] * batch if shared.random() < 0.5 else [rng.randint(q_len, room) for _ in range(batch)]
    q, k, v = (
        case.randn(batch, number, length) for number, length in ((heads, q_len), (kv_heads, room), (kv_heads, room))
    )
    k, v, softcap = _nan_behind(k, own), _nan_behind(v, own), case.softcap()
    with started_kernels(started := Counter()):
        out, lse = shared_prefix_attention(
            q, levels, k, v, lengths=None if min(own) == room else own, softcap=softcap, return_lse=True
        )
    case.told = {"levels": f"{len(levels)}", "batch": f"{batch}", "kernels": ", ".join(sorted(started))}
    for request in rng.sample(range(batch), min(batch, 3)):
        here = slice(request, request + 1)
        parts = [
            (level.k[chosen[request]][:, : real[chosen[request]]], level.v[chosen[request]][:, : real[chosen[request]]])
            for level, chosen, real in zip(levels, of_request, lengths, strict=True)
        ]
        parts.append((k[request, :, : own[request]], v[request, :, : own[request]]))
        whole = [torch.cat(side, dim=1)[None] for side in zip(*parts, strict=True)]
        case.compare(out[here], lse[here], q[here], *whole, causal=True, softcap=softcap)


def _nan_behind(x: Tensor, lengths: list[int]) -> Tensor:
    behind = torch.arange(x.shape[2], device=DEVICE) >= _on_device(lengths)[:, None]
    return x.masked_fill(behind[:, None, :, None], NAN)


def injection(case: Case) -> None:
    """KVInjector in both meanings of alpha: at once, and in chunks from the host's memory."""
    rng, (heads, kv_heads) = case.rng, case.features.heads
    shared = case.shared
    batch, length, memory_length = shared.choice((1, 4)), shared.choice(OWN), shared.choice(PREFIXES)
    memories = shared.choice((1, batch))
    q, k, v = (case.randn(batch, number, length) for number in (heads, kv_heads, kv_heads))
    memory = Memory(*(case.randn(memories, kv_heads, memory_length) for _ in range(2)))
    mode, softcap = rng.choice(("blend", "gate")), case.softcap()
    options = {"causal": True, "softcap": softcap}
    alpha = rng.choice((1.0, 1.0, 0.0, 0.3) + ((5.0,) if mode == "gate" else ()))
    chunk_size = shared.choice((None, 1024, 7 if memory_length <= 40 else 200))
    case.told = {"mode": mode, "alpha": f"{alpha}", "chunks": f"{chunk_size}"}
    injector = KVInjector(InjectionConfig(mode=mode))
    if chunk_size is None:
        out = injector.inject(q, k, v, memory, alpha=alpha, **options)
    else:
        out = injector.inject_chunked(q, k, v, memory.to("cpu", q.dtype), alpha=alpha, chunk_size=chunk_size, **options)
    whole = [torch.cat([x.expand(batch, -1, -1, -1), y], 2) for x, y in ((memory.k, k), (memory.v, v))]
    if alpha == 0:
        case.expect_bits("alpha 0 is attention without the memory", out, attention(q, k, v, **options))
    elif alpha == 1:
        case.compare(out, None, q, *whole, **options)
    else:
        case.comparisons.append(_mixture(out, q, k, v, memory, alpha, mode, softcap))


def _mixture(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Memory, alpha: float, mode: str, softcap: float
) -> Comparison:
    """Against the two parts in float64, mixed there. The error of a mixture is at most that of its parts and of its weights."""
    shared = [x.expand(len(q), -1, -1, -1) for x in (memory.k, memory.v)]
    problems = [((q, k, v), {"causal": True, "softcap": softcap}), ((q, *shared), {"softcap": softcap})]
    (local, local_lse), (far, far_lse) = (oracle(*inputs, **options) for inputs, options in problems)
    share = torch.sigmoid(far_lse - local_lse)
    weight = alpha * share if mode == "blend" else alpha * share / (1 - share + alpha * share)
    exact = local + weight[..., None] * (far - local)
    budgets = [error_budget(*inputs, **options) for inputs, options in problems]
    span = float((far - local).abs().max())
    allowed = sum(budget.out + max(1.0, alpha) * budget.lse * span for budget in budgets) + one_rounding(exact, q.dtype)
    error = largest_error(out, exact)
    return Comparison(error <= allowed, {"out": error}, {"out": allowed})


KINDS: dict[str, Callable[[Case], None]] = {
    "kvcache": kvcache,
    "pages": pages,
    "prefix": prefix,
    "injection": injection,
}


def one_case(features: ServingSet, seed: int) -> dict:
    """One case: largest errors as fractions of their budgets, and which kernels ran."""
    case, started, kernels = Case(features, seed), now(), Counter()
    with started_kernels(kernels), torch.no_grad():
        KINDS[features.kind](case)
    failed = [comparison.message for comparison in case.comparisons if not comparison.passed] + case.wrong
    worst = [of_budget(comparison) for comparison in case.comparisons]
    names = {name for fractions in worst for name in fractions}
    return {
        "passed": not failed,
        "of_budget": {name: max(fractions.get(name, 0.0) for fractions in worst) for name in names},
        "message": f"{features}: {case.told}: {failed[:3]}" if failed else None,
        "kernels": dict(kernels),
        "seconds": [now() - started, 0.0],
        "told": {f"{features.kind}: {name}": value for name, value in case.told.items()},
    }


def random_cases(count: int, seed: int, workers: int, out: Path, limit_s: float = float("inf")) -> Record:
    """``count`` cases in so many processes."""
    options = {"count": count, "seed": seed, "workers": workers, "out": out, "limit_s": limit_s}
    return run_in_sets(ServingSet.draw, one_case, _record, **options)


def _record(rows: list[dict], asked: int, **extra) -> Record:
    summary = summary_of(rows, asked, lambda seed: ServingSet.draw(seed).told(), ("out", "lse"))
    note = "Random caches, prefixes and memories (tests/gpu/serving_checks.py) against float64 within the error budget."
    return new_record("serving_cases", [{"check": "serving", **summary}], CHECKED_ON, note, **extra)


if __name__ == "__main__":
    sys.exit(run_program(__doc__, "cases", 300, random_cases))
