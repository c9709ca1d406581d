"""dK and dV of the parts that a group's query heads were cut into, added up."""

import triton
import triton.language as tl

from flashlib.kernels.common import store_tile


@triton.jit(do_not_specialize=["kv_heads", "parts", "kv_len"])
def hopper_sum_parts(
    p_dk_parts, p_dv_parts, p_dk, p_dv, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    kv_heads, parts, kv_len, head_dim, v_head_dim, PADDED: tl.constexpr, CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up ``BLOCK_N`` keys of one KV head, always in the same order.

    Of fp32 ``[B, KV heads, parts, key blocks * PADDED, BLOCK_D]`` and the same with ``BLOCK_DV``, whose key blocks have ``PADDED`` keys each.
    """
    key_blocks = tl.cdiv(kv_len, BLOCK_N)
    i_head, i_n = tl.program_id(0) // key_blocks, tl.program_id(0) % key_blocks
    i_b, i_kv = (i_head // kv_heads).to(tl.int64), (i_head % kv_heads).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    padded_keys = tl.cdiv(kv_len, PADDED) * PADDED
    first = i_head.to(tl.int64) * parts * padded_keys
    b_dk = sum_parts(p_dk_parts + first * BLOCK_D, o_n, parts, padded_keys, BLOCK_D)
    b_dv = sum_parts(p_dv_parts + first * BLOCK_DV, o_n, parts, padded_keys, BLOCK_DV)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    store_tile(p_dk + i_b * stride_dkb + i_kv * stride_dkh, b_dk, o_n, o_d, stride_dks, kv_len, head_dim, CHECK_D)
    store_tile(p_dv + i_b * stride_dvb + i_kv * stride_dvh, b_dv, o_n, o_dv, stride_dvs, kv_len, v_head_dim, CHECK_DV)


@triton.jit
def sum_parts(p_first, o_n, parts, padded_keys, WIDTH: tl.constexpr):
    """The sum of the same keys of all parts, from the first to the last."""
    p_part = p_first + o_n.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    b_sum = tl.load(p_part)
    for _ in range(1, parts):
        p_part += tl.cast(padded_keys, tl.int64) * WIDTH
        b_sum += tl.load(p_part)
    return b_sum
