"""Shared prefixes: exact against the concatenation, read once, at any number of levels."""

import pytest
import torch

from flashlib.inference.prefix import SharedPrefix, shared_prefix_attention
from flashlib.measure.counting.meter import TrafficMeter
from flashlib.reference import assert_within_budget


def poisoned(tensor, lengths):
    """NaN behind each entry's length."""
    behind = torch.arange(tensor.shape[2]) >= torch.as_tensor(lengths)[:, None]
    return tensor.masked_fill(behind[:, None, :, None], float("nan"))


def random_level(rng, batch, kv_heads, dim, v_dim, dtype):
    prefixes = rng.randint(1, 4)
    longest = rng.choice((1, 5, 16, 40))
    lengths = [rng.randint(0, longest) for _ in range(prefixes)]
    k = poisoned(torch.randn(prefixes, kv_heads, longest, dim, dtype=dtype), lengths)
    v = poisoned(torch.randn(prefixes, kv_heads, longest, v_dim, dtype=dtype), lengths)
    if prefixes == 1 and rng.random() < 0.5:
        return SharedPrefix(k, v, lengths=lengths), [0] * batch, lengths
    members = [rng.randrange(prefixes) for _ in range(batch)]
    return SharedPrefix(k, v, members=members, lengths=lengths), members, lengths


def whole_context(levels, k, v, own_length, request):
    """The keys and values that one request sees, concatenated: [1, Hkv, all, D]."""
    pieces = []
    for level, members, lengths in levels:
        prefix = members[request]
        real = slice(0, lengths[prefix])
        pieces.append((level.k[prefix : prefix + 1, :, real], level.v[prefix : prefix + 1, :, real]))
    real = slice(0, own_length)
    pieces.append((k[request : request + 1, :, real], v[request : request + 1, :, real]))
    return tuple(torch.cat(side, dim=2) for side in zip(*pieces, strict=True))


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("repeat", range(15))
def test_equals_attention_over_the_concatenation(rng, monkeypatch, repeat, splits):
    """Also by the path that a GPU takes for few rows: split-KV decoding, here in plain PyTorch."""
    monkeypatch.setattr("flashlib.inference.prefix._splitting_pays", lambda *_: splits)
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64))
    batch, kv_heads, group = rng.randint(1, 5), rng.randint(1, 2), rng.choice((1, 3, 4))
    dim, v_dim, q_len = rng.choice((8, 16)), rng.choice((4, 16)), rng.choice((1, 1, 2, 7))
    capacity = q_len + rng.randint(0, 20)
    own_lengths = [rng.randint(q_len, capacity) for _ in range(batch)]
    levels = [random_level(rng, batch, kv_heads, dim, v_dim, dtype) for _ in range(rng.randint(1, 3))]
    q = torch.randn(batch, kv_heads * group, q_len, dim, dtype=dtype)
    k = poisoned(torch.randn(batch, kv_heads, capacity, dim, dtype=dtype), own_lengths)
    v = poisoned(torch.randn(batch, kv_heads, capacity, v_dim, dtype=dtype), own_lengths)
    options = {"scale": rng.choice((None, 0.3)), "softcap": rng.choice((0.0, 5.0))}
    out, lse = shared_prefix_attention(
        q, [level for level, _, _ in levels], k, v, lengths=own_lengths, return_lse=True, **options
    )
    for request in range(batch):
        here = slice(request, request + 1)
        context = whole_context(levels, k, v, own_lengths[request], request)
        assert_within_budget(out[here], q[here], *context, lse=lse[here], causal=True, **options)


def test_without_lengths_all_keys_are_real(rng):
    q, k, v = torch.randn(3, 4, 2, 8), torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8)
    prefix = SharedPrefix(torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8))
    out = shared_prefix_attention(q, prefix, k, v)
    whole = (torch.cat([shared.expand(3, -1, -1, -1), own], dim=2) for shared, own in ((prefix.k, k), (prefix.v, v)))
    assert_within_budget(out, q, *whole, causal=True)


@pytest.mark.parametrize("members", [None, [0, 0, 0]])
def test_the_keys_of_a_prefix_may_be_cut_into_pieces(rng, monkeypatch, members):
    """As a GPU needs it where rows are few but too many for decoding."""
    monkeypatch.setattr("flashlib.inference.prefix._pieces", lambda *_: 3)
    dtype = rng.choice((torch.float32, torch.bfloat16))
    q, k, v = (torch.randn(3, heads, length, 8, dtype=dtype) for heads, length in ((4, 2), (2, 6), (2, 6)))
    prefix = SharedPrefix(*(torch.randn(1, 2, 12, 8, dtype=dtype) for _ in range(2)), members=members)
    out, lse = shared_prefix_attention(q, prefix, k, v, return_lse=True)
    whole = [torch.cat([shared.expand(3, -1, -1, -1), own], dim=2) for shared, own in ((prefix.k, k), (prefix.v, v))]
    assert_within_budget(out, q, *whole, lse=lse, causal=True)
    alone = prefix.attend(q)
    assert_within_budget(alone.out, q, *(x.expand(3, -1, -1, -1) for x in (prefix.k, prefix.v)), lse=alone.lse)


def test_a_prefix_is_read_once_and_never_copied(rng):
    batch, kv_heads, group, tokens, dim = 8, 2, 4, 2048, 16
    q = torch.randn(batch, kv_heads * group, 1, dim)
    k_prefix, v_prefix = torch.randn(1, kv_heads, tokens, dim), torch.randn(1, kv_heads, tokens, dim)
    k, v = torch.randn(batch, kv_heads, 4, dim), torch.randn(batch, kv_heads, 4, dim)
    with TrafficMeter(k_prefix=k_prefix, v_prefix=v_prefix) as meter:
        shared_prefix_attention(q, SharedPrefix(k_prefix, v_prefix), k, v, backend="tiled")
    assert meter.times_read == {"k_prefix": 1.0, "v_prefix": 1.0}
    rows = batch * group * 128  # the scores of one tile, per KV head; 128 keys are the tile's width
    assert meter.largest.elements <= kv_heads * rows
    assert meter.peak_bytes < k_prefix.nbytes


def test_gradients_flow_to_every_level(rng):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    q, k, v = leaf(3, 2, 2, 4), leaf(3, 1, 3, 4), leaf(3, 1, 3, 4)
    everyone, groups = (leaf(1, 1, 4, 4), leaf(1, 1, 4, 4)), (leaf(2, 1, 3, 4), leaf(2, 1, 3, 4))

    def run(q, k, v, k_all, v_all, k_group, v_group):
        levels = [SharedPrefix(k_all, v_all), SharedPrefix(k_group, v_group, members=[1, 0, 1], lengths=[3, 2])]
        return shared_prefix_attention(q, levels, k, v, lengths=[3, 2, 3], return_lse=True, backend="tiled")

    assert torch.autograd.gradcheck(run, (q, k, v, *everyone, *groups))


K, V = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
BAD = [
    (lambda: SharedPrefix(K.numpy(), V), TypeError, "k must be a torch.Tensor; got ndarray"),
    (lambda: SharedPrefix(K[0], V), ValueError, "k must be [P, Hkv, S, head_dim]; got [2, 5, 8]"),
    (lambda: SharedPrefix(K, V[:, :, :4]), ValueError, "k and v must agree in all but head_dim; got k [2, 2, 5, 8]"),
    (lambda: SharedPrefix(K[:0], V[:0]), ValueError, "k must hold at least one prefix and one head; got [0, 2, 5, 8]"),
    (lambda: SharedPrefix(K, V), ValueError, "members must say which of the 2 prefixes each request has; got None"),
    (lambda: SharedPrefix(K, V, members=[0, 2]), ValueError, "members must lie between 0 and 1"),
    (lambda: SharedPrefix(K, V, members=[0, 0.5]), TypeError, "members must be ints, one per request; got 0.5"),
    (lambda: SharedPrefix(K, V, members=[0], lengths=[1]), ValueError, "lengths must be one per prefix, [2]; got [1]"),
    (lambda: SharedPrefix(K, V, members=[0], lengths=[1.0, 2.0]), TypeError, "lengths must hold integers; got torch.f"),
    (
        lambda: SharedPrefix(K, V, members=[0], lengths=[[1, 2]]),
        ValueError,
        "lengths must be one-dimensional; got [1, 2]",
    ),
    (lambda: SharedPrefix(K, V, members=[0]).attend(torch.randn(3, 2, 1, 8)), ValueError, "members are 1, but q has"),
    (lambda: SharedPrefix(K, V, members=[0]).attend(torch.randn(1, 3, 1, 8)), ValueError, "q has 3 heads and k has 2"),
    (lambda: SharedPrefix(K, V, members=[0]).attend(torch.randn(1, 2, 8)), ValueError, "q must be [B, Hq, Sq, D]"),
    (
        lambda: SharedPrefix(K, V, members=[0], lengths=[6, 1]).attend(torch.randn(1, 2, 1, 8)),
        ValueError,
        "only 5 keys",
    ),
    (lambda: shared_prefix_attention(torch.randn(1, 2, 1, 8), [(K, V)], K[:1], V[:1]), TypeError, "prefixes must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[case[2][:30] for case in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
