"""Random attention problems: every shape, mask and option that ``attention`` promises, from one random source.

Used by hypothesis on a CPU and by long recorded runs on a GPU. All randomness comes from a ``random.Random``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashlib import AttentionSpec, masks

LENGTHS = (0, 1, 2, 3, 7, 16, 17, 31, 33, 64, 65, 100)
HEAD_DIMS = (1, 8, 40, 59, 64, 111, 128)
HEADS = ((1, 1), (2, 2), (4, 2), (6, 2), (3, 1), (9, 3))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BATCHES = (1, 1, 2, 3)
LAYOUTS = ("heads_first", "rows_first", "sliced", "transposed")
SOFTCAPS = (*(0.0,) * 7, 0.5, 5.0, 30.0)


@dataclass
class Problem:
    """Inputs of one call. ``options`` are the keyword arguments of ``attention`` that change the result."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict = field(default_factory=dict)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec.from_tensors(self.q, self.k, self.v, **self.options)

    def __repr__(self):
        return (
            f"Problem(q={tuple(self.q.shape)}, k={tuple(self.k.shape)}, v={tuple(self.v.shape)}, {self.q.dtype}, "
            f"strides={self.q.stride()}, options={self.options})"
        )


def random_problem(
    rng: random.Random,
    *,
    dtypes=DTYPES,
    lengths=LENGTHS,
    kv_lengths=None,
    head_dims=HEAD_DIMS,
    v_head_dims=None,
    batches=BATCHES,
    heads=HEADS,
    layouts=(LAYOUTS,) * 3,
    rule=None,
    softcaps=SOFTCAPS,
    alibi=(None,) * 8 + ("heads", "rows"),
    device="cpu",
) -> Problem:
    """A problem whose every choice is drawn from the list given for it. What is not listed here is free.

    Args:
        kv_lengths, v_head_dims: None for those of the queries, and often the very same number.
        layouts: names of :data:`LAYOUTS` for q, k and v.
        rule: gives the options ``mask`` and ``causal`` from ``(rng, batch, q_len, kv_len)``; None for any.
        alibi: None for no slopes, "heads" for slopes that rows share, "rows" for others in each row.
    """
    generator = torch.Generator(device=device).manual_seed(rng.getrandbits(48))
    dtype = rng.choice(dtypes)
    batch, (q_heads, kv_heads) = rng.choice(batches), rng.choice(heads)
    q_len, head_dim = rng.choice(lengths), rng.choice(head_dims)
    kv_len = q_len if kv_lengths is None and rng.random() < 0.4 else rng.choice(kv_lengths or lengths)
    v_head_dim = head_dim if v_head_dims is None and rng.random() < 0.7 else rng.choice(v_head_dims or head_dims)
    size = rng.choice((1.0, 1.0, 1.0, 0.0, 5.0))  # 0: all scores equal; 5: a few keys take all the weight

    def tensor(heads, length, dim, layouts):
        x = size * torch.randn(batch, heads, length, dim, generator=generator, device=device)
        return laid_out(x.to(dtype), rng.choice(layouts))

    q = tensor(q_heads, q_len, head_dim, layouts[0])
    k = tensor(kv_heads, kv_len, head_dim, layouts[1])
    v = tensor(kv_heads, kv_len, v_head_dim, layouts[2])
    options = (rule or random_rule)(rng, batch, q_len, kv_len)
    if rng.random() < 0.3:
        options["scale"] = rng.choice((0.05, 1.0))
    options["softcap"] = rng.choice(softcaps)
    slopes = rng.choice(alibi)
    if slopes:
        shapes = {
            "heads": ((q_heads,), (batch, q_heads)),
            "rows": ((1, q_heads, q_len), (batch, q_heads, q_len)),
        }
        options["alibi_slopes"] = torch.rand(rng.choice(shapes[slopes]), generator=generator, device=device)
    problem = Problem(q, k, v, options)
    if rng.random() < 0.6:
        poison(problem, rng)
    return problem


def random_rule(rng: random.Random, batch: int, q_len: int, kv_len: int) -> dict:
    """Any mask, or none, and causal or not, as options of ``attention``."""
    return {"mask": random_mask(rng, batch, q_len, kv_len), "causal": rng.random() < 0.3}


def random_mask(rng: random.Random, batch: int, q_len: int, kv_len: int) -> masks.Mask | None:
    """One mask, or two or three combined; or none."""
    kinds = rng.choices(
        ("causal", "window", "lengths", "documents", "varlen", "prefix", "intervals"), k=rng.choice((0, 1, 1, 2, 3))
    )
    mask = None
    for kind in kinds:
        part = _random_part(kind, rng, batch, q_len, kv_len)
        mask = part if mask is None else mask & part
    return mask


def _random_part(kind: str, rng: random.Random, batch: int, q_len: int, kv_len: int) -> masks.Mask:
    def width():
        return rng.choice((None, 0, 1, 5, 40, 200))

    if kind == "causal":
        return masks.Causal(_random_offset(rng, batch, q_len, kv_len))
    if kind == "window":
        return masks.Window(width(), width(), _random_offset(rng, batch, q_len, kv_len))
    if kind == "lengths":
        return masks.KeyLengths([rng.randint(0, kv_len) for _ in range(batch)])
    if kind == "prefix":
        lengths = rng.randint(0, kv_len + 2) if rng.random() < 0.5 else [rng.randint(0, kv_len) for _ in range(batch)]
        return masks.Prefix(lengths, _random_offset(rng, batch, q_len, kv_len))
    if kind == "varlen":
        sequences = rng.randrange(5)
        packed = masks.Varlen(_random_ends(rng, sequences, q_len), _random_ends(rng, sequences, kv_len))
        return packed if rng.random() < 0.5 else packed & masks.Window(width(), width(), packed.offset(q_len))
    if kind == "intervals":
        kind = rng.choice(("causal", "lengths", "varlen"))
        return masks.Intervals(_random_part(kind, rng, batch, q_len, kv_len).intervals(batch, q_len, kv_len))
    names = rng.sample(range(20), 5)
    if q_len == kv_len and rng.random() < 0.5:
        return masks.Documents(_random_ids(rng, names, q_len))
    return masks.Documents(
        [_random_ids(rng, names, q_len) for _ in range(batch)], [_random_ids(rng, names, kv_len) for _ in range(batch)]
    )


def _random_offset(rng: random.Random, batch: int, q_len: int, kv_len: int):
    choice = rng.random()
    if choice < 0.6:
        return None
    if choice < 0.75:
        return rng.randint(-q_len - 1, kv_len + 1)
    count = (batch,) if choice < 0.9 else (batch, q_len)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randint(-q_len - 1, kv_len + 2, count, generator=generator)


def _random_ends(rng: random.Random, sequences: int, length: int) -> list[int]:
    """Cumulative lengths; some sequences may be empty, and tokens may be left over."""
    return sorted(rng.randint(0, length) * (n > 0) for n in range(sequences + 1))


def _random_ids(rng: random.Random, names: list[int], length: int) -> list[int]:
    """Documents and padding in runs, in random order; some documents may be missing."""
    cuts = sorted(rng.randint(0, length) for _ in range(len(names)))
    order = rng.sample(names, len(names))
    ids = [-1] * length
    for name, first, last in zip(order, [0, *cuts], cuts, strict=False):
        ids[first:last] = [name] * (last - first)
    if length and rng.random() < 0.3:
        ids[0] = -1
    return ids


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values under other strides, by a name of :data:`LAYOUTS`."""
    if layout == "rows_first":  # [B, S, H, D], as flash_attn has it
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout in ("sliced", "sliced_16"):  # channels of a wider tensor, by 3 or by 16
        wider = x.shape[3] + (3 if layout == "sliced" else 16)
        larger = torch.full((*x.shape[:3], wider), float("nan"), dtype=x.dtype, device=x.device)
        larger[..., : x.shape[3]] = x
        return larger[..., : x.shape[3]]
    return x


def poison(problem: Problem, rng: random.Random) -> None:
    """Put NaN and inf wherever no row looks, and into rows that see nothing."""
    spec = problem.spec
    unseen = ~spec.intervals.seen_keys()[:, None, :, None]
    empty = spec.intervals.empty_rows()[:, None, :, None]
    for x, hidden in ((problem.k, unseen), (problem.v, unseen), (problem.q, empty)):
        x.masked_fill_(hidden, rng.choice((float("nan"), float("inf"), float("-inf"))))
