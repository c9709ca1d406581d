import torch
import triton
import triton.language as tl


@triton.jit
def by_intervals(
    Q, K, V, Out, Lse, Starts, Stops, Kinds, Counts, Sq, Sk, tiles, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Rows carry their interval, and a table says what to do with each tile. From the last tile to the first."""
    i, h = tl.program_id(0), tl.program_id(1)
    row, d = i * BM + tl.arange(0, BM), tl.arange(0, D)
    exists = row < Sq
    start = tl.load(Starts + row, mask=exists, other=0)
    stop = tl.load(Stops + row, mask=exists, other=0)
    q = tl.load(Q + (h * Sq + row[:, None]) * D + d[None, :], mask=exists[:, None], other=0.0)
    lse = tl.full([BM], float("-inf"), tl.float32)
    out = tl.zeros([BM, D], tl.float32)
    n_masked, n_whole = 0, 0
    for back in range(0, tiles):
        tile = tiles - 1 - back
        kind = tl.load(Kinds + i * tiles + tile)
        if kind > 0:
            col = tile * BN + tl.arange(0, BN)
            k = tl.load(K + (h * Sk + col[None, :]) * D + d[:, None], mask=col[None, :] < Sk, other=0.0)
            v = tl.load(V + (h * Sk + col[:, None]) * D + d[None, :], mask=col[:, None] < Sk, other=0.0)
            s = scale * tl.dot(q, k, input_precision="ieee")
            if kind == 1:
                s = tl.where((col[None, :] >= start[:, None]) & (col[None, :] < stop[:, None]), s, float("-inf"))
                n_masked += 1
            else:
                n_whole += 1
            top = tl.maximum(tl.max(s, 1), lse)
            top = tl.where(top == float("-inf"), 0.0, top)
            weights = tl.exp(s - top[:, None])
            kept = tl.exp(lse - top)
            total = kept + tl.sum(weights, 1)
            divisor = tl.where(total > 0.0, total, 1.0)
            out = (out * kept[:, None] + tl.dot(weights, v, input_precision="ieee")) / divisor[:, None]
            lse = tl.where(total > 0.0, top + tl.log(divisor), float("-inf"))
    tl.store(Out + (h * Sq + row[:, None]) * D + d[None, :], out, mask=exists[:, None])
    tl.store(Lse + h * Sq + row, lse, mask=exists)
    tl.store(
        Counts + (h * tl.num_programs(0) + i) * 2 + tl.arange(0, 2), tl.where(tl.arange(0, 2) == 0, n_masked, n_whole)
    )


def _table(start, stop, keys, block_m, block_n):
    rows = []
    for a, b in zip(start.split(block_m), stop.split(block_m), strict=True):
        line = []
        for first in range(0, keys, block_n):
            inside = (b.clamp(max=first + block_n) - a.clamp(min=first)).clamp(min=0)
            line.append(2 if (inside == block_n).all() else int(inside.any()))
        rows.append(line)
    return torch.tensor(rows, dtype=torch.int32)


def _launch(q, k, v, left, right, block_m, block_n):
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    at = torch.arange(queries) + keys - queries
    start = torch.zeros_like(at) if left is None else (at - left).clamp(0, keys)
    stop = torch.full_like(at, keys) if right is None else (at + right + 1).clamp(0, keys)
    kinds = _table(start, stop, keys, block_m, block_n)
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:3])
    counts = torch.zeros(batch, heads, len(kinds), 2, dtype=torch.int32)
    by_intervals[(len(kinds), batch * heads)](
        q,
        k,
        v,
        out,
        lse,
        start,
        stop,
        kinds,
        counts,
        queries,
        keys,
        kinds.shape[1],
        dim**-0.5,
        BM=block_m,
        BN=block_n,
        D=dim,
    )
    return out, lse, counts


def masked_attention(q, k, v, left=None, right=None, block_m=32, block_n=32):
    return _launch(q, k, v, left, right, block_m, block_n)[:2]


def count_tiles(q, k, v, left=None, right=None, block_m=32, block_n=32):
    return _launch(q, k, v, left, right, block_m, block_n)[2]
