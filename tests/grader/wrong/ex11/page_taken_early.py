# diagnosis: page-too-many, out-too-early, fork-copies
import math

import torch
from torch import Tensor


class OutOfPages(Exception):
    pass


class PagedKVCache:
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
        return len(self._free)

    def add(self) -> int:
        self._next_request += 1
        self._pages[self._next_request] = []
        self._lengths[self._next_request] = 0
        return self._next_request

    def length(self, request: int) -> int:
        return self._lengths[request]

    def block_table(self, requests: list[int]) -> Tensor:
        width = max(len(self._pages[request]) for request in requests)
        rows = [self._pages[request] + [-1] * (width - len(self._pages[request])) for request in requests]
        return torch.tensor(rows, dtype=torch.int32)

    def append(self, request: int, k: Tensor, v: Tensor) -> None:
        pages, length, count = self._pages[request], self._lengths[request], k.shape[1]
        begins_inside = length % self.page_size != 0
        copies = begins_inside and self._holders[pages[-1]] > 1
        wanted = (length + count) // self.page_size + 1 - len(pages)
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
        child = self.add()
        self._pages[child] = list(self._pages[request])
        self._lengths[child] = self._lengths[request]
        for page in self._pages[child]:
            self._holders[page] += 1
        return child

    def free(self, request: int) -> None:
        for page in self._pages.pop(request):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
        del self._lengths[request]


def paged_attention(q: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    kv_heads, page_size, head_dim = key_pages.shape[1:]
    out = torch.empty_like(q)
    for i, length in enumerate(lengths.tolist()):
        pages = block_table[i, : -(-length // page_size)]
        keys, values = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length] for x in (key_pages, value_pages))
        rows = q[i].unflatten(0, (kv_heads, -1))  # [Hkv, G, D]
        weights = torch.softmax(rows @ keys.mT / math.sqrt(head_dim), dim=-1)
        out[i] = (weights @ values).flatten(0, 1)
    return out
