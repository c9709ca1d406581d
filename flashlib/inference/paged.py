"""A paged KV cache: memory for the tokens that are there, not for the longest text that might come.

A contiguous cache (:class:`flashlib.inference.cache.KVCache`) reserves ``capacity`` tokens for every request, used or not. Here
the memory is cut into pages of a few tokens each. A request owns a list of pages, in any order, and takes one more when its last
page is full. So at most ``page_size - 1`` tokens of each request are reserved in vain, pages that one request gives back serve
the next, and two requests with a common beginning can hold the same pages.

The price is one more step between a token and its memory: token t of a request lies in its page number ``t // page_size``, at
slot ``t % page_size``. The list of pages, the block table, is an input of the attention kernel.

Source: Kwon et al. 2023, PagedAttention (arXiv 2309.06180), section 4.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor

from flashlib.inference.cache import CacheFullError
from flashlib.inference.checks import check_dtype, check_new_tokens, check_size, checked_counts
from flashlib.rotary import apply_rotary

__all__ = ["OutOfPagesError", "PagedKVCache"]

NO_PAGE = -1  # fills the block table behind a request's last page


class OutOfPagesError(CacheFullError):
    """There are fewer free pages than the tokens to be appended need. Nothing was written."""


class PagedKVCache:
    """The keys and values of one attention layer, for requests that come, grow and go.

    A decoding step for some of the requests, each with its own length::

        requests = [a, c]
        cache.append(requests, k, v)                                         # k, v: [2, Hkv, 1, D]
        out = decode_attention(
            q, cache.key_pages, cache.value_pages,                           # q: [2, Hq, 1, D]
            lengths=cache.lengths(requests), block_table=cache.block_table(requests),
        )

    What lies in a page behind a request's last token, and in a free page, is whatever the memory held before. Which page belongs
    to whom is decided on the host; nothing here waits for a GPU. The cache is for inference: it holds no gradient.

    Args:
        num_pages: how many pages there are, for all requests together.
        page_size: tokens in a page, from 1.
        kv_heads: number of key and value heads, Hkv.
        head_dim: channels of a key, D.
        v_head_dim: channels of a value, Dv; ``head_dim`` unless given.
        dtype: float64, float32, float16 or bfloat16.
        device: where the memory is; PyTorch's default device unless given.

    Attributes:
        key_pages: ``[num_pages, Hkv, page_size, D]``.
        value_pages: ``[num_pages, Hkv, page_size, Dv]``.

    Raises:
        TypeError: a size is not an int, or ``dtype`` is not one of those above.
        ValueError: a size is below its minimum (0 for ``num_pages``, 1 for the others).
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_size("num_pages", num_pages, 0)
        sizes = {"page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
        for name, size in sizes.items():
            check_size(name, size, 1)
        check_dtype(dtype)
        self.key_pages = torch.empty(num_pages, kv_heads, page_size, head_dim, dtype=dtype, device=device)
        self.value_pages = torch.empty(num_pages, kv_heads, page_size, v_head_dim, dtype=dtype, device=device)
        self._pool = _PagePool(num_pages)
        self._requests: dict[int, _Request] = {}
        self._next_request = 0

    def __repr__(self) -> str:
        num_pages, kv_heads, page_size, head_dim = self.key_pages.shape
        return (
            f"PagedKVCache(num_pages={num_pages}, page_size={page_size}, kv_heads={kv_heads}, head_dim={head_dim}, "
            f"{str(self.dtype).removeprefix('torch.')}, {len(self._requests)} requests, {self.free_pages} pages free, "
            f"{self.nbytes:,} bytes)"
        )

    # Requests come and go

    def add(self) -> int:
        """A new request, of no tokens and no pages. Its number is never given again, so that an old one is noticed."""
        return self._insert(_Request())

    def fork(self, request: int) -> int:
        """A new request that begins with all tokens of ``request``, and shares its pages: nothing is copied now.

        Full pages stay shared. The first of the two that appends to a last page that is not full gets a copy of that page
        (copy on write).

        Raises:
            ValueError: there is no such request.
        """
        parent = self._known(request)
        self._pool.share(parent.pages)
        return self._insert(_Request(list(parent.pages), parent.length))

    def free(self, request: int) -> None:
        """Forget a request. Those of its pages that no other request shares are free again; nothing is erased.

        Raises:
            ValueError: there is no such request.
        """
        self._pool.release(self._known(request).pages)
        del self._requests[request]

    def truncate(self, request: int, length: int) -> None:
        """Forget a request's tokens from position ``length`` on, as when drafted tokens are rejected, and give back the pages
        that are not needed any more.

        Raises:
            TypeError: ``length`` is not an int.
            ValueError: there is no such request, or it holds fewer tokens than that.
        """
        held = self._known(request)
        check_size("length", length, 0)
        if length > held.length:
            raise ValueError(f"request {request} holds {held.length} tokens and cannot be cut to {length}")
        keep = self._pages_for(length)
        self._pool.release(held.pages[keep:])
        held.pages, held.length = held.pages[:keep], length

    # What a request holds

    @property
    def requests(self) -> list[int]:
        """The requests that there are, in the order in which they came."""
        return list(self._requests)

    def lengths(self, requests: Sequence[int]) -> Tensor:
        """How many tokens each request holds: int32 ``[n]``, on the cache's device. ``cache_seqlens`` in flash_attn."""
        return self._on_device(
            torch.tensor([held.length for held in self._all_known(requests)], dtype=torch.int32, device="cpu")
        )

    def block_table(self, requests: Sequence[int]) -> Tensor:
        """The pages of each request, in the order of its tokens: int32 ``[n, most pages]``, on the cache's device.

        Behind the last page of a request comes -1, which no kernel may look up. Pages are handed out in a fixed order, so the
        caches of a model's layers, if they are used alike, have equal block tables: ask one of them.
        """
        pages = [held.pages for held in self._all_known(requests)]
        width = max(map(len, pages), default=0)
        rows = [held + [NO_PAGE] * (width - len(held)) for held in pages]
        return self._on_device(torch.tensor(rows, dtype=torch.int32, device="cpu").view(len(pages), width))

    def next_positions(self, requests: Sequence[int], count: int) -> Tensor:
        """The positions that the next ``count`` tokens will have: int64 ``[n, count]``, as ``apply_rotary`` wants them."""
        check_size("count", count, 0)
        lengths = torch.tensor([held.length for held in self._all_known(requests)], dtype=torch.int64, device="cpu")
        return self._on_device(lengths[:, None] + torch.arange(count, device="cpu"))

    def gather(self, request: int) -> tuple[Tensor, Tensor]:
        """The keys ``[1, Hkv, length, D]`` and values ``[1, Hkv, length, Dv]`` of one request, copied out of their pages.

        For code that knows no pages. It costs what paging is there to save; :func:`decode_attention` reads pages as they lie.
        """
        held = self._known(request)
        pages = self._on_device(torch.tensor(held.pages, dtype=torch.int64, device="cpu"))
        keys, values = (memory[pages].transpose(0, 1).flatten(1, 2) for memory in (self.key_pages, self.value_pages))
        return keys[None, :, : held.length], values[None, :, : held.length]

    # How it grows

    def append(
        self,
        requests: Sequence[int],
        k: Tensor,
        v: Tensor,
        counts: Tensor | Sequence[int] | None = None,
        *,
        rotary: Tensor | None = None,
        interleaved: bool = False,
    ) -> None:
        """Write new tokens behind those of each request, in place, on new pages where the last one is full.

        Args:
            requests: n different requests.
            k: ``[n, Hkv, S, D]``, with the cache's dtype and device.
            v: ``[n, Hkv, S, Dv]``, likewise.
            counts: integers ``[n]``: of request ``i`` only the first ``counts[i]`` tokens are real, and the others are not
                stored. None if all S are.
            rotary: ``[R]`` frequencies, as from :func:`flashlib.rotary.rotary_frequencies`: the keys are turned by the
                positions that they get. None if they are turned already, or never.
            interleaved: which channels make a pair, as in :func:`flashlib.rotary.apply_rotary`.

        Raises:
            OutOfPagesError: the free pages do not suffice for all of it.
            TypeError: an argument has the wrong type or dtype.
            ValueError: a request is not there or comes twice; a shape, device or count does not fit; or a gradient would be
                lost.
            In each case nothing was written and no page was taken.
        """
        held = self._all_known(requests)
        if len(set(map(id, held))) < len(held):
            raise ValueError(f"requests must be different from one another; got {list(requests)}")
        check_new_tokens(k, v, len(held), self.key_pages, self.value_pages)
        new = checked_counts(counts, len(held), k.shape[2], "S")
        if rotary is not None:
            k = apply_rotary(k, self.next_positions(requests, k.shape[2]), rotary, interleaved=interleaved)
        starts = torch.tensor([request.length for request in held], dtype=torch.int64, device="cpu")
        self._reserve(held, new.tolist())
        self._write(held, k, v, starts, new)

    def _reserve(self, held: list[_Request], new: list[int]) -> None:
        """Make room for ``new[i]`` tokens in request i: all of it or, with an error, nothing."""
        growing = [(request, count) for request, count in zip(held, new, strict=True) if count]
        to_copy = self._shared_last_pages([request for request, _ in growing])
        wanted = [self._pages_for(request.length + count) - len(request.pages) for request, count in growing]
        fresh = iter(self._pool.take(sum(wanted) + len(to_copy)))
        for request in to_copy:
            self._replace_last_page(request, next(fresh))
        for (request, count), pages in zip(growing, wanted, strict=True):
            request.pages += islice(fresh, pages)
            request.length += count

    def _shared_last_pages(self, growing: list[_Request]) -> list[_Request]:
        """Those that must not write into their last page, since another request will still look at it."""
        leaving: Counter[int] = Counter()
        to_copy = []
        for request in growing:
            if request.length % self.page_size == 0:
                continue  # the next token begins a page of its own
            page = request.pages[-1]
            if self._pool.holders[page] - leaving[page] > 1:
                leaving[page] += 1
                to_copy.append(request)
        return to_copy

    def _replace_last_page(self, request: _Request, fresh: int) -> None:
        shared = request.pages[-1]
        self.key_pages[fresh] = self.key_pages[shared]
        self.value_pages[fresh] = self.value_pages[shared]
        request.pages[-1] = fresh
        self._pool.release([shared])

    def _write(self, held: list[_Request], k: Tensor, v: Tensor, starts: Tensor, new: Tensor) -> None:
        """Token t of row i goes to position ``starts[i] + t``: one indexed write, whatever the number of requests."""
        row = torch.arange(len(held), device="cpu").repeat_interleave(new)
        token = torch.arange(len(row), device="cpu") - (new.cumsum(0) - new)[row]
        position = starts[row] + token
        first_page = starts // self.page_size  # the pages before it are not written to, and there may be very many
        pages = [request.pages[first:] for request, first in zip(held, first_page.tolist(), strict=True)]
        listed = torch.tensor([len(of_row) for of_row in pages], dtype=torch.int64, device="cpu")
        begins = listed.cumsum(0) - listed
        page = torch.tensor(list(chain(*pages)), dtype=torch.int64, device="cpu")
        page = page[(begins - first_page)[row] + position // self.page_size]
        row, token, page, slot = self._on_device(torch.stack([row, token, page, position % self.page_size]))
        self.key_pages[page, :, slot] = k[row, :, token]
        self.value_pages[page, :, slot] = v[row, :, token]

    # What it costs

    @property
    def num_pages(self) -> int:
        return self.key_pages.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.key_pages.shape[2]

    @property
    def free_pages(self) -> int:
        """How many pages nobody holds."""
        return len(self._pool.free)

    @property
    def dtype(self) -> torch.dtype:
        return self.key_pages.dtype

    @property
    def device(self) -> torch.device:
        return self.key_pages.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this layer: ``Hkv * (D + Dv) * bytes per number``."""
        _, kv_heads, _, head_dim = self.key_pages.shape
        return kv_heads * (head_dim + self.value_pages.shape[3]) * self.key_pages.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes reserved: ``num_pages * page_size * bytes_per_token``."""
        return self.num_pages * self.page_size * self.bytes_per_token

    @property
    def nbytes_held(self) -> int:
        """Bytes of the pages that some request holds, a shared page counted once. The rest is there for whoever comes."""
        return (self.num_pages - self.free_pages) * self.page_size * self.bytes_per_token

    def _insert(self, request: _Request) -> int:
        number = self._next_request
        self._requests[number] = request
        self._next_request += 1
        return number

    def _known(self, request: int) -> _Request:
        try:
            request = operator.index(request)
        except TypeError:
            raise TypeError(f"a request is the int that add() gave; got {request!r}") from None
        if request not in self._requests:
            raise ValueError(f"there is no request {request}: it was freed, or never added; there are {self.requests}")
        return self._requests[request]

    def _all_known(self, requests: Sequence[int]) -> list[_Request]:
        if not isinstance(requests, (Sequence, Tensor)):
            raise TypeError(f"requests must be a sequence of requests; got {requests!r}")
        return [self._known(request) for request in requests]

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _on_device(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)  # from pageable memory the host would wait for the GPU


@dataclass
class _Request:
    """``pages[i]`` holds the tokens ``i * page_size`` and up, of the ``length`` tokens of the request."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class _PagePool:
    """Which pages are free, and how many requests hold each of the others."""

    def __init__(self, num_pages: int) -> None:
        self.holders = [0] * num_pages
        self.free = list(range(num_pages))[::-1]

    def take(self, count: int) -> list[int]:
        """``count`` free pages, with one holder each from now on. All of them or, with an error, none."""
        if count > len(self.free):
            raise OutOfPagesError(
                f"the cache is out of pages: {count} more are needed, and {len(self.free)} of {len(self.holders)} are free"
            )
        taken = [self.free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):  # so that the first is taken again first
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)
