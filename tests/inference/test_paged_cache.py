"""The paged cache against a plain model of it: a dictionary of tensors that knows no pages.

Whatever no request holds, free pages and the rest of a last page, is NaN throughout.
"""

import re
from dataclasses import dataclass, field

import pytest
import torch

from flashlib.inference.cache import CacheFullError
from flashlib.inference.decode import decode_attention
from flashlib.inference.paged import OutOfPagesError, PagedKVCache
from flashlib.reference import assert_within_budget
from flashlib.rotary import apply_rotary, rotary_frequencies

KV_HEADS, HEAD_DIM, V_HEAD_DIM = 2, 6, 4
NAN = float("nan")


def new_tokens(requests, count):
    return torch.randn(requests, KV_HEADS, count, HEAD_DIM), torch.randn(requests, KV_HEADS, count, V_HEAD_DIM)


def cache_of(num_pages, page_size, **options):
    cache = PagedKVCache(num_pages, page_size, KV_HEADS, HEAD_DIM, v_head_dim=V_HEAD_DIM, **options)
    poison(cache)
    return cache


def held_slots(cache):
    """Which slots hold a token of some request: bool [num_pages, page_size]. And how many requests list each page."""
    held = torch.zeros(cache.num_pages, cache.page_size, dtype=torch.bool)
    listed = torch.zeros(cache.num_pages, dtype=torch.int64)
    for row, length in zip(cache.block_table(cache.requests), cache.lengths(cache.requests).tolist(), strict=True):
        pages = row[row >= 0].long()
        assert len(pages) == -(-length // cache.page_size) and len(set(pages.tolist())) == len(pages)
        assert (row[len(pages) :] == -1).all()
        listed[pages] += 1
        token = torch.arange(length)
        held[pages[token // cache.page_size], token % cache.page_size] = True
    return held, listed


def poison(cache):
    unheld = ~held_slots(cache)[0][:, None, :, None]
    cache.key_pages.masked_fill_(unheld, NAN)
    cache.value_pages.masked_fill_(unheld, NAN)


def snapshot(cache):
    table = cache.block_table(cache.requests).tolist()
    memory = [x.nan_to_num(7.5).clone() for x in (cache.key_pages, cache.value_pages)]
    return cache.requests, cache.lengths(cache.requests).tolist(), table, cache.free_pages, memory


def same(before, after):
    return before[:4] == after[:4] and all(torch.equal(*pair) for pair in zip(before[4], after[4], strict=True))


@dataclass
class PlainModel:
    """What each request holds: keys [Hkv, length, D] and values [Hkv, length, Dv]."""

    texts: dict = field(default_factory=dict)

    def add(self, request):
        self.texts[request] = (torch.empty(KV_HEADS, 0, HEAD_DIM), torch.empty(KV_HEADS, 0, V_HEAD_DIM))

    def append(self, requests, k, v, counts):
        for request, *new, count in zip(requests, k, v, counts, strict=True):
            held = self.texts[request]
            self.texts[request] = tuple(torch.cat([x, y[:, :count]], 1) for x, y in zip(held, new, strict=True))

    def truncate(self, request, length):
        self.texts[request] = tuple(x[:, :length] for x in self.texts[request])

    def length(self, request):
        return self.texts[request][0].shape[1]

    def expect(self, cache):
        assert cache.requests == list(self.texts)
        assert cache.lengths(cache.requests).tolist() == [self.length(r) for r in self.texts]
        assert cache.lengths(cache.requests).dtype == cache.block_table(cache.requests).dtype == torch.int32
        for request, (keys, values) in self.texts.items():
            got_keys, got_values = cache.gather(request)
            assert torch.equal(got_keys[0], keys) and torch.equal(got_values[0], values)
        _, listed = held_slots(cache)
        assert int((listed == 0).sum()) == cache.free_pages
        assert cache.nbytes_held == int((listed > 0).sum()) * cache.page_size * cache.bytes_per_token


def random_append(cache, model, rng):
    requests = rng.sample(cache.requests, rng.randint(0, len(cache.requests)))
    size = rng.choice((0, 1, 1, 1, 3, 7))
    k, v = new_tokens(len(requests), size)
    counts = None if rng.random() < 0.4 else [rng.randint(0, size) for _ in requests]
    if counts is not None:
        for row, count in enumerate(counts):
            k[row, :, count:] = v[row, :, count:] = NAN
    before = snapshot(cache)
    try:
        cache.append(requests, k, v, counts)
    except OutOfPagesError as error:
        needed, free = map(int, re.search(r"pages: (\d+) more are needed, and (\d+) of", str(error)).groups())
        assert needed > free == cache.free_pages
        assert same(before, snapshot(cache))
    else:
        model.append(requests, k, v, counts if counts is not None else [size] * len(requests))


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("round", range(3))
def test_random_operations(page_size, round, rng):
    cache, model = cache_of(rng.choice((5, 12, 40)), page_size), PlainModel()
    for _ in range(120):
        action = rng.choice(("add", "append", "append", "append", "append", "free", "fork", "truncate"))
        if action == "add" or not cache.requests:
            model.add(cache.add())
        elif action == "append":
            random_append(cache, model, rng)
        else:
            request = rng.choice(cache.requests)
            if action == "free":
                cache.free(request)
                del model.texts[request]
            elif action == "fork":
                model.texts[cache.fork(request)] = model.texts[request]
            else:
                length = rng.randint(0, model.length(request))
                cache.truncate(request, length)
                model.truncate(request, length)
        poison(cache)
        model.expect(cache)


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("q_len", [1, 3])
def test_decoding_reads_pages_where_they_lie(page_size, q_len, rng):
    """A ragged batch, some of it forked, on pages that others have left: each request gets what its own tokens give."""
    cache, model = cache_of(200 // page_size, page_size), PlainModel()
    for _ in range(4):
        model.add(cache.add())
        random_append(cache, model, rng)
    leaver = rng.choice(cache.requests)
    cache.free(leaver)
    del model.texts[leaver]
    child = cache.fork(cache.requests[0])
    model.texts[child] = model.texts[cache.requests[0]]
    requests = rng.sample(cache.requests, 4)
    k, v = new_tokens(4, q_len)
    cache.append(requests, k, v)
    model.append(requests, k, v, [q_len] * 4)
    poison(cache)
    q = torch.randn(4, 3 * KV_HEADS, q_len, HEAD_DIM)
    where = {"lengths": cache.lengths(requests), "block_table": cache.block_table(requests)}
    out, lse = decode_attention(q, cache.key_pages, cache.value_pages, **where, return_lse=True)
    for i, request in enumerate(requests):
        one = slice(i, i + 1)
        text = (x[None] for x in model.texts[request])
        assert_within_budget(out[one], q[one], *text, lse=lse[one], causal=True)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_every_slot_can_be_used_and_used_again(page_size, rng):
    cache = cache_of(4, page_size)
    for _ in range(2):
        alone = cache.add()
        k, v = new_tokens(1, 4 * page_size)
        cache.append([alone], k, v)
        assert cache.free_pages == 0 and cache.nbytes_held == cache.nbytes
        assert not cache.key_pages.isnan().any() and torch.equal(cache.gather(alone)[0], k)
        with pytest.raises(OutOfPagesError, match="1 more are needed, and 0 of 4 are free"):
            cache.append([alone], *new_tokens(1, 1))
        cache.free(alone)
        poison(cache)
        assert cache.free_pages == 4


def test_running_out_loses_nothing(rng):
    """Two requests want a page each and there is one: neither gets it. What fits still goes in."""
    cache = cache_of(3, 4)
    a, b = cache.add(), cache.add()
    cache.append([a, b], *new_tokens(2, 4))
    before = snapshot(cache)
    with pytest.raises(CacheFullError, match="out of pages: 2 more are needed, and 1 of 3 are free"):
        cache.append([a, b], *new_tokens(2, 1))
    assert same(before, snapshot(cache))
    k, v = new_tokens(1, 3)
    cache.append([b], k, v)
    assert torch.equal(cache.gather(b)[0][:, :, 4:], k) and cache.lengths([a, b]).tolist() == [4, 7]


def test_a_fork_shares_full_pages_and_copies_the_last_once(rng):
    cache = cache_of(5, 4)
    parent = cache.add()
    k, v = new_tokens(1, 10)
    cache.append([parent], k, v)
    children = [cache.fork(parent), cache.fork(parent)]
    assert cache.free_pages == 2
    tokens = new_tokens(3, 1)
    cache.append([parent, *children], *tokens)  # three write into what was one page: two copies, and the last one stays
    assert cache.free_pages == 0
    table = cache.block_table([parent, *children])
    assert (table[:, :2] == table[0, :2]).all() and len(set(table[:, 2].tolist())) == 3
    for row, request in enumerate((parent, *children)):
        for got, shared, own in zip(cache.gather(request), (k, v), tokens, strict=True):
            assert torch.equal(got[0], torch.cat([shared[0], own[row]], 1))
    for request in (parent, *children):
        cache.free(request)
    assert cache.free_pages == 5


def test_running_out_while_copying_a_shared_page(rng):
    cache = cache_of(2, 4)
    parent = cache.add()
    cache.append([parent], *new_tokens(1, 6))
    child = cache.fork(parent)
    before = snapshot(cache)
    with pytest.raises(OutOfPagesError, match="1 more are needed, and 0 of 2"):
        cache.append([child], *new_tokens(1, 1))
    assert same(before, snapshot(cache))
    cache.free(parent)
    cache.append([child], *new_tokens(1, 1))  # alone with the page now: no copy
    assert cache.lengths([child]).tolist() == [7] and cache.free_pages == 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_turned_by_the_positions_they_get(interleaved, rng):
    frequencies = rotary_frequencies(4, 100.0)  # the last two of six channels stay
    cache = cache_of(20, 3)
    requests = [cache.add() for _ in range(3)]
    texts = [[], [], []]
    for counts in ([4, 0, 7], [1, 1, 1], [0, 5, 2]):
        k, v = new_tokens(3, max(counts))
        assert cache.next_positions(requests, 2).tolist() == [
            [n, n + 1] for n in (sum(x.shape[1] for x in t) for t in texts)
        ]
        cache.append(requests, k, v, counts, rotary=frequencies, interleaved=interleaved)
        for text, new, count in zip(texts, k, counts, strict=True):
            text.append(new[:, :count])
    for request, text in zip(requests, texts, strict=True):
        whole = torch.cat(text, 1)[None]
        turned = apply_rotary(whole, torch.arange(whole.shape[2]), frequencies, interleaved=interleaved)
        assert torch.equal(cache.gather(request)[0], turned)


def test_caches_used_alike_have_equal_tables(rng):
    first, second = cache_of(30, 2), cache_of(30, 2, dtype=torch.float16)
    for cache in (first, second):
        a, b = cache.add(), cache.add()
        for request, count in ((a, 5), (b, 3), (a, 4)):
            k, v = (x.to(cache.dtype) for x in new_tokens(1, count))
            cache.append([request], k, v)
        cache.free(a)
        c = cache.fork(b)
        cache.append([c, b], *(x.to(cache.dtype) for x in new_tokens(2, 4)))
    assert torch.equal(first.block_table([b, c]), second.block_table([b, c]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_memory_is_reserved_once_and_written_in_place(dtype, rng):
    cache = cache_of(8, 4, dtype=dtype)
    size = torch.finfo(dtype).bits // 8
    assert cache.bytes_per_token == KV_HEADS * (HEAD_DIM + V_HEAD_DIM) * size
    assert cache.nbytes == cache.key_pages.nbytes + cache.value_pages.nbytes == 32 * cache.bytes_per_token
    addresses = cache.key_pages.data_ptr(), cache.value_pages.data_ptr()
    request = cache.add()
    k, v = (x.to(dtype) for x in new_tokens(1, 9))
    cache.append([request], k.mT.contiguous().mT, v)  # any strides
    assert addresses == (cache.key_pages.data_ptr(), cache.value_pages.data_ptr())
    assert cache.nbytes_held == 12 * cache.bytes_per_token and torch.equal(cache.gather(request)[0], k)


def test_empty_cases(rng):
    cache = PagedKVCache(0, 4, KV_HEADS, HEAD_DIM)
    a = cache.add()
    cache.append([a], torch.zeros(1, KV_HEADS, 0, HEAD_DIM), torch.zeros(1, KV_HEADS, 0, HEAD_DIM))
    cache.append([], torch.zeros(0, KV_HEADS, 3, HEAD_DIM), torch.zeros(0, KV_HEADS, 3, HEAD_DIM))
    assert cache.block_table([a]).shape == (1, 0) and cache.block_table([]).shape == (0, 0)
    assert cache.lengths([]).shape == (0,) and cache.next_positions([], 3).shape == (0, 3)
    assert cache.gather(a)[0].shape == (1, KV_HEADS, 0, HEAD_DIM)
    with pytest.raises(OutOfPagesError):
        cache.append([a], torch.zeros(1, KV_HEADS, 1, HEAD_DIM), torch.zeros(1, KV_HEADS, 1, HEAD_DIM))


def test_it_says_what_it_holds():
    cache = PagedKVCache(100, 16, 3, 64, dtype=torch.bfloat16)
    cache.append([cache.add()], *(torch.zeros(1, 3, 17, 64, dtype=torch.bfloat16) for _ in range(2)))
    assert repr(cache) == (
        "PagedKVCache(num_pages=100, page_size=16, kv_heads=3, head_dim=64, bfloat16, 1 requests, 98 pages free, 1,228,800 bytes)"
    )


K, V = torch.zeros(2, KV_HEADS, 3, HEAD_DIM), torch.zeros(2, KV_HEADS, 3, V_HEAD_DIM)
BAD_CALLS = [
    (lambda c: PagedKVCache(1, 0, 1, 1), ValueError, "page_size must be at least 1; got 0"),
    (lambda c: PagedKVCache(-1, 1, 1, 1), ValueError, "num_pages must be at least 0; got -1"),
    (lambda c: PagedKVCache(1, 2.0, 1, 1), TypeError, "page_size must be an int; got float"),
    (lambda c: PagedKVCache(1, 1, 1, 1, dtype=torch.int8), TypeError, "dtype must be torch.float64"),
    (lambda c: c.free(2), ValueError, "there is no request 2: it was freed, or never added; there are [0, 1]"),
    (lambda c: c.fork("0"), TypeError, "a request is the int that add() gave; got '0'"),
    (lambda c: c.lengths(0), TypeError, "requests must be a sequence of requests; got 0"),
    (lambda c: c.block_table([0, 7]), ValueError, "there is no request 7"),
    (lambda c: c.gather(-1), ValueError, "there is no request -1"),
    (lambda c: c.next_positions([0], -1), ValueError, "count must be at least 0; got -1"),
    (lambda c: c.truncate(1, 6), ValueError, "request 1 holds 5 tokens and cannot be cut to 6"),
    (lambda c: c.truncate(1, -1), ValueError, "length must be at least 0; got -1"),
    (lambda c: c.append([0, 0], K, V), ValueError, "requests must be different from one another; got [0, 0]"),
    (lambda c: c.append([0], K, V), ValueError, f"k must be [1, {KV_HEADS}, S, {HEAD_DIM}]; got {list(K.shape)}"),
    (lambda c: c.append([0, 1], K, V[:, :, :2]), ValueError, "k and v must hold equally many tokens"),
    (lambda c: c.append([0, 1], K.half(), V), TypeError, "k must be torch.float32, as the cache is; got torch.float16"),
    (lambda c: c.append([0, 1], K, None), TypeError, "v must be a torch.Tensor; got NoneType"),
    (lambda c: c.append([0, 1], K, V, [4, 0]), ValueError, "counts must lie between 0 and S = 3; got [4, 0]"),
    (lambda c: c.append([0, 1], K, V, [1.0, 0]), TypeError, "counts must be integers; got torch.float32"),
    (lambda c: c.append([0, 1], K.clone().requires_grad_(), V), ValueError, "k requires a gradient"),
    (lambda c: c.append([0, 1], K, V, rotary=rotary_frequencies(8)), ValueError, "frequencies must have at most D / 2 entries"),
    (lambda c: c.append([0, 1], K, V, rotary=1e4), TypeError, "frequencies must be a torch.Tensor; got float"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message for *_, message in BAD_CALLS])
def test_bad_input_changes_nothing(call, error, message, rng):
    cache = cache_of(10, 4)
    requests = [cache.add(), cache.add()]
    cache.append(requests, *new_tokens(2, 5))
    before = snapshot(cache)
    with pytest.raises(error, match=re.escape(message)):
        call(cache)
    assert same(before, snapshot(cache))


def test_a_freed_request_is_noticed(rng):
    cache = cache_of(4, 2)
    old = cache.add()
    cache.free(old)
    assert cache.add() != old
    with pytest.raises(ValueError, match="there is no request 0"):
        cache.append([old], *new_tokens(1, 1))
