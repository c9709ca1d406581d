"""All bookkeeping in tensors: one table for all requests, one column of counts; attention by numbered slots."""

import torch
from torch import Tensor


class OutOfPages(Exception):
    pass


class PagedKVCache:
    def __init__(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> None:
        self.page_size = page_size
        self.key_pages = torch.zeros(num_pages, kv_heads, page_size, head_dim)
        self.value_pages = torch.zeros(num_pages, kv_heads, page_size, head_dim)
        self.users = torch.zeros(num_pages, dtype=torch.long)
        self.table = torch.empty(0, num_pages, dtype=torch.int32)
        self.tokens = torch.empty(0, dtype=torch.long)

    @property
    def free_pages(self) -> int:
        return int((self.users == 0).sum())

    def _pages(self, tokens):
        return (tokens + self.page_size - 1) // self.page_size

    def add(self) -> int:
        self.table = torch.cat([self.table, torch.full((1, len(self.users)), -1, dtype=torch.int32)])
        self.tokens = torch.cat([self.tokens, torch.zeros(1, dtype=torch.long)])
        return len(self.tokens) - 1

    def length(self, request: int) -> int:
        return int(self.tokens[request])

    def block_table(self, requests: list[int]) -> Tensor:
        return self.table[requests, : int(self._pages(self.tokens[requests]).max())]

    def append(self, request: int, k: Tensor, v: Tensor) -> None:
        begin = self.length(request)
        end = begin + k.shape[1]
        had, needs = self._pages(begin), self._pages(end)
        last = int(self.table[request, had - 1]) if begin % self.page_size else -1
        shared = last >= 0 and int(self.users[last]) > 1
        first = had - 1 if shared else had
        free = (self.users == 0).nonzero().flatten()[: needs - first]
        if len(free) < needs - first:
            raise OutOfPages(f"{needs - first} pages, please")
        if shared:
            self.key_pages[free[0]], self.value_pages[free[0]] = self.key_pages[last], self.value_pages[last]
            self.users[last] -= 1
        self.users[free] = 1
        self.table[request, first:needs] = free.int()
        for position in range(begin, end):
            page = int(self.table[request, position // self.page_size])
            self.key_pages[page, :, position % self.page_size] = k[:, position - begin]
            self.value_pages[page, :, position % self.page_size] = v[:, position - begin]
        self.tokens[request] = end

    def fork(self, request: int) -> int:
        child = self.add()
        self.table[child], self.tokens[child] = self.table[request], self.tokens[request]
        self.users[self._row(child)] += 1
        return child

    def free(self, request: int) -> None:
        self.users[self._row(request)] -= 1
        self.table[request] = -1
        self.tokens[request] = 0

    def _row(self, request):
        return self.table[request, : self._pages(self.length(request))].long()


def paged_attention(q: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    heads, size, dim = key_pages.shape[1:]
    group = q.shape[1] // heads
    outs = []
    for query, row, length in zip(q, block_table.long(), lengths.tolist(), strict=True):
        position = torch.arange(length)
        page, slot = row[position // size], position % size
        keys, values = key_pages[page, :, slot], value_pages[page, :, slot]  # [length, Hkv, D]
        scores = torch.einsum("hgd,lhd->hgl", query.reshape(heads, group, dim), keys) * dim**-0.5
        outs.append(torch.einsum("hgl,lhd->hgd", scores.softmax(-1), values).reshape(-1, dim))
    return torch.stack(outs)
