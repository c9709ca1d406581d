"""Arguments as programs give them to flash_attn: flags that are not bools, windows of NumPy ints, dropout, tensors under autocast."""

import numpy as np
import pytest
import torch
from varlen_problems import NAN

from flashlib import FlashAttentionConfig, attention, use_config
from flashlib.dropout import draw_seed, keep_factors
from flashlib.inference.decode import decode_attention
from flashlib.interop.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flashlib.masks import Causal, Varlen, Window
from flashlib.reference import check, oracle

Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
ENDS = torch.tensor([0, 3, 10], dtype=torch.int32)


@pytest.mark.parametrize("truth", [True, 1, np.bool_(True), np.int64(1), torch.tensor(True), torch.tensor([1])])
@pytest.mark.parametrize("lie", [False, 0, np.bool_(False), None, torch.tensor(0)])
def test_flags(truth, lie):
    yes, no = flash_attn_func(Q, K, K, causal=True), flash_attn_func(Q, K, K)
    assert torch.equal(flash_attn_func(Q, K, K, causal=truth, deterministic=lie), yes)
    torch.testing.assert_close(flash_attn_func(Q, K, K, causal=lie, return_attn_probs=truth)[0], no)
    assert torch.equal(
        flash_attn_with_kvcache(Q, K, K, causal=truth, return_softmax_lse=lie),
        flash_attn_with_kvcache(Q, K, K, causal=True),
    )


@pytest.mark.parametrize("kind", [int, np.int32, np.int64, torch.tensor])
def test_window_sizes(kind):
    expected = flash_attn_func(Q, K, K, window_size=(2, 1))
    for window in ((kind(2), kind(1)), [kind(2), kind(1)], np.array([2, 1])):
        assert torch.equal(flash_attn_func(Q, K, K, window_size=window), expected)
    tokens = K.flatten(0, 1)[:10]
    sizes = ENDS, ENDS, kind(7), kind(7)
    assert torch.equal(
        flash_attn_varlen_func(tokens, tokens, tokens, *sizes, window_size=(kind(2), kind(-1))),
        flash_attn_varlen_func(tokens, tokens, tokens, ENDS, ENDS, 7, 7, window_size=(2, -1)),
    )


P = 0.3


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_that_of_attention_and_is_told(causal, rng):
    """The seed comes from the generator, the result is within the budget of the oracle that is given it, and S_dmask says what was dropped."""
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 11, 2, 8), torch.randn(2, 11, 2, 8)
    torch.manual_seed(seed := rng.getrandbits(40))
    out, lse, told = flash_attn_func(q, k, v, P, causal=causal, return_attn_probs=True)
    torch.manual_seed(seed)
    bits = draw_seed(q.device)
    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    options = {"mask": Causal() if causal else None, "dropout_p": P, "dropout_seed": bits}
    comparison = check(out.transpose(1, 2), lse, *inputs, **options)
    assert comparison.passed, comparison.message
    keep = keep_factors(bits, P, 2, 4, slice(0, 9), slice(0, 11), torch.float64)
    softmax, _ = oracle(*inputs[:2], torch.eye(11).expand(2, 2, -1, -1), mask=options["mask"])
    torch.testing.assert_close(told.double(), softmax * torch.where(keep > 0, 1.0, -1.0), rtol=1e-4, atol=1e-6)
    assert 0.15 < (told < 0).sum() / (softmax > 0).sum() < 0.45  # 0.3 of 400 or more
    torch.manual_seed(seed)
    assert torch.equal(flash_attn_func(q, k, v, P, causal=causal), out)
    assert not torch.equal(flash_attn_func(q, k, v, P, causal=causal), out)


def test_dropout_of_every_function(rng):
    q, kv = torch.randn(10, 2, 8), torch.randn(10, 2, 2, 8)
    qkv = torch.cat([q[:, None], kv], dim=1)
    sizes = (ENDS, ENDS, 7, 7)

    def drawn(function, *arguments):
        torch.manual_seed(3)
        return function(*arguments, P, return_attn_probs=True)

    torch.manual_seed(3)
    options = {"mask": Varlen(ENDS), "dropout_p": P, "dropout_seed": draw_seed(q.device)}
    packed = attention(*(x.transpose(0, 1)[None] for x in (q, *kv.unbind(1))), **options)[0].transpose(0, 1)
    results = [
        drawn(flash_attn_varlen_func, q, *kv.unbind(1), *sizes),
        drawn(flash_attn_varlen_kvpacked_func, q, kv, *sizes),
        drawn(flash_attn_varlen_qkvpacked_func, qkv, ENDS, 7),
    ]
    for out, lse, told in results:
        assert torch.equal(out, packed) and lse.shape == (2, 10) and told.shape == (2, 2, 7, 7)
        assert not told[0, :, 3:].any() and not told[0, :, :, 3:].any() and (told < 0).any()
        torch.testing.assert_close(
            told.abs().sum(-1), torch.tensor([[1.0] * 3 + [0.0] * 4, [1.0] * 7])[:, None].expand(2, 2, 7)
        )
    dense = drawn(flash_attn_func, q[None], *kv[None].unbind(2))[0]
    assert torch.equal(drawn(flash_attn_kvpacked_func, q[None], kv[None])[0], dense)
    assert torch.equal(drawn(flash_attn_qkvpacked_func, qkv[None])[0], dense)
    pages = torch.full((5, 4, 2, 2, 8), NAN)
    table = torch.tensor([[4, -1], [0, 2]], dtype=torch.int32)
    for page, tokens in ((4, slice(0, 3)), (0, slice(3, 7)), (2, slice(7, 10))):
        pages[page, : tokens.stop - tokens.start] = kv[tokens]
    torch.manual_seed(3)
    paged = flash_attn_varlen_func(q, *pages.unbind(2), *sizes, P, block_table=table)
    torch.testing.assert_close(paged, packed)


def _calls():
    q, k, v = (torch.randn(10, heads, 16) for heads in (4, 2, 2))
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    mask = Varlen(ENDS) & Causal(Varlen(ENDS).offset(10))
    by_heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    sizes = (ENDS, ENDS, 7, 7)
    yield (
        "func",
        lambda q, k, v: flash_attn_func(q[None], k[None], v[None], causal=True)[0],
        (q, k, v),
        by_heads,
        Causal(),
    )
    yield "varlen", lambda q, k, v: flash_attn_varlen_func(q, k, v, *sizes, causal=True), (q, k, v), by_heads, mask
    yield (
        "kvpacked",
        lambda q, k, v: flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), *sizes, causal=True),
        (q, k, v),
        by_heads,
        mask,
    )
    yield (
        "cache",
        lambda q, k, v: flash_attn_with_kvcache(q[None, -2:], k[None], v[None], causal=True)[0],
        (q, k, v),
        [by_heads[0][:, :, -2:], *by_heads[1:]],
        Causal(),
    )
    pages = torch.zeros(2, 2, 16, 2, 16)
    pages[:, 0, :10] = torch.stack([k, v])
    yield (
        "pages",
        lambda q, k, v: flash_attn_varlen_func(
            q[-1:], *pages, torch.tensor([0, 1]), torch.tensor([0, 10]), 1, 10, block_table=table[:1]
        ),
        (q, k, v),
        [by_heads[0][:, :, -1:], *by_heads[1:]],
        Causal(),
    )
    yield "decode", lambda q, k, v: decode_attention(*(x.transpose(0, 1)[None] for x in (q[-2:], k, v)), backend="torch")[0].transpose(0, 1), (q, k, v), [by_heads[0][:, :, -2:], *by_heads[1:]], Causal()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", range(6))
def test_autocast_rounds_the_inputs_and_nothing_else(at, dtype):
    """As PyTorch's SDPA: what comes out is that dtype, within the budget of inputs in that dtype; fp32 products inside stay fp32."""
    name, call, tensors, inputs, mask = list(_calls())[at]
    with torch.autocast("cpu", dtype):
        out = call(*tensors)
        mixed = call(tensors[0].to(dtype), *tensors[1:]) if name not in ("decode", "pages") else out
    assert out.dtype == dtype
    torch.testing.assert_close(mixed, out)
    rounded = [x.to(dtype) for x in inputs]
    comparison = check(out.transpose(0, 1)[None], None, *rounded, mask=mask)
    assert comparison.passed, (name, comparison.message)
    with torch.autocast("cpu", dtype):
        exact = call(*(x.double() for x in tensors)) if name != "pages" else None
    assert exact is None or exact.dtype == torch.float64


def test_fp32_lse_under_autocast():
    """The LSE is not rounded, and what is computed on the way to it neither."""
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16), use_config(FlashAttentionConfig(backend="tiled")):
        _, lse, _ = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, k)), window_size=(5, 0), return_attn_probs=True)
        _, decoded = decode_attention(q, k, k, window=(5, 0), return_lse=True, backend="torch")
    _, expected = oracle(*(x.bfloat16().double() for x in (q, k, k)), mask=Window(5, 0))
    for found in (lse, decoded):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
