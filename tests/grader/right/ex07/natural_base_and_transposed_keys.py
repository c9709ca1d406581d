import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, qb, qh, qs, qd, kb, kh, ks, kd, vb, vh, vs, vd,
    heads, group, queries, keys, dim, scale, ROWS: tl.constexpr, COLS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """exp instead of exp2, K loaded already transposed, the scale on q, and the programs of a head one after the other."""
    head, batch, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = block * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    q_mask = (rows[:, None] < queries) & (dims[None, :] < dim)
    q = tl.load(q_ptr + batch * qb + head * qh + rows[:, None] * qs + dims[None, :] * qd, mask=q_mask, other=0.0)
    largest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, DIMS), dtype=tl.float32)
    for tile in range(tl.cdiv(keys, COLS)):
        cols = tile * COLS + tl.arange(0, COLS)
        k_at = k_ptr + batch * kb + (head // group) * kh + cols[None, :] * ks + dims[:, None] * kd
        k = tl.load(k_at, mask=(cols[None, :] < keys) & (dims[:, None] < dim), other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores += tl.where(cols[None, :] < keys, 0.0, -float("inf"))
        tile_largest = tl.max(scores, axis=1)
        now = tl.where(tile_largest > largest, tile_largest, largest)
        weights = tl.exp(scores - now[:, None])
        shrink = tl.exp(largest - now)
        total = shrink * total + tl.sum(weights, axis=1)
        v_at = v_ptr + batch * vb + (head // group) * vh + cols[:, None] * vs + dims[None, :] * vd
        v = tl.load(v_at, mask=(cols[:, None] < keys) & (dims[None, :] < dim), other=0.0)
        mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * shrink[:, None], input_precision="ieee")
        largest = now
    row = (batch * heads + head) * queries + rows
    tl.store(out_ptr + row[:, None] * dim + dims[None, :], mixed * (1 / total)[:, None], mask=q_mask)
    tl.store(lse_ptr + row, largest + tl.log(total), mask=rows < queries)


def attention_forward(q, k, v, scale=None, block_m=64, block_n=32):
    batch, heads, queries, dim = q.shape
    out = torch.empty((batch, heads, queries, dim), dtype=q.dtype)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32)
    kernel[(heads, batch, triton.cdiv(queries, block_m))](
        q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), heads, heads // k.shape[1], queries, k.shape[2], dim,
        dim**-0.5 if scale is None else scale, ROWS=block_m, COLS=block_n, DIMS=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out, lse
