"""The contiguous cache: what comes out is what attention over the whole sequence would have given."""

import pytest
import torch

from flashlib import attention
from flashlib.inference.cache import CacheFullError, KVCache
from flashlib.masks import Causal
from flashlib.reference import assert_within_budget

BACKENDS = ("auto", "tiled", "reference", "torch_sdpa_math")


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def poisoned(*sizes, **options):
    """A cache whose unused memory is NaN."""
    cache = KVCache(*sizes, **options)
    cache.key_buffer.fill_(float("nan"))
    cache.value_buffer.fill_(float("nan"))
    return cache


def snapshot(cache):
    return cache.lengths.tolist(), cache.key_buffer.clone(), cache.value_buffer.clone()


def unchanged(cache, before):
    lengths, keys, values = before
    same = [
        torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
        for a, b in ((cache.key_buffer, keys), (cache.value_buffer, values))
    ]
    return cache.lengths.tolist() == lengths and all(same)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_chunks_and_decode_are_causal_attention(generator, backend, dtype):
    q, k = randn(generator, 2, 6, 40, 24, dtype=dtype), randn(generator, 2, 2, 40, 24, dtype=dtype)
    v = randn(generator, 2, 2, 40, 16, dtype=dtype)
    cache = poisoned(2, 2, 50, 24, v_head_dim=16, dtype=dtype)
    done = 0
    for count in (13, 1, 9, 1, 1, 15):  # prefill, then chunks and single tokens
        new = slice(done, done + count)
        cache.append(k[:, :, new], v[:, :, new])
        done += count
        by_flag = attention(q[:, :, new], cache.keys, cache.values, causal=True, backend=backend)
        by_mask = attention(q[:, :, new], cache.keys, cache.values, mask=cache.mask(count), backend=backend)
        assert torch.equal(by_flag, by_mask)
        assert_within_budget(by_flag, q[:, :, new], k[:, :, :done], v[:, :, :done], causal=True)
    assert cache.max_length == 40 and cache.is_uniform


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_of_different_lengths(generator, backend):
    """Each request of a ragged batch gets what it would get alone, whatever lies in the memory it does not use."""
    lengths, capacity = [5, 0, 17, 9], 32
    cache = poisoned(4, 3, capacity, 16)
    k, v = randn(generator, 4, 3, capacity, 16), randn(generator, 4, 3, capacity, 16)
    padded_k, padded_v = k.clone(), v.clone()
    for request, length in enumerate(lengths):
        padded_k[request, :, length:] = padded_v[request, :, length:] = float("nan")
    cache.append(padded_k[:, :, :17], padded_v[:, :, :17], counts=lengths)
    assert cache.lengths.tolist() == lengths and not cache.is_uniform and cache.max_length == 17

    for q_len in (1, 4):  # decode, then several tokens at once (as for drafted tokens)
        start = cache.lengths
        new = start[:, None] + torch.arange(q_len)
        assert torch.equal(cache.next_positions(q_len), new)
        rows = torch.arange(4)[:, None]
        cache.append(k[rows, :, new].transpose(1, 2), v[rows, :, new].transpose(1, 2))
        q = randn(generator, 4, 6, q_len, 16)
        out = attention(q, cache.keys, cache.values, mask=cache.mask(q_len), backend=backend)
        for request, length in enumerate(cache.lengths.tolist()):
            one = slice(request, request + 1)
            assert_within_budget(out[one], q[one], k[one, :, :length], v[one, :, :length], causal=True)


def test_prefill_of_prompts_padded_on_the_right(generator):
    counts = [7, 3, 0, 5]
    cache = poisoned(4, 2, 8, 16)
    q, k, v = randn(generator, 4, 4, 7, 16), randn(generator, 4, 2, 7, 16), randn(generator, 4, 2, 7, 16)
    cache.append(k, v, counts=counts)
    out = attention(q, cache.keys, cache.values, mask=cache.mask(7, counts=counts))
    for request, count in enumerate(counts):
        one, real = slice(request, request + 1), slice(0, count)
        assert_within_budget(out[one, :, real], q[one, :, real], k[one, :, real], v[one, :, real], causal=True)
    # And a second chunk, again of different sizes, behind the first.
    more = [1, 2, 2, 0]
    chunk_q, chunk_k, chunk_v = (randn(generator, 4, h, 2, 16) for h in (4, 2, 2))
    cache.append(chunk_k, chunk_v, counts=torch.tensor(more))
    out = attention(chunk_q, cache.keys, cache.values, mask=cache.mask(2, counts=more))
    for request, (count, new) in enumerate(zip(counts, more, strict=True)):
        one = slice(request, request + 1)
        all_k = torch.cat([k[one, :, :count], chunk_k[one, :, :new]], dim=2)
        all_v = torch.cat([v[one, :, :count], chunk_v[one, :, :new]], dim=2)
        assert_within_budget(out[one, :, :new], chunk_q[one, :, :new], all_k, all_v, causal=True)


def test_a_uniform_cache_needs_no_special_mask():
    cache = KVCache(2, 1, 8, 4)
    cache.append(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    assert cache.mask(2).band() == Causal().band()  # so that every backend can run it


def test_keys_and_values_are_views(generator):
    cache = KVCache(2, 3, 10, 4, v_head_dim=6)
    k, v = randn(generator, 2, 3, 7, 4), randn(generator, 2, 3, 7, 6)
    cache.append(k, v)
    assert cache.keys.data_ptr() == cache.key_buffer.data_ptr() and torch.equal(cache.keys, k)
    assert cache.values.data_ptr() == cache.value_buffer.data_ptr() and torch.equal(cache.values, v)
    addresses = cache.key_buffer.data_ptr(), cache.value_buffer.data_ptr()
    cache.append(k[:, :, :3], v[:, :, :3])
    assert addresses == (cache.key_buffer.data_ptr(), cache.value_buffer.data_ptr())  # appended in place


@pytest.mark.parametrize("counts", [None, [2, 3]], ids=["uniform", "ragged"])
def test_running_out_changes_nothing(generator, counts):
    cache = poisoned(2, 1, 4, 4)
    cache.append(randn(generator, 2, 1, 2, 4), randn(generator, 2, 1, 2, 4))
    before = snapshot(cache)
    new = randn(generator, 2, 1, 3, 4)
    request = 0 if counts is None else 1
    with pytest.raises(
        CacheFullError, match=f"request {request} holds 2 tokens and 3 more do not fit into its capacity of 4"
    ):
        cache.append(new, new, counts=counts)
    assert unchanged(cache, before)
    cache.append(new[:, :, :2], new[:, :, :2])  # what fits still goes in
    assert cache.lengths.tolist() == [4, 4]


def test_lengths_cannot_be_changed_from_outside():
    cache = KVCache(2, 1, 4, 4)
    cache.lengths.fill_(3)
    assert cache.lengths.tolist() == [0, 0]


def test_truncate_and_reset(generator):
    cache = poisoned(3, 1, 10, 4)
    first, second = randn(generator, 3, 1, 6, 4), randn(generator, 3, 1, 2, 4)
    cache.append(first, first)
    cache.truncate(4)
    assert cache.lengths.tolist() == [4, 4, 4]
    cache.append(second, second)
    assert torch.equal(cache.keys, torch.cat([first[:, :, :4], second], dim=2))
    cache.truncate([0, 6, 3])
    assert cache.lengths.tolist() == [0, 6, 3]
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"lengths must lie between 0 and what each request holds, \[0, 6, 3\]"):
        cache.truncate([0, 5, 4])
    assert unchanged(cache, before)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0] and cache.keys.shape == (3, 1, 0, 4)


def test_select_copies_requests(generator):
    cache = poisoned(3, 2, 6, 4)
    k, v = randn(generator, 3, 2, 4, 4), randn(generator, 3, 2, 4, 4)
    cache.append(k, v, counts=[1, 4, 2])
    chosen = cache.select([2, 2, 0, 1])
    assert chosen.lengths.tolist() == [2, 2, 1, 4] and chosen.capacity == 6
    for new, (old, length) in enumerate([(2, 2), (2, 2), (0, 1), (1, 4)]):
        assert torch.equal(chosen.keys[new, :, :length], k[old, :, :length])
        assert torch.equal(chosen.values[new, :, :length], v[old, :, :length])
    chosen.append(k[[0, 0, 0, 0]][:, :, :1], v[[0, 0, 0, 0]][:, :, :1])
    assert cache.lengths.tolist() == [1, 4, 2] and torch.equal(cache.keys[1], k[1])  # the old one is untouched


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)]
)
def test_memory_accounting(dtype, size):
    cache = KVCache(4, 3, 100, 64, v_head_dim=32, dtype=dtype)
    assert cache.bytes_per_token == 3 * (64 + 32) * size
    assert cache.nbytes == cache.key_buffer.nbytes + cache.value_buffer.nbytes == 4 * 100 * cache.bytes_per_token
    assert cache.nbytes_used == 0
    new = torch.zeros(4, 3, 10, 64, dtype=dtype)
    cache.append(new, new[..., :32], counts=[1, 2, 3, 4])
    assert cache.nbytes_used == 10 * cache.bytes_per_token


def test_empty_cases(generator):
    cache = KVCache(0, 2, 5, 4)
    cache.append(torch.zeros(0, 2, 3, 4), torch.zeros(0, 2, 3, 4))
    assert cache.max_length == 0 and cache.nbytes == 0 and cache.is_uniform
    cache = KVCache(2, 2, 5, 4)
    cache.append(torch.zeros(2, 2, 0, 4), torch.zeros(2, 2, 0, 4))
    out = attention(randn(generator, 2, 2, 1, 4), cache.keys, cache.values, mask=cache.mask(1))
    assert torch.equal(out, torch.zeros(2, 2, 1, 4))  # nothing to look at


def test_it_says_what_it_holds():
    cache = KVCache(2, 3, 100, 64, dtype=torch.bfloat16)
    assert repr(cache) == "KVCache(batch=2, kv_heads=3, head_dim=64, bfloat16, 0 of 100 tokens, 153,600 bytes)"
