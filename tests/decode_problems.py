"""Random decoding steps: ragged lengths, windows, contiguous and paged caches, splits of every kind, and NaN in all that is not to be read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from problems import Problem, poison
from torch import Tensor

from flashlib.masks import KeyLengths, Window

HEADS = ((1, 1), (2, 2), (4, 2), (8, 1), (9, 3), (16, 1))
HEAD_DIMS = (8, 40, 64, 111, 128)
PAGE_SIZES = (None, None, 1, 3, 4, 16, 64, 128)
NO_PAGE = 123_456_789  # stands where the block table must not be looked at


@dataclass
class DecodeProblem:
    """Arguments of ``decode_attention``, and the same problem as one for the oracle."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict = field(default_factory=dict)
    oracle: tuple = ()
    oracle_options: dict = field(default_factory=dict)

    def __repr__(self):
        shapes = ", ".join(f"{name}={tuple(x.shape)}" for name, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        return f"DecodeProblem({shapes}, {self.q.dtype}, {self.options})"


def random_decode_problem(rng: random.Random, *, dtypes, capacities, device="cpu") -> DecodeProblem:
    generator = torch.Generator(device=device).manual_seed(rng.getrandbits(48))
    dtype, (q_heads, kv_heads) = rng.choice(dtypes), rng.choice(HEADS)
    batch, q_len, capacity = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 1, 2, 5)), rng.choice(capacities)
    head_dim = rng.choice(HEAD_DIMS)
    v_head_dim = head_dim if rng.random() < 0.7 else rng.choice(HEAD_DIMS)

    def tensor(heads, length, dim):
        return torch.randn(batch, heads, length, dim, generator=generator, device=device).to(dtype)

    q, k, v = (
        tensor(q_heads, q_len, head_dim),
        tensor(kv_heads, capacity, head_dim),
        tensor(kv_heads, capacity, v_head_dim),
    )
    lengths = [rng.choice((0, 1, q_len, capacity, rng.randint(0, capacity))) for _ in range(batch)]
    lengths = torch.tensor([min(length, capacity) for length in lengths], dtype=rng.choice((torch.int32, torch.int64)))
    causal = rng.random() < 0.7
    window = None if rng.random() < 0.6 else (rng.choice((None, 0, 5, 40)), rng.choice((None, 0, 3)))
    left, right = window or (None, None)
    shared = {"softcap": rng.choice((0.0, 0.0, 5.0)), "scale": rng.choice((None, None, 0.3))}
    mask = KeyLengths(lengths) & Window(left, 0 if causal else right, offset=lengths.long() - q_len)
    problem = Problem(q, k, v, {"mask": mask, **shared})
    if rng.random() < 0.8:
        poison(problem, rng)
    options = {"lengths": lengths.to(device), "causal": causal, "window": window, **shared, **random_splits(rng)}
    page_size = rng.choice(PAGE_SIZES)
    seen = problem.spec.intervals.seen_keys().expand(batch, -1)
    if page_size is None:
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) if rng.random() < 0.5 else x for x in (k, v)]
    else:
        table, pages = paged(rng, (k, v), seen, page_size)
        options["block_table"], given = table.to(device), pages
    return DecodeProblem(q, *given, options, (q, k, v), problem.options)


def random_splits(rng: random.Random) -> dict:
    choice = rng.random()
    if choice < 0.3:
        return {}
    if choice < 0.6:
        return {"num_splits": rng.choice((1, 2, 3, 7, 20))}
    return {"split_size": rng.choice((16, 32, 50, 64, 200))}


def paged(rng: random.Random, caches: tuple[Tensor, ...], seen: Tensor, page_size: int) -> tuple[Tensor, list[Tensor]]:
    """Caches ``[B, Hkv, capacity, D]`` cut into pages in random order. Pages that no row sees are nowhere, and all else is NaN."""
    batch, capacity = seen.shape
    per_request = -(-capacity // page_size) + rng.choice((0, 2))
    wanted = [
        (b, page)
        for b in range(batch)
        for page in range(per_request)
        if seen[b, page * page_size : (page + 1) * page_size].any()
    ]
    places = rng.sample(range(len(wanted) + 3), len(wanted))
    table = torch.full((batch, per_request), NO_PAGE, dtype=torch.int32)
    pools = [
        torch.full((len(wanted) + 3, x.shape[1], page_size, x.shape[3]), float("nan"), dtype=x.dtype) for x in caches
    ]
    for (b, page), place in zip(wanted, places, strict=True):
        table[b, page] = place
        keys = slice(page * page_size, min((page + 1) * page_size, capacity))
        for pool, x in zip(pools, caches, strict=True):
            pool[place, :, : keys.stop - keys.start] = x[b, :, keys]
    return table, [pool.to(caches[0].device) for pool in pools]
