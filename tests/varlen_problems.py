"""Random calls of flash_attn_varlen_func, packed and paged, of which each sequence is held against the oracle by itself.

What no query sees holds NaN: tokens behind the last sequence, keys in front of a window, pages that are nobody's. Where a page holds
nothing that is seen, the block table has the number of a page that does not exist.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

import torch
from problems import DTYPES, HEADS
from torch import Tensor

from flashlib.interop.flash_attn import flash_attn_varlen_func
from flashlib.masks import Window
from flashlib.reference import Comparison, check, check_gradients

PAGE_SIZES = (1, 2, 5, 16, 64)
HEAD_DIMS = (8, 24, 64)
LENGTHS_Q = (0, 1, 7, 33)
LENGTHS_K = (0, 1, 7, 50)
NAN = float("nan")


def random_options(rng: random.Random) -> tuple[dict, dict]:
    """Options of flash_attn, and the same said to the oracle."""
    options = {
        "causal": rng.random() < 0.5,
        "window_size": (rng.choice((-1, -1, 0, 3, 20)), rng.choice((-1, 0, 3, 20))),
    }
    if rng.random() < 0.3:
        options["softmax_scale"] = rng.choice((0.05, 1.0))
    options["softcap"] = rng.choice((0.0, 0.0, -1.0, 2.0, 30.0))
    left, right = (None if width < 0 else width for width in options["window_size"])
    exact = {"mask": Window(left, 0 if options["causal"] else right), "softcap": max(0.0, options["softcap"])}
    exact["scale"] = options.get("softmax_scale")
    return options, exact


def by_heads(x: Tensor) -> Tensor:
    """``[tokens, heads, ...]`` as the library has it, ``[1, heads, tokens, ...]``."""
    return x.transpose(0, 1)[None]


@dataclass
class Packed:
    """Packed sequences, and how to attend to them.

    Attributes:
        q, k, v: ``[total, heads, head_dim]``, tokens behind the last sequence included.
        lengths_q, lengths_k: of each sequence.
        options: of flash_attn_varlen_func. exact: the same said to the oracle, but for the slopes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths_q: list[int]
    lengths_k: list[int]
    options: dict
    exact: dict
    rng: random.Random
    page_sizes: tuple[int, ...]

    @classmethod
    def draw(
        cls, rng: random.Random, *, alibi: bool, alike: bool = False, dtypes=DTYPES, head_dims=HEAD_DIMS, lengths_q=LENGTHS_Q,
        lengths_k=LENGTHS_K, page_sizes=PAGE_SIZES, device: str = "cpu",
    ) -> Packed:  # fmt: skip
        """A problem with slopes of both shapes, or without.

        Args:
            alike: whether all sequences have the same number of queries, at least one, as in a decoding step.
        """
        generator = torch.Generator(device=device).manual_seed(rng.getrandbits(48))
        count = rng.randint(1 if alike else 0, 5)
        if alike:
            queries = [rng.choice((1, 1, 2, 5))] * count
        else:
            queries = [rng.choice(lengths_q) for _ in range(count)]
        keys = queries if rng.random() < 0.2 else [rng.choice(lengths_k) for _ in range(count)]
        (heads, kv_heads), dtype, head_dim = rng.choice(HEADS), rng.choice(dtypes), rng.choice(head_dims)
        shapes = ((sum(queries), heads), (sum(keys), kv_heads), (sum(keys), kv_heads))
        q, k, v = (
            torch.randn(total + behind, n, head_dim, generator=generator, device=device).to(dtype)
            for (total, n), behind in zip(shapes, (rng.choice((0, 3)), *[rng.choice((0, 3))] * 2), strict=True)
        )
        options, exact = random_options(rng)
        if alibi:
            shape = rng.choice(((heads,), (count, heads)))
            options["alibi_slopes"] = torch.rand(shape, generator=generator, device=device)
        problem = cls(q, k, v, queries, keys, options, exact, rng, page_sizes)
        problem.poison()
        return problem

    def poison(self) -> None:
        unseen = torch.ones(len(self.k), dtype=torch.bool, device=self.k.device)
        for n, (_, keys) in enumerate(self.sequences()):
            unseen[keys] = ~self.seen(n)
        self.k[unseen] = self.v[unseen] = NAN
        self.q[sum(self.lengths_q) :] = NAN

    def seen(self, n: int) -> Tensor:
        """Which keys of a sequence some of its queries see: bool ``[length]``."""
        lengths = self.lengths_q[n], self.lengths_k[n]
        return self.exact["mask"].intervals(1, *lengths, self.k.device).seen_keys()[0]

    def sequences(self) -> list[tuple[slice, slice]]:
        """Where the queries and the keys of each sequence are."""
        ends_q, ends_k = ([0, *accumulate(lengths)] for lengths in (self.lengths_q, self.lengths_k))
        return [(slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])) for n in range(len(self.lengths_q))]

    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k."""
        both = self.lengths_q, self.lengths_k
        dtype = self.rng.choice((torch.int32, torch.int64))
        ends = (torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=self.q.device) for lengths in both)
        return *ends, *(max(lengths, default=0) + self.rng.choice((0, 5)) for lengths in both)

    def paged(self) -> tuple[Tensor, Tensor, Tensor]:
        """k and v in pages ``[pages, page_size, heads, head_dim]``, and the block table."""
        page_size, rng = self.rng.choice(self.page_sizes), self.rng
        needed = [
            [bool(part.any()) for part in self.seen(n).split(page_size)] if length else []
            for n, length in enumerate(self.lengths_k)
        ]
        count, width = sum(map(sum, needed)) + rng.randint(1, 3), max(map(len, needed), default=0) + rng.randint(0, 2)
        free, no_page = rng.sample(range(count), count), rng.choice((-1, -7, count, 10**6))
        table = torch.full((len(needed), width), no_page, dtype=rng.choice((torch.int32, torch.int64)))
        pages = [
            torch.full((count, page_size, *x.shape[1:]), NAN, dtype=x.dtype, device=x.device) for x in (self.k, self.v)
        ]
        for n, (_, keys) in enumerate(self.sequences()):
            for at in (at for at, is_needed in enumerate(needed[n]) if is_needed):
                table[n, at] = page = free.pop()
                part = slice(keys.start + at * page_size, min(keys.start + (at + 1) * page_size, keys.stop))
                for x, memory in zip((self.k, self.v), pages, strict=True):
                    memory[page, : part.stop - part.start] = x[part]
        return *pages, table.to(self.q.device)

    def run(self, *, in_pages: bool = False, **changes) -> tuple[Tensor, Tensor]:
        """``(out, lse)``, from k and v as they are or from pages."""
        k, v = self.k, self.v
        if in_pages:
            k, v, changes["block_table"] = self.paged()
        out, lse, probabilities = flash_attn_varlen_func(
            self.q, k, v, *self.lengths(), **self.options, **changes, return_attn_probs=True
        )
        total = sum(self.lengths_q)
        assert out.shape == self.q.shape and out.dtype == self.q.dtype and out.is_contiguous()
        assert lse.shape == (self.q.shape[1], len(self.q)) and probabilities.shape == (0,)
        assert (out[total:] == 0).all() and (lse[:, total:] == float("-inf")).all()
        return out, lse

    def compare(self, out: Tensor, lse: Tensor) -> list[Comparison]:
        """Each sequence against the oracle."""
        return [
            check(by_heads(out[rows]), lse[None, :, rows], *self.inputs(n), **self.exact_options(n))
            for n, (rows, _) in enumerate(self.sequences())
        ]

    def run_with_gradients(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """``(out, lse)``, the gradients given for them, and ``(dq, dk, dv)``."""
        inputs = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        out, lse = self.run()
        given = torch.randn_like(out), torch.randn_like(lse)
        gradients = torch.autograd.grad((out, lse), inputs, given)
        for gradient, lengths in zip(gradients, (self.lengths_q, self.lengths_k, self.lengths_k), strict=True):
            assert (gradient[sum(lengths) :] == 0).all()
        return (out, lse), given, gradients

    def compare_gradients(
        self, given: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor, Tensor]
    ) -> list[Comparison]:
        """Those of each sequence against the oracle."""
        found = []
        for n, (rows, keys) in enumerate(self.sequences()):
            of_sequence = [by_heads(g[part]) for g, part in zip(gradients, (rows, keys, keys), strict=True)]
            grads = by_heads(given[0][rows]), given[1][None, :, rows]
            found.append(check_gradients(of_sequence, *self.inputs(n), *grads, **self.exact_options(n)))
        return found

    def inputs(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys = self.sequences()[n]
        return by_heads(self.q[rows]), by_heads(self.k[keys]), by_heads(self.v[keys])

    def exact_options(self, n: int) -> dict:
        slopes = self.options.get("alibi_slopes")
        return self.exact | {"alibi_slopes": slopes[n] if slopes is not None and slopes.dim() == 2 else slopes}

    def __repr__(self) -> str:
        return f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, {self.q.dtype}, {self.lengths_q}, {self.lengths_k}, {self.options}"


def expect(problem: Packed, comparisons: list[Comparison]) -> None:
    wrong = [comparison.message for comparison in comparisons if not comparison.passed]
    assert not wrong, f"{problem}: {wrong}"
