"""Windows, offsets and lengths as large as integers come, on a backend. A program for the interpreter, too."""

import random
import sys

import torch

from flashlib import attention, masks
from flashlib.inference import decode_attention
from flashlib.interop.flash_attn import flash_attn_func, flash_attn_varlen_func
from flashlib.reference import check, check_gradients, naive_attention

LARGE = (
    2**30 - 1,
    2**30,
    2**31 - 2,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    sys.maxsize - 1,
    sys.maxsize,
    2**63,
    2**64,
    10**30,
)
WIDTHS = (None, 0, 1, 3, *LARGE)
FITTING = tuple(width for width in LARGE if width <= sys.maxsize)


def random_offset(rng: random.Random, batch: int, q_len: int) -> int | torch.Tensor | None:
    """None, an int, or a tensor, of any size that its type has."""
    kind = rng.choice(("none", "int", "by sequence", "by row"))
    if kind == "none":
        return None
    if kind == "int":
        return rng.choice((-1, 1)) * rng.choice((0, 1, 2, 5, *LARGE))
    count = batch if kind == "by sequence" else batch * q_len
    values = [rng.choice((-1, 1)) * rng.choice((0, 1, 2, *FITTING)) for _ in range(count)]
    return torch.tensor(values).view(*((batch,) if kind == "by sequence" else (batch, q_len)))


def random_mask(rng: random.Random, batch: int, q_len: int) -> masks.Mask:
    offset = random_offset(rng, batch, q_len)
    kind = rng.choice(("window", "window", "causal", "prefix"))
    if kind == "window":
        return masks.Window(rng.choice(WIDTHS), rng.choice(WIDTHS), offset)
    if kind == "causal":
        return masks.Causal(offset)
    return masks.Prefix([rng.choice((0, 2, *FITTING)) for _ in range(batch)], offset)


def visible(mask: masks.Mask, batch: int, q_len: int, kv_len: int) -> torch.Tensor:
    """The mask by its definition, in Python's integers: bool ``[B, Sq, Sk]``."""

    def position(b: int, i: int) -> int:
        if mask.offset is None:
            return i + kv_len - q_len
        if isinstance(mask.offset, int):
            return i + mask.offset
        return i + int(mask.offset[b] if mask.offset.dim() == 1 else mask.offset[b, i])

    def sees(b: int, i: int, j: int) -> bool:
        if isinstance(mask, masks.Prefix):
            return j < int(mask.lengths[b]) or j <= position(b, i)
        after_left = mask.left is None or j >= position(b, i) - mask.left
        return after_left and (mask.right is None or j <= position(b, i) + mask.right)

    return torch.tensor([[[sees(b, i, j) for j in range(kv_len)] for i in range(q_len)] for b in range(batch)])


def masks_hold(backend: str, rng: random.Random, problems: int) -> None:
    """Forward and backward under random masks, within the budget, with NaN where the mask says that nobody looks."""
    for _ in range(problems):
        batch, q_len, kv_len = 2, rng.randint(1, 9), rng.randint(1, 9)
        mask = random_mask(rng, batch, q_len)
        shapes = ((batch, 2, q_len, 16), (batch, 1, kv_len, 16), (batch, 1, kv_len, 16))
        q, k, v = (torch.randn(shape) for shape in shapes)
        unseen = ~visible(mask, batch, q_len, kv_len).any(1)[:, None, :, None]
        k, v = (x.masked_fill(unseen, torch.nan).requires_grad_() for x in (k, v))
        q.requires_grad_()
        said = f"{backend}: {mask}, {q_len} queries, {kv_len} keys"
        options = {"mask": mask, "backend": backend}
        with_lse = not backend.startswith("torch_sdpa")
        out, lse = attention(q, k, v, **options, return_lse=True) if with_lse else (attention(q, k, v, **options), None)
        comparison = check(out, lse, q, k, v, mask=mask)
        assert comparison.passed, f"{said}: {comparison.message}"
        grad = torch.randn_like(out)
        comparison = check_gradients(torch.autograd.grad(out, (q, k, v), grad), q, k, v, grad, mask=mask)
        assert comparison.passed, f"{said}: {comparison.message}"


def decoding_holds(backend: str, rng: random.Random, problems: int) -> None:
    for _ in range(problems):
        batch, q_len, capacity = 2, rng.randint(1, 3), rng.randint(4, 40)
        q, k, v = torch.randn(batch, 2, q_len, 16), *(torch.randn(batch, 1, capacity, 16) for _ in range(2))
        window, causal = (rng.choice(WIDTHS), rng.choice(WIDTHS)), rng.random() < 0.5
        split_size = rng.choice((None, 16, *LARGE))
        options = {"window": window, "causal": causal, "split_size": split_size, "backend": backend}
        out, lse = decode_attention(q, k, v, **options, return_lse=True)
        comparison = check(out, lse, q, k, v, mask=masks.Window(window[0], 0 if causal else window[1]))
        assert comparison.passed, f"{options}: {comparison.message}"


def flash_attn_holds(rng: random.Random, problems: int) -> None:
    for _ in range(problems):
        q, k, v = torch.randn(1, rng.randint(1, 9), 2, 16), *(torch.randn(1, 7, 2, 16) for _ in range(2))
        window = tuple(rng.choice((-1, 0, 2, *LARGE)) for _ in range(2))
        limits = tuple(None if width < 0 else width for width in window)
        ends = [torch.tensor([0, x.shape[1]], dtype=torch.int32) for x in (q, k)]
        lengths = q.shape[1], k.shape[1]
        dense = flash_attn_func(q, k, v, window_size=window)
        packed = flash_attn_varlen_func(q[0], k[0], v[0], *ends, *lengths, window_size=window)
        for out in (dense, packed[None]):
            comparison = check(
                out.transpose(1, 2), None, *(x.transpose(1, 2) for x in (q, k, v)), mask=masks.Window(*limits)
            )
            assert comparison.passed, f"window_size={window}: {comparison.message}"


def lengths_beyond_the_capacity_give_nan(rng: random.Random) -> None:
    """On a GPU nobody looks at the lengths before the kernel does: however large, they are not taken for another number."""
    from flashlib.launch.decode import DecodeOptions, launch_decode

    q, (k, v) = torch.randn(3, 1, 1, 16), (torch.randn(3, 1, 20, 16) for _ in range(2))
    lengths = torch.tensor([20, rng.choice((2**31, 2**32 + 1)), sys.maxsize])
    out, lse = launch_decode(q, k, v, DecodeOptions(lengths, None, None, 0, 0.25, 0.0, num_splits=1))
    torch.testing.assert_close(out[:1], naive_attention(q[:1], k[:1], v[:1], scale=0.25))
    assert out[1:].isnan().all() and lse[1:].isnan().all()


def main(rng: random.Random) -> None:
    masks_hold("triton", rng, 12)
    decoding_holds("triton", rng, 8)
    flash_attn_holds(rng, 4)
    lengths_beyond_the_capacity_give_nan(rng)
