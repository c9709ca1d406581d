"""The textbook steps compute attention, and their counts are those that one would write down."""

import secrets

import pytest
import torch

from flashlib.measure import naive_steps
from flashlib.measure.racing.steps import FUSED
from flashlib.reference import assert_within_budget


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "n", "kv_len"), [(1, 2, 2, 40, 40), (2, 6, 3, 17, 33)])
def test_the_steps_together_are_attention(batch, heads, kv_heads, n, kv_len):
    seed = secrets.randbits(32)
    print(f"seed = {seed}")
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, 16, generator=generator)
    k = torch.randn(batch, kv_heads, kv_len, 16, generator=generator)
    v = torch.randn(batch, kv_heads, kv_len, 24, generator=generator)
    rows, out = naive_steps(q, k, v, budget_s=0.0)
    assert_within_budget(out, q, k, v, causal=True)

    scores, size = batch * heads * n * kv_len, 4
    by_name = {row["step"]: row for row in rows}
    names = ["S = Q Kᵀ", "scale S", "mask S", "P = softmax(S)", "O = P V", FUSED]
    assert list(by_name) == names
    assert [row["flops"] for row in rows[:-1]] == [32 * scores, scores, 0, 5 * scores, 48 * scores]
    k_bytes, v_bytes = batch * heads * kv_len * 16 * size, batch * heads * kv_len * 24 * size
    assert by_name["S = Q Kᵀ"]["bytes"] == q.nbytes + k_bytes + scores * size
    assert by_name["scale S"]["bytes"] == 2 * scores * size
    assert by_name["mask S"]["bytes"] == 2 * scores * size + n * kv_len  # and the mask, a byte each
    assert by_name["P = softmax(S)"]["bytes"] == 2 * scores * size
    assert by_name["O = P V"]["bytes"] == scores * size + v_bytes + out.nbytes
    visible = batch * heads * sum(kv_len - n + row + 1 for row in range(n))
    assert by_name[FUSED]["flops"] == visible * (32 + 5 + 48)
    assert all(row["ms"] > 0 for row in rows)
