# Exercise 11: A paged KV cache
# difficulty 4/5 · importance 4/5 · about 75 minutes
# Chapter: notebooks/13_paged_caches.ipynb
#
# Check your work with `flashlib grade ex11`, or in a notebook with `check("ex11")`.

"""A paged KV cache: memory for the tokens that are there, instead of the longest text that might come.

The memory is cut into pages of a few tokens each. A request owns a list of pages, in any order, and takes one more when its last
page is full: token t lies in its page number ``t // page_size``, at slot ``t % page_size``. Whoever wants to read a request
needs its list of pages, the block table.

What happens with the numbers is simple here. What happens with the pages is bookkeeping, and most servers have had a bug in it.
"""

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
        raise NotImplementedError("write __init__ here")

    @property
    def free_pages(self) -> int:
        """How many pages no request holds."""
        raise NotImplementedError("write free_pages here")

    def add(self) -> int:
        """A new request without tokens or pages. Returns a number for it that no other request has."""
        raise NotImplementedError("write add here")

    def length(self, request: int) -> int:
        """How many tokens the request holds."""
        raise NotImplementedError("write length here")

    def block_table(self, requests: list[int]) -> Tensor:
        """The pages of each request, in the order of its tokens.

        Returns:
            int32 ``[len(requests), M]``, M being the largest number of pages that one of them has. Behind the last page of a
            request comes -1.
        """
        raise NotImplementedError("write block_table here")

    def append(self, request: int, k: Tensor, v: Tensor) -> None:
        """Put n more tokens behind those that the request holds, on free pages where its last page does not suffice.

        A request of L tokens holds exactly ceil(L / page_size) pages. A page that another request holds too is not written to:
        if the new tokens begin in such a page, the request first gets a copy of its own instead. No other page is copied.

        Args:
            k, v: float32 ``[Hkv, n, D]``, n >= 1.

        Raises:
            OutOfPages: there are not enough free pages for all n tokens. Everything is then as it was before.
        """
        raise NotImplementedError("write append here")

    def fork(self, request: int) -> int:
        """A new request that begins with all tokens of `request`. It holds the same pages, and nothing is copied yet.

        From now on each goes its own way: what is appended to one of them does not change the other.
        """
        raise NotImplementedError("write fork here")

    def free(self, request: int) -> None:
        """Forget a request. Those of its pages that no other request holds can be used again."""
        raise NotImplementedError("write free here")


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
    raise NotImplementedError("write paged_attention here")
