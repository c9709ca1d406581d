# diagnosis: mutated-input
"""Masks as intervals, and the tiles that need not be visited.

A causal mask, a sliding window and a padded batch have one thing in common: each query sees one run of keys, from `start`
up to but not including `stop`. Two integers per row then say what a matrix of Sq x Sk booleans says, and they say of a whole
tile whether it holds anything to compute. A tile with nothing visible is never read.
"""

import math

import torch
from torch import Tensor


def intervals(
    q_len: int, kv_len: int, left: int | None = None, right: int | None = None, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The keys that each query sees: row i of sequence b sees the keys j with ``start[b, i] <= j < stop[b, i]``.

    The queries are the last `q_len` positions of a sequence of `kv_len`: query i stands at position ``i + kv_len - q_len``,
    so the last query stands at the last key. There may be more queries than keys; the first ones then stand at negative
    positions.

    Args:
        q_len, kv_len: Sq and Sk, each at least 1.
        left: a query at position p sees no key before ``p - left``; None: no limit. At least 0.
        right: a query at position p sees no key after ``p + right``; None: no limit. At least 0; causal is ``right=0``.
        key_lengths: int64 ``[B]``: sequence b has only its first ``key_lengths[b]`` keys, and the rest is padding that
            nobody sees. It does not move the queries. None: all keys are real, and one sequence stands for all of them.

    Returns:
        start and stop, each int64 ``[B, q_len]`` (``[1, q_len]`` without key_lengths), with 0 <= start <= stop <= kv_len. A
        row that sees nothing has start = stop = 0.
    """
    position = torch.arange(q_len) + kv_len - q_len
    start = torch.zeros(q_len, dtype=torch.int64) if left is None else position - left
    stop = torch.full((q_len,), kv_len) if right is None else position + right + 1
    lengths = torch.tensor([kv_len]) if key_lengths is None else key_lengths
    start = start.clamp(min=0).expand(len(lengths), q_len)
    stop = torch.minimum(stop, lengths[:, None])
    sees_something = start < stop
    return torch.where(sees_something, start, 0), torch.where(sees_something, stop, 0)


def tile_map(start: Tensor, stop: Tensor, kv_len: int, block_q: int, block_k: int) -> Tensor:
    """What the mask leaves of each tile of block_q rows x block_k keys.

    0: no pair of a row and a key is visible, the tile can be skipped. 2: all are, the tile needs no mask. 1: some are.
    The last tile of a row or a column holds fewer rows or keys if the block does not divide the length: only rows and
    keys that exist count.

    Args:
        start, stop: int64 ``[B, Sq]``, 0 <= start <= stop <= kv_len: the keys that each row sees. *Any* intervals, not only
            those that `intervals` makes: neighboring rows need have nothing in common, and a row may see nothing
            (start = stop, at any key). Do not change them.
        kv_len: Sk, at least 1.
        block_q, block_k: at least 1.

    Returns:
        int8 ``[B, ceil(Sq / block_q), ceil(Sk / block_k)]``. The matrix of Sq x Sk booleans is never made.
    """
    empty = start == stop
    start[empty] = 0
    stop[empty] = 0
    first = torch.arange(0, kv_len, block_k)
    last = (first + block_k).clamp(max=kv_len)
    kinds = []
    for rows_start, rows_stop in zip(start.split(block_q, dim=1), stop.split(block_q, dim=1), strict=True):
        overlap = torch.minimum(rows_stop[..., None], last) - torch.maximum(rows_start[..., None], first)
        seen = overlap.clamp(min=0)  # [B, rows, tiles]: keys of each tile that each row sees
        kind = 1 + (seen == last - first).all(1).to(torch.int8) - (seen == 0).all(1).to(torch.int8)
        kinds.append(kind)
    return torch.stack(kinds, dim=1)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(D)) V over the visible keys only, tile by tile, without the tiles that hold nothing visible.

    Args:
        q: ``[B, H, Sq, D]``, float32, like k and v.
        k: ``[B, H, Sk, D]``.
        v: ``[B, H, Sk, Dv]``. Keys and values that no row of their sequence sees may hold anything, even NaN. Do not change
            any of the three.
        start, stop: int64 ``[B, Sq]`` or ``[1, Sq]`` (the same for all sequences), as `tile_map` takes them.
        block_q, block_k: rows and keys of a tile, at least 1. They change the rounding and nothing else.

    Returns:
        out float32 ``[B, H, Sq, Dv]`` and lse float32 ``[B, H, Sq]``, the natural logarithm of the sum of exp(score) over
        the visible keys. A row that sees no key has out 0 and lse -inf. A tile of K or V is read only if some row of its
        block, in some sequence, sees a key of it, and nothing as large as the matrix of scores is made.
    """
    kinds = tile_map(start, stop, k.shape[2], block_q, block_k)
    needed, full = (kinds != 0).any(0), (kinds == 2).all(0)  # over the sequences, which share each load of a tile
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    for i in range(needed.shape[0]):
        rows = slice(i * block_q, (i + 1) * block_q)
        q_tile = q[:, :, rows] / math.sqrt(q.shape[3])
        m = q.new_full(q_tile.shape[:3], -torch.inf)
        l, acc = torch.zeros_like(m), q.new_zeros(*m.shape, v.shape[3])
        for j in needed[i].nonzero().flatten().tolist():
            keys = slice(j * block_k, (j + 1) * block_k)
            scores, v_tile = q_tile @ k[:, :, keys].mT, v[:, :, keys]
            if not full[i, j]:
                key = keys.start + torch.arange(v_tile.shape[2])
                visible = (key >= start[:, rows, None]) & (key < stop[:, rows, None])  # [B or 1, rows, keys]
                scores = scores.masked_fill(~visible[:, None], -torch.inf)
                # A weight of 0 does not hide a NaN: 0 * NaN is NaN.
                v_tile = v_tile.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
            m_new = torch.maximum(m, scores.amax(-1))
            pivot = m_new.masked_fill(m_new == -torch.inf, 0.0)
            weights, rescale = torch.exp(scores - pivot[..., None]), torch.exp(m - pivot)
            m, l, acc = m_new, l * rescale + weights.sum(-1), acc * rescale[..., None] + weights @ v_tile
        out[:, :, rows] = acc / l.masked_fill(l == 0, 1.0)[..., None]
        lse[:, :, rows] = m + l.log()
    return out, lse
