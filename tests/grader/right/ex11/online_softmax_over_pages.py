"""Pages in a queue and holders in a Counter, tokens appended one at a time; attention page by page, with a running maximum."""

import math
from collections import Counter, deque
from itertools import count as counting

import torch
from torch import Tensor


class OutOfPages(Exception):
    pass


class PagedKVCache:
    def __init__(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int) -> None:
        self.page_size = page_size
        self.key_pages = torch.empty(num_pages, kv_heads, page_size, head_dim)
        self.value_pages = torch.empty(num_pages, kv_heads, page_size, head_dim)
        self.unused = deque(range(num_pages))
        self.holders = Counter()
        self.numbers = counting()
        self.texts = {}

    @property
    def free_pages(self) -> int:
        return len(self.unused)

    def add(self) -> int:
        number = next(self.numbers)
        self.texts[number] = [[], 0]
        return number

    def length(self, request: int) -> int:
        return self.texts[request][1]

    def block_table(self, requests: list[int]) -> Tensor:
        rows = [torch.tensor(self.texts[request][0], dtype=torch.int32) for request in requests]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def append(self, request: int, k: Tensor, v: Tensor) -> None:
        if self._cost(request, k.shape[1]) > len(self.unused):
            raise OutOfPages("too few pages are free")
        for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
            self._append_one(request, key, value)

    def _cost(self, request, tokens):
        pages, length = self.texts[request]
        room = len(pages) * self.page_size - length
        copy = 1 if room and self.holders[pages[-1]] > 1 else 0
        return copy + max(0, math.ceil((tokens - room) / self.page_size))

    def _append_one(self, request, key, value):
        pages, length = self.texts[request]
        slot = length % self.page_size
        if slot == 0:
            pages.append(self._take())
        elif self.holders[pages[-1]] > 1:
            fresh, old = self._take(), pages[-1]
            for memory in (self.key_pages, self.value_pages):
                memory[fresh, :, :slot] = memory[old, :, :slot]
            self._leave(old)
            pages[-1] = fresh
        self.key_pages[pages[-1], :, slot] = key
        self.value_pages[pages[-1], :, slot] = value
        self.texts[request][1] += 1

    def _take(self):
        page = self.unused.popleft()
        self.holders[page] = 1
        return page

    def _leave(self, page):
        self.holders[page] -= 1
        if not self.holders[page]:
            self.unused.append(page)

    def fork(self, request: int) -> int:
        pages, length = self.texts[request]
        child = self.add()
        self.texts[child] = [pages[:], length]
        self.holders.update(pages)
        return child

    def free(self, request: int) -> None:
        pages, _ = self.texts.pop(request)
        for page in pages:
            self._leave(page)


def paged_attention(q: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    n, q_heads, dim = q.shape
    kv_heads, page_size = key_pages.shape[1], key_pages.shape[2]
    out = torch.zeros(n, q_heads, dim)
    for i in range(n):
        rows = q[i].reshape(kv_heads, q_heads // kv_heads, dim) / math.sqrt(dim)
        top = torch.full((*rows.shape[:2], 1), -torch.inf)
        total = torch.zeros_like(top)
        acc = torch.zeros_like(rows)
        for begin in range(0, int(lengths[i]), page_size):
            page = int(block_table[i, begin // page_size])
            tokens = min(page_size, int(lengths[i]) - begin)
            scores = rows @ key_pages[page, :, :tokens].transpose(1, 2)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - new_top)
            shrink = torch.exp(top - new_top)
            total = total * shrink + weights.sum(-1, keepdim=True)
            acc = acc * shrink + weights @ value_pages[page, :, :tokens]
            top = new_top
        out[i] = (acc / total).reshape(q_heads, dim)
    return out
