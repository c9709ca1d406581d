"""What must hold of the values that a decoding step reads, where somebody looks at them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_decoding", "no_such_page"]


def check_decoding(q: Tensor, k: Tensor, lengths: Tensor | None, block_table: Tensor | None, left: int | None) -> None:
    """Read lengths and page numbers, and refuse those that cannot be. On a GPU this waits for it."""
    batch, q_len = q.shape[0], q.shape[2]
    capacity = k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
    full = torch.full((batch,), capacity, device="cpu")
    lengths = full if lengths is None else lengths.cpu().long()
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must lie between 0 and the capacity, {capacity}; got {lengths.tolist()}")
    if block_table is None or q_len == 0:
        return
    num_pages, _, page_size, _ = k.shape
    table, begin = block_table.cpu(), torch.arange(block_table.shape[1], device="cpu") * page_size
    first = 0 if left is None else (lengths - q_len - left)[:, None]
    wrong = (begin < lengths[:, None]) & (begin + page_size > first) & ((table < 0) | (table >= num_pages))
    if wrong.any():
        request, entry = wrong.nonzero()[0].tolist()
        raise no_such_page(request, entry, int(table[request, entry]), num_pages)


def no_such_page(request: int, entry: int, page: int, num_pages: int) -> ValueError:
    """What is wrong with ``block_table[request, entry]``."""
    return ValueError(
        f"block_table[{request}, {entry}] is page {page}, but there are {num_pages} pages, numbered from 0"
    )
