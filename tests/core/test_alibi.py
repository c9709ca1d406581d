"""From where ALiBi measures its distances: bottom-right, or where the mask says that rows sit."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from problems import random_mask

from flashlib import AttentionSpec, attention, masks
from flashlib.backends import BACKENDS
from flashlib.config import FlashAttentionConfig
from flashlib.masks import Causal, Documents, KeyLengths, Prefix, Unmasked, Varlen, Window
from flashlib.reference import check


def spec_of(mask, slopes, *, batch=2, heads=3, q_len=5, kv_len=9):
    q, k = torch.zeros(batch, heads, q_len, 8), torch.zeros(batch, heads, kv_len, 8)
    return AttentionSpec.from_tensors(q.double(), k.double(), k.double(), mask=mask, alibi_slopes=slopes)


BY_SEQUENCE, BY_ROW = torch.tensor([3, -1]), torch.randint(-4, 9, (2, 5))
SIT = {  # what row i of batch entry b sits at, of 5 rows and 9 keys
    "nothing said": (Unmasked(), lambda b, i: i + 4),
    "a band": (Window(2, 1) & Causal(), lambda b, i: i + 4),
    "lengths and documents": (KeyLengths([4, 9]) & Documents([0] * 5, [0] * 9), lambda b, i: i + 4),
    "one offset": (Causal(offset=2), lambda b, i: i + 2),
    "an offset for each sequence": (KeyLengths([8, 4]) & Window(3, None, BY_SEQUENCE), lambda b, i: i + [3, -1][b]),
    "an offset for each row": (Window(3, 0, BY_ROW), lambda b, i: i + int(BY_ROW[b, i])),
    "a prefix": (Prefix([3, 5], offset=1), lambda b, i: i + 1),
    "packed": (Varlen([0, 2, 2, 5], [0, 3, 7, 9]), lambda b, i: i + 1 if i < 2 else i + 4),
    "packed, rows left over": (Varlen([0, 2, 3], [0, 6, 8]), lambda b, i: i + 4 if i < 2 else i + 5),
    "the first that says it": (Causal() & Varlen([0, 5], [0, 6]) & Window(4, 4, offset=3), lambda b, i: i + 1),
}


@pytest.mark.parametrize("by", ["head", "batch and head", "row", "batch and row"])
@pytest.mark.parametrize("name", SIT)
def test_every_distance_is_from_where_the_row_sits(name, by):
    mask, sits_at = SIT[name]
    slopes = torch.rand({"head": (3,), "batch and head": (2, 3), "row": (1, 3, 5), "batch and row": (2, 3, 5)}[by])
    spec = spec_of(mask, slopes)
    bias = spec.bias(slice(0, 5), slice(0, 9)).expand(2, -1, -1, -1)
    full = {"head": slopes[None, :, None]} | {"batch and head": slopes[..., None]}
    full = full.get(by, slopes).expand(2, 3, 5).double()
    for b, h, i, j in ((b, h, i, j) for b in range(2) for h in range(3) for i in range(5) for j in range(9)):
        assert bias[b, h, i, j] == -full[b, h, i] * abs(sits_at(b, i) - j), (b, h, i, j)


def test_a_tile_of_the_bias_is_part_of_the_whole(rng):
    for _ in range(20):
        mask = random_mask(rng, 2, 5, 9)
        spec = spec_of(mask, torch.rand(rng.choice(((3,), (2, 3), (1, 3, 5)))))
        whole = spec.bias(slice(0, 5), slice(0, 9))
        assert torch.equal(spec.bias(slice(1, 4), slice(3, 8)), whole[:, :, 1:4, 3:8])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_packed_sequences_of_unequal_lengths_are_biased_as_each_by_itself(backend, rng):
    """Against the oracle on each sequence, which knows no packing."""
    lengths_q, lengths_k = ([rng.choice((0, 1, 6, 20)) for _ in range(3)] for _ in "qk")
    ends_q, ends_k = ([0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    q, k, v = (torch.randn(1, 4, n, 8) for n in (ends_q[-1], ends_k[-1], ends_k[-1]))
    slopes, packed = torch.rand(4), Varlen(ends_q, ends_k)
    mask = packed & masks.Causal(packed.offset(ends_q[-1]))
    out, lse = attention(q, k, v, mask=mask, alibi_slopes=slopes, return_lse=True, backend=backend)
    for rows, keys in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        rows, keys = slice(*rows), slice(*keys)
        inputs = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        comparison = check(out[:, :, rows], lse[:, :, rows], *inputs, causal=True, alibi_slopes=slopes)
        assert comparison.passed, f"{ends_q}, {ends_k}: {comparison.message}"


def test_backends_without_it_say_so():
    spec, config = spec_of(None, torch.rand(2, 3, 5)), FlashAttentionConfig()
    message = "takes one ALiBi slope per head; got one for each row"
    assert BACKENDS["flash_attn_2"].unsupported(spec, config) == message
    for mask, wants_lse in ((Causal(), True), (Causal(), False), (Window(3, 0), True)):
        causal = replace(spec_of(mask, torch.rand(3)), return_lse=wants_lse)
        says_so = "LSE under a causal mask" in BACKENDS["flash_attn_2"].unsupported(causal, config)
        assert says_so == (wants_lse and mask.band() == (None, 0))
    for name in ("flash_attn_3", "torch_sdpa_math", "torch_sdpa_flash", "torch_sdpa_efficient", "torch_sdpa_cudnn"):
        assert "has no ALiBi" in BACKENDS[name].unsupported(spec, config)
    for name in ("reference", "tiled"):
        assert BACKENDS[name].unsupported(spec, config) is None
