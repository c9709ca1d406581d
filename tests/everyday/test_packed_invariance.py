"""A packed sequence gives the same bits wherever it lies, where ``packing="aligned"`` asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from everyday.packs import PackSet, check_pack, packed_mask

from flashlib import BackendUnavailableError, FlashAttentionConfig, attention, explain, masks, use_config
from flashlib.interop.flash_attn import flash_attn_varlen_func
from flashlib.spec import AttentionSpec

ALIGNED = FlashAttentionConfig(packing="aligned")


def test_random_packs_on_the_tiled_algorithm(rng):
    sets = [PackSet.draw(rng.getrandbits(32)) for _ in range(8)]
    assert sum(check_pack(features, rng, "tiled", "cpu", 200) for features in sets) >= 16


def test_random_packs_on_the_kernels():
    program = Path(__file__).with_name("packs.py")
    command = [sys.executable, "-W", "ignore", program, "--backend", "triton", "--packs", "2", "--longest", "150"]
    answer = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "the same bits alone and together" in answer.stdout


def test_the_functions_of_flash_attn_take_it(rng):
    lengths = [64, 100, 37]
    tokens = [torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2)]
    cu_seqlens = torch.tensor([0, 64, 164, 201], dtype=torch.int32)
    with use_config(ALIGNED):
        together = flash_attn_varlen_func(*tokens, cu_seqlens, cu_seqlens, 100, 100, causal=True)
        one = [x[64:164] for x in tokens]
        alone = flash_attn_varlen_func(*one, *[torch.tensor([0, 100], dtype=torch.int32)] * 2, 100, 100, causal=True)
    assert torch.equal(together[64:164], alone)


def test_backends_that_promise_no_bits_say_so():
    q = torch.randn(1, 1, 6, 8)
    mask = packed_mask([2, 4], [2, 4], (None, 0), "cpu")
    with pytest.raises(BackendUnavailableError, match="promises no bits"):
        attention(q, q, q, mask=mask, backend="reference", config=ALIGNED)
    told = explain(AttentionSpec.from_tensors(q, q, q, mask=mask), ALIGNED)
    assert told.chosen == "tiled"
    unpacked = explain(AttentionSpec.from_tensors(q, q, q, mask=masks.Causal()), ALIGNED)
    assert unpacked.chosen == "torch_sdpa_flash"


def test_an_unknown_packing_is_refused():
    with pytest.raises(ValueError, match="packing must be one of dense, aligned; got 'tight'"):
        FlashAttentionConfig(packing="tight")
