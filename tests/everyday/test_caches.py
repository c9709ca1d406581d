"""A page that is not there, a length that cannot be, tokens for which a cache has no room: an error that loses nothing, or NaN where nobody may look."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashlib.inference import CacheFullError, KVCache, OutOfPagesError, PagedKVCache
from flashlib.inference.decode import decode_attention
from flashlib.interop.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

PAGES, PAGE_SIZE = 6, 4
TABLE = torch.tensor(
    [[0, 1, 2], [3, 9, 4], [5, 0, 9]], dtype=torch.int32
)  # of the third request, nobody looks up the last page
LENGTHS = torch.tensor([12, 10, 7])
WRONG_PAGE = "block_table[1, 1] is page 9, but there are 6 pages"


def test_where_nobody_may_look():
    seed = random.SystemRandom().getrandbits(40)
    program = Path(__file__).parent / "interpreted_caches.py"
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), "--seed", str(seed), "--problems", "4"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout == "4 of each hold\n"


def decoding(table):
    q = torch.randn(3, 4, 1, 16)
    k, v = torch.randn(2, PAGES, 2, PAGE_SIZE, 16).unbind()
    return decode_attention(q, k, v, lengths=LENGTHS, block_table=table)


def with_kvcache(table, **options):
    q = torch.randn(3, 1, 4, 16)
    k, v = torch.randn(2, PAGES, PAGE_SIZE, 2, 16).unbind()
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=LENGTHS, block_table=table, **options)


def packed(table, ends_q):
    q = torch.randn(ends_q[-1], 4, 16)
    k, v = torch.randn(2, PAGES, PAGE_SIZE, 2, 16).unbind()
    ends_k = torch.tensor([0, 12, 22, 29])
    return flash_attn_varlen_func(q, k, v, torch.tensor(ends_q), ends_k, 2, 12, block_table=table)


CALLS = {
    "decode_attention": decoding,
    "with_kvcache": with_kvcache,
    "with_kvcache, copied": lambda table: with_kvcache(table, alibi_slopes=torch.rand(4)),
    "with_kvcache, padded": lambda table: with_kvcache(table, cache_leftpad=torch.tensor([1, 2, 0])),
    "varlen, decoding": lambda table: packed(table, [0, 1, 2, 3]),
    "varlen, copied": lambda table: packed(table, [0, 1, 3, 4]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_page_that_is_not_there_is_named(call):
    with pytest.raises(ValueError, match=re.escape(WRONG_PAGE)):
        CALLS[call](TABLE)
    out = CALLS[call](TABLE.where(TABLE != 9, torch.tensor([[0], [1], [9]], dtype=torch.int32)))
    assert out.isfinite().all()  # the last page of the third request may have any number


@pytest.mark.parametrize("page", [-1, 9, 2**32 + 1])
def test_nothing_is_written_through_a_wrong_page(page):
    table = TABLE.where(TABLE != 9, 1).long()
    table[1, 2] = page
    caches = torch.randn(2, PAGES, PAGE_SIZE, 2, 16)
    old, new = caches.clone(), torch.randn(3, 2, 2, 16)
    with pytest.raises(ValueError, match=re.escape(f"block_table[1, 2] is page {page}, but there are 6 pages")):
        flash_attn_with_kvcache(new, *caches, new, new, cache_seqlens=torch.tensor([0, 7, 0]), block_table=table)
    assert torch.equal(caches, old)


@pytest.mark.parametrize("seqlens", [5, -1, torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0, 2**62])])
def test_nothing_is_written_without_room(seqlens):
    caches = torch.randn(2, 2, 6, 2, 16)
    old, new = caches.clone(), torch.randn(2, 2, 2, 16)
    with pytest.raises(ValueError, match="cache_seqlens must lie between 0 and 4, where each request has room for 6"):
        flash_attn_with_kvcache(new, *caches, new, new, cache_seqlens=seqlens)
    assert torch.equal(caches, old)


def test_more_new_tokens_than_any_request_has_room_for():
    """The shapes say it, on every device: nobody need look at a value."""
    caches = torch.empty(2, 2, 6, 2, 16, device="meta")
    new = torch.empty(2, 7, 2, 16, device="meta")
    seqlens = torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="k has 7 new tokens for each request, but there is room for 6"):
        flash_attn_with_kvcache(new, *caches, new, new, cache_seqlens=seqlens)


def test_our_caches_refuse_before_they_write():
    """Their lengths are on the host, whatever the device."""
    cache = KVCache(2, 1, 4, 8)
    cache.append(*torch.randn(2, 2, 1, 3, 8))
    held = cache.key_buffer.clone(), cache.value_buffer.clone(), cache.lengths
    with pytest.raises(CacheFullError, match="request 1 holds 3 tokens and 2 more do not fit into its capacity of 4"):
        cache.append(*torch.randn(2, 2, 1, 2, 8), counts=[1, 2])
    assert all(map(torch.equal, held, (cache.key_buffer, cache.value_buffer, cache.lengths)))

    paged = PagedKVCache(3, 2, 1, 8)
    requests = [paged.add(), paged.add()]
    paged.append(requests, *torch.randn(2, 2, 1, 2, 8))
    held = paged.key_pages.clone(), paged.block_table(requests), paged.lengths(requests)
    with pytest.raises(OutOfPagesError, match="2 more are needed, and 1 of 3 are free"):
        paged.append(requests, *torch.randn(2, 2, 1, 1, 8))
    assert all(map(torch.equal, held, (paged.key_pages, paged.block_table(requests), paged.lengths(requests))))
