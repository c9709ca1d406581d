"""Every function of interop.flash_attn under torch.compile(fullgraph=True): the same numbers and gradients, and no new graph for each new length.

Left to itself the compiler makes one graph for the first length it meets and a second one, for any length, when another comes.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from flashlib.inference.decode import decode_attention
from flashlib.interop import flash_attn as fa
from flashlib.interop.flash_attn import bert_padding

HEADS, D = 2, 8
LENGTHS = (7, 8, 9, 11, 12, 13, 14, 15, 16)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def ends(length):
    return torch.tensor([0, 2, length - 1, length], dtype=torch.int32)


def table():
    return torch.arange(15, dtype=torch.int32).view(3, 5)


def in_pages(length, longest_q):
    k = torch.randn(15, 4, HEADS, D)
    ends_q, ends_k = torch.arange(4, dtype=torch.int32), torch.tensor([0, 2, length, length + 3])
    return (lambda q, k, a, b, m, t: fa.flash_attn_varlen_func(q, k, k, a, b, longest_q, m, causal=True, block_table=t)), (
        torch.randn(3, HEADS, D), k, ends_q, ends_k, length, table(),
    )  # fmt: skip


def cache(length):
    q, new = torch.randn(3, 1, HEADS, D), torch.randn(3, 1, HEADS, D)
    k, v = torch.randn(2, 3, length + 9, HEADS, D).unbind()
    return q, k.clone(), v.clone(), new, torch.tensor([1, 2, length], dtype=torch.int32)


def unpadded(x, mask):
    """To packed sequences, attention, and back."""
    packed, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(x, mask)
    out = fa.flash_attn_varlen_func(packed, packed, packed, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    return bert_padding.pad_input(out, indices, x.shape[0], x.shape[1])


def concatenated(x, lengths):
    packed, indices, _, _ = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    again, _ = bert_padding.index_first_axis_residual(packed, torch.arange(3, dtype=torch.int32))
    return bert_padding.index_put_first_axis(packed, indices, x.shape[0] * x.shape[1]).sum(1) + again.sum()


def padding_mask(length):
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, : length // 2] = 0
    return mask


def rows_of_lengths(length):
    lengths = torch.zeros(2, length, dtype=torch.int64)
    lengths[:, 0], lengths[0, 1] = 2, 3
    return lengths


CASES = {
    "flash_attn_func": lambda n: (lambda q: fa.flash_attn_func(q, q, q, causal=True), (leaf(2, n, HEADS, D),)),
    "flash_attn_kvpacked_func": lambda n: (
        lambda q, kv: fa.flash_attn_kvpacked_func(q, kv, window_size=(3, 0), deterministic=True),
        (leaf(2, n, HEADS, D), leaf(2, n, 2, HEADS, D)),
    ),
    "flash_attn_qkvpacked_func, dropout": lambda n: (lambda qkv: fa.flash_attn_qkvpacked_func(qkv, 0.5), (leaf(2, n, 3, HEADS, D),)),
    "flash_attn_varlen_func": lambda n: (
        lambda q, at, longest: fa.flash_attn_varlen_func(q, q, q, at, at, longest, longest, causal=True),
        (leaf(n, HEADS, D), ends(n), n),
    ),
    "flash_attn_varlen_kvpacked_func, ALiBi": lambda n: (
        lambda q, kv, at, m, slopes: fa.flash_attn_varlen_kvpacked_func(q, kv, at, at, m, m, window_size=(2, -1), alibi_slopes=slopes),
        (leaf(n, HEADS, D), leaf(n, 2, HEADS, D), ends(n), n, torch.ones(3, HEADS)),
    ),
    "flash_attn_varlen_qkvpacked_func, deterministic": lambda n: (
        lambda qkv, at, longest: fa.flash_attn_varlen_qkvpacked_func(qkv, at, longest, deterministic=True),
        (leaf(n, 3, HEADS, D), ends(n), n),
    ),
    "pages read in place": lambda n: in_pages(n, 1),
    "pages copied": lambda n: in_pages(n, 20),
    "flash_attn_with_kvcache": lambda n: (
        lambda q, k, v, new, lengths: fa.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths, causal=True),
        cache(n),
    ),
    "flash_attn_with_kvcache, rotary, left padding": lambda n: (
        lambda q, k, v, new, lengths, cos: fa.flash_attn_with_kvcache(
            q, k, v, new, new, cos, cos, lengths, cache_leftpad=lengths // 2, causal=True
        ),
        (*cache(n), torch.randn(n + 9, 4)),
    ),
    "flash_attn_with_kvcache, int": lambda n: (
        lambda q, k, v, new, length: fa.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=length, causal=True),
        (*cache(n)[:4], n),
    ),
    "flash_attn_combine": lambda n: (lambda out, lse: fa.flash_attn_combine(out, lse)[0], (torch.randn(3, 2, n, HEADS, D), torch.randn(3, 2, n, HEADS))),
    "decode_attention": lambda n: (
        lambda q, k, lengths: decode_attention(q, k, k, lengths=lengths, backend="torch", num_splits=2),
        (leaf(2, HEADS, 2, D), leaf(2, HEADS, n, D), torch.tensor([1, n])),
    ),
    "decode_attention, pages": lambda n: (
        lambda q, k, lengths, at: decode_attention(q, k, k, lengths=lengths, block_table=at, window=(4, None), backend="torch"),
        (leaf(3, HEADS, 2, D), leaf(15, HEADS, n, D), torch.tensor([1, n, 2 * n]), table()),
    ),
    "unpad_input, pad_input": lambda n: (unpadded, (leaf(2, n, HEADS, D), padding_mask(n))),
    "unpad_input_for_concatenated_sequences": lambda n: (concatenated, (leaf(2, n, HEADS), rows_of_lengths(n))),
}  # fmt: skip


def compare(compiled, function, arguments):
    """Results, and gradients where there are any; a cache is written to, so that each call gets its own."""
    own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.manual_seed(5)
    got = compiled(*arguments)
    torch.manual_seed(5)
    expected = function(*own)
    torch.testing.assert_close(got, expected)
    for x, y in zip(arguments, own, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y)
    leaves = [[x for x in given if isinstance(x, torch.Tensor) and x.requires_grad] for given in (arguments, own)]
    if leaves[0]:
        grad = torch.randn_like(got)
        for x, y in zip(
            *(torch.autograd.grad(*both, grad) for both in zip((got, expected), leaves, strict=True)), strict=True
        ):
            torch.testing.assert_close(x, y)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_nine_lengths_take_two_graphs(name):
    compiled = None
    for length in LENGTHS:
        function, arguments = CASES[name](length)
        compiled = compiled or torch.compile(function, fullgraph=True, backend="aot_eager")
        compare(compiled, function, arguments)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", CASES)
def test_dynamic_from_the_start(name):
    function, arguments = CASES[name](9)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    compare(compiled, function, arguments)
    assert counters["stats"]["unique_graphs"] == 1


def test_every_function_is_here():
    named = " ".join(CASES)
    for function in fa.__all__:
        assert function in named or function in ("install", "installed", "uninstall"), function
