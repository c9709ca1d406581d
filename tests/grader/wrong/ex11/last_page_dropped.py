# diagnosis: last-page-dropped
"""A paged KV cache: memory for the tokens that are there, instead of the longest text that might come.

The memory is cut into pages of a few tokens each. A request owns a list of pages, in any order, and takes one more when its last
page is full: token t lies in its page number ``t // page_size``, at slot ``t % page_size``. Whoever wants to read a request
needs its list of pages, the block table.

What happens with the numbers is simple here. What happens with the pages is bookkeeping, and most servers have had a bug in it.
"""

import math

import torch
from torch import Tensor


class OutOfPages(Exception):
    """An append needs more pages than are free."""


class PagedKVCache:
    """The keys and values of many requests, for one layer, in pages that they share out among them.

    Args:
        num_pages, page_size, kv_heads, head_dim: the sizes P, T, Hkv and D, each at least 1.

    Attributes:
        key_pages, value_pages: float32 ``[P, Hkv, T, D]``, reserved once and written in place. Slots that hold no token hold
            whatever was there before.
    """

    def __init__(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> None:
        self.page_size = page_size
        self.key_pages = torch.empty(num_pages, kv_heads, page_size, head_dim)
        self.value_pages = torch.empty(num_pages, kv_heads, page_size, head_dim)
        self._free = list(range(num_pages))
        self._holders = [0] * num_pages
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next_request = 0

    @property
    def free_pages(self) -> int:
        """How many pages no request holds."""
        return len(self._free)

    def add(self) -> int:
        """A new request without tokens or pages. Returns a number for it that no other request has."""
        self._next_request += 1
        self._pages[self._next_request] = []
        self._lengths[self._next_request] = 0
        return self._next_request

    def length(self, request: int) -> int:
        """How many tokens the request holds."""
        return self._lengths[request]

    def block_table(self, requests: list[int]) -> Tensor:
        """The pages of each request, in the order of its tokens.

        Returns:
            int32 ``[len(requests), M]``, M being the largest number of pages that one of them has. Behind the last page of a
            request comes -1.
        """
        width = max(len(self._pages[request]) for request in requests)
        rows = [self._pages[request] + [-1] * (width - len(self._pages[request])) for request in requests]
        return torch.tensor(rows, dtype=torch.int32)

    def append(self, request: int, k: Tensor, v: Tensor) -> None:
        """Put n more tokens behind those that the request holds, on free pages where its last page does not suffice.

        A request of L tokens holds exactly ceil(L / page_size) pages. A page that another request holds too is not written to:
        if the new tokens begin in such a page, the request first gets a copy of its own instead. No other page is copied.

        Args:
            k, v: float32 ``[Hkv, n, D]``, n >= 1.

        Raises:
            OutOfPages: there are not enough free pages for all n tokens. Everything is then as it was before.
        """
        pages, length, count = self._pages[request], self._lengths[request], k.shape[1]
        begins_inside = length % self.page_size != 0
        copies = begins_inside and self._holders[pages[-1]] > 1
        wanted = -(-(length + count) // self.page_size) - len(pages)
        if wanted + copies > len(self._free):
            raise OutOfPages(f"{wanted + copies} pages are needed and {len(self._free)} are free")
        fresh = [self._free.pop() for _ in range(wanted + copies)]
        for page in fresh:
            self._holders[page] = 1
        if copies:
            shared = pages.pop()
            self.key_pages[fresh[0]] = self.key_pages[shared]
            self.value_pages[fresh[0]] = self.value_pages[shared]
            self._holders[shared] -= 1  # not to 0: somebody else has it
        pages.extend(fresh)
        position = length + torch.arange(count)
        page, slot = torch.tensor(pages)[position // self.page_size], position % self.page_size
        self.key_pages[page, :, slot] = k.transpose(0, 1)
        self.value_pages[page, :, slot] = v.transpose(0, 1)
        self._lengths[request] = length + count

    def fork(self, request: int) -> int:
        """A new request that begins with all tokens of `request`. It holds the same pages, and nothing is copied yet.

        From now on each goes its own way: what is appended to one of them does not change the other.
        """
        child = self.add()
        self._pages[child] = list(self._pages[request])
        self._lengths[child] = self._lengths[request]
        for page in self._pages[child]:
            self._holders[page] += 1
        return child

    def free(self, request: int) -> None:
        """Forget a request. Those of its pages that no other request holds can be used again."""
        for page in self._pages.pop(request):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
        del self._lengths[request]


def paged_attention(q: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """One new token of each request attends to all tokens that the request holds, its own included: softmax(q K^T / sqrt(D)) V.

    The requests may be very different in length. What is in memory for one of them has no influence on another, and what lies
    in slots that hold no token of a request has none on its output, whatever it is.

    Args:
        q: ``[n, Hq, D]``, Hq a multiple of Hkv: the query heads 0 .. G - 1 look at KV head 0, the next G at KV head 1, and so on.
        key_pages, value_pages: ``[P, Hkv, T, D]``. All float32.
        block_table: int32 ``[n, M]``. What stands behind a request's last page is not to be used.
        lengths: int32 ``[n]``, at least 1. Change none of the five.

    Returns:
        float32 ``[n, Hq, D]``. No tensor is made that pads all requests to the length of the longest.
    """
    kv_heads, page_size, head_dim = key_pages.shape[1:]
    out = torch.empty_like(q)
    for i, length in enumerate(lengths.tolist()):
        pages, length = block_table[i, : (length - 1) // page_size], (length - 1) // page_size * page_size
        keys, values = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length] for x in (key_pages, value_pages))
        rows = q[i].unflatten(0, (kv_heads, -1))  # [Hkv, G, D]
        weights = torch.softmax(rows @ keys.mT / math.sqrt(head_dim), dim=-1)
        out[i] = (weights @ values).flatten(0, 1)
    return out
