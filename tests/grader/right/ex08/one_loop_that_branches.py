import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, queries, keys, back, ahead, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """No limit is a limit beyond everything, and one loop asks of each tile whether it must be masked."""
    head, block = tl.program_id(0), tl.program_id(1)
    rows, dims = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    at = rows + keys - queries
    highest = tl.minimum(block * ROWS + ROWS, queries) - 1 + keys - queries
    lowest = block * ROWS + keys - queries
    real = (rows < queries)[:, None]
    q = tl.load(q_ptr + (head * queries + rows)[:, None] * DIM + dims[None, :], mask=real, other=0.0) * scale
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    masked, whole = 0, 0
    for tile in range(
        tl.maximum(lowest - back, 0) // COLS, tl.cdiv(tl.maximum(tl.minimum(highest + ahead + 1, keys), 0), COLS)
    ):
        cols = tile * COLS + tl.arange(0, COLS)
        where = (head * keys + cols)[:, None] * DIM + dims[None, :]
        k = tl.load(k_ptr + where, mask=(cols < keys)[:, None], other=0.0)
        v = tl.load(v_ptr + where, mask=(cols < keys)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        first, last = tile * COLS, tile * COLS + COLS - 1
        if (first >= highest - back) & (last <= lowest + ahead) & (last < keys):
            whole += 1
        else:
            masked += 1
            distance = cols[None, :] - at[:, None]
            s = tl.where((distance >= -back) & (distance <= ahead) & (cols < keys)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.maximum(m_new, -1.0e30)
        p = tl.exp(s - safe[:, None])
        shrink = tl.exp(m - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p, v, input_precision="ieee")
        m = m_new
    empty = total == 0.0
    out = tl.where(empty[:, None], 0.0, acc / (total + empty.to(tl.float32))[:, None])
    tl.store(out_ptr + (head * queries + rows)[:, None] * DIM + dims[None, :], out, mask=real)
    lse = tl.where(empty, float("-inf"), m + tl.log(total + empty.to(tl.float32)))
    tl.store(lse_ptr + head * queries + rows, lse, mask=rows < queries)
    place = counts_ptr + (head * tl.num_programs(1) + block) * 2
    tl.store(place, masked)
    tl.store(place + 1, whole)


def run(q, k, v, left, right, block_m, block_n):
    batch, heads, queries, dim = q.shape
    keys, blocks = k.shape[2], triton.cdiv(queries, block_m)
    everything = queries + keys
    out, lse = torch.empty(batch, heads, queries, dim), torch.empty(batch, heads, queries)
    counts = torch.empty(batch, heads, blocks, 2, dtype=torch.int32)
    back = everything if left is None else left
    ahead = everything if right is None else right
    kernel[(batch * heads, blocks)](
        q, k, v, out, lse, counts, queries, keys, back, ahead, dim**-0.5, ROWS=block_m, COLS=block_n, DIM=dim
    )
    return out, lse, counts


def masked_attention(q, k, v, left=None, right=None, block_m=32, block_n=32):
    return run(q, k, v, left, right, block_m, block_n)[:2]


def count_tiles(q, k, v, left=None, right=None, block_m=32, block_n=32):
    return run(q, k, v, left, right, block_m, block_n)[2]
