"""What a sequence gives must not depend on where in a pack it lies, with ``packing="aligned"``: random packs, forward and backward, bit by bit.

python tests/everyday/packs.py --packs 20                                   # the tiled algorithm, on the CPU
TRITON_INTERPRET=1 python tests/everyday/packs.py --backend triton          # our kernels, interpreted
python tests/everyday/packs.py --backend triton --device cuda --packs 200 --longest 3000
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import typer

from flashlib import FlashAttentionConfig, attention, masks
from flashlib.reference import assert_gradients_within_budget, assert_within_budget

ALIGNED = FlashAttentionConfig(packing="aligned")


def packed_mask(lengths_q: list[int], lengths_k: list[int], width: tuple[int | None, int | None], device: str):
    cu_seqlens = (torch.tensor([0, *accumulate(lengths)], device=device) for lengths in (lengths_q, lengths_k))
    sequences = masks.Varlen(*cu_seqlens)
    return sequences & masks.Window(*width, sequences.offset(sum(lengths_q), device))


@dataclass(frozen=True)
class PackSet:
    """What the kernels of some packs are compiled for."""

    dtype: torch.dtype
    head_dim: int
    softcap: float
    alibi: bool

    @classmethod
    def draw(cls, seed: int) -> PackSet:
        rng = random.Random(seed)
        dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
        return cls(dtype, rng.choice((16, 40, 64, 64, 128, 128)), rng.choice((0.0, 0.0, 5.0)), rng.random() < 0.3)

    def told(self) -> dict[str, str]:
        return {name: str(value).removeprefix("torch.") for name, value in vars(self).items()}


def check_pack(features: PackSet, rng: random.Random, backend: str, device: str, longest: int) -> int:
    """One random pack against its sequences alone, and against the oracle where it is small. Returns how many sequences were compared."""
    generator = torch.Generator(device).manual_seed(rng.getrandbits(48))
    dtype, head_dim = features.dtype, features.head_dim
    q_heads, kv_heads = rng.choice(((2, 2), (4, 2), (3, 1)))
    lengths_q = [rng.choice((0, 1, rng.randint(1, longest))) for _ in range(rng.randint(2, 6))]
    lengths_k = [n if rng.random() < 0.6 else rng.randint(0, longest) for n in lengths_q]
    width = rng.choice(
        ((None, None), (None, 0), (rng.randint(0, longest), 0), (rng.randint(0, 50), rng.randint(0, 50)))
    )

    def tokens(
        heads: int, length: int
    ) -> torch.Tensor:  # [1, heads, length, head_dim], laid out as a user of flash_attn has it
        x = torch.randn(1, length, heads, head_dim, generator=generator, device=device).to(dtype).transpose(1, 2)
        return (x if rng.random() < 0.5 else x.contiguous()).requires_grad_()

    q, (k, v) = tokens(q_heads, sum(lengths_q)), (tokens(kv_heads, sum(lengths_k)) for _ in range(2))
    options = {"softcap": features.softcap}
    if features.alibi:
        options["alibi_slopes"] = torch.rand(q_heads, generator=generator, device=device)
    grad = torch.randn(q.shape, generator=generator, device=device).to(dtype)

    def run(rows: slice, keys: slice, lengths: tuple[list[int], list[int]]) -> list[torch.Tensor]:
        mask = packed_mask(*lengths, width, device)
        inputs = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        out, lse = attention(*inputs, mask=mask, **options, return_lse=True, backend=backend, config=ALIGNED)
        return [out, lse, *torch.autograd.grad(out, inputs, grad[:, :, rows])]

    together = run(slice(None), slice(None), (lengths_q, lengths_k))
    if sum(lengths_q) * sum(lengths_k) < 200_000:
        problem = {"mask": packed_mask(lengths_q, lengths_k, width, device), **options}
        assert_within_budget(together[0], q, k, v, lse=together[1], **problem)
        assert_gradients_within_budget(together[2:], q, k, v, grad, **problem)
    compared = 0
    for n, (rows, keys) in enumerate(zip(ranges(lengths_q), ranges(lengths_k), strict=True)):
        alone = run(rows, keys, ([lengths_q[n]], [lengths_k[n]]))
        for name, one, part in zip(
            ("out", "lse", "dq", "dk", "dv"), alone, (rows, rows, rows, keys, keys), strict=True
        ):
            found = together[("out", "lse", "dq", "dk", "dv").index(name)][:, :, part]
            if not torch.equal(one, found):
                difference = (one.double() - found.double()).abs().max().item()
                raise AssertionError(
                    f"{name} of sequence {n} of {lengths_q} x {lengths_k}, {width}, {dtype}, {options}: {difference:.3g}"
                )
        compared += 1
    return compared


def ranges(lengths: list[int]) -> list[slice]:
    ends = [0, *accumulate(lengths)]
    return [slice(begin, end) for begin, end in pairwise(ends)]


def main(backend: str = "tiled", device: str = "cpu", packs: int = 10, longest: int = 300, seed: int = -1) -> None:
    seed = seed if seed >= 0 else random.SystemRandom().getrandbits(32)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    drawn = (PackSet.draw(rng.getrandbits(32)) for _ in range(packs))
    compared = sum(check_pack(features, rng, backend, device, longest) for features in drawn)
    print(f"{packs} packs, {compared} sequences, {backend} on {device}: the same bits alone and together")


if __name__ == "__main__":
    typer.run(main)
