"""dQ for Hopper GPUs, warp-specialised, in Gluon (Dao 2023, arXiv 2307.08691, algorithm 2; Shah et al. 2024, arXiv 2407.08608).

A program owns 64 rows per consumer; their Q and dO stay in shared memory, their dQ in registers, and the keys pass by as in the
forward, from the last tile to the first. While the tensor cores form dP of one tile and dS K of the tile before it, P is computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashlib.kernels.common import BAND, INTERVALS, LN_2, LOG2_E
from flashlib.kernels.hopper import ROWS, key_tiles, noted, pack, unpack


@gluon.jit(do_not_specialize=["stride_interval", "stride_tiles", "stride_blanked", "stride_slope", "q_heads", "group_size", "q_len", "kv_len", "offset", "left", "right"])  # fmt: skip
def hopper_dq(
    desc_q, desc_k, desc_v, desc_blanked, desc_do, desc_dq, p_lse, p_delta, p_start, p_stop, p_tiles, p_blanked, p_slopes, stride_row,
    stride_interval, stride_tiles, stride_blanked, stride_slope, q_heads, group_size, q_len, kv_len, offset, left, right, scale, softcap,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    ALIBI: gl.constexpr,
):  # fmt: skip
    """``64 * CONSUMERS`` rows of one query head. Keys that none of all rows sees must not be given, or be zeros in ``desc_blanked``."""
    row_blocks = (q_len + ROWS * CONSUMERS - 1) // (ROWS * CONSUMERS)
    i_head, rank = gl.program_id(0) // row_blocks, gl.program_id(0) % row_blocks
    i_b, i_h = i_head // q_heads, i_head % q_heads
    i_m, first, n_tiles, right_partial, full = key_tiles(
        i_b, rank, row_blocks, q_len, kv_len, offset, left, right, p_tiles, stride_tiles, ROWS * CONSUMERS, BLOCK_N, MASK, HAS_LEFT,
        HAS_RIGHT,
    )  # fmt: skip
    row = i_m * (ROWS * CONSUMERS)

    smem_q = gl.allocate_shared_memory(desc_q.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], desc_q.layout)
    smem_do = gl.allocate_shared_memory(desc_do.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_DV], desc_do.layout)
    smem_k = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], desc_k.layout)
    smem_v = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], desc_v.layout)
    smem_place = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    place_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    smem_place.index(0).store(gl.full([1], 0, gl.int32, place_layout) + i_b)
    smem_place.index(1).store(gl.full([1], 0, gl.int32, place_layout) + i_h)
    ready_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready_q, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(empty_k.index(i), count=CONSUMERS)
        mbarrier.init(empty_v.index(i), count=CONSUMERS)

    slope = 0.0
    if ALIBI:
        slope = gl.load(p_slopes + i_b * stride_slope + i_h)
    if MASK == INTERVALS:
        p_start += i_b.to(gl.int64) * stride_interval
        p_stop += i_b.to(gl.int64) * stride_interval
    p_lse += i_head.to(gl.int64) * stride_row
    p_delta += i_head.to(gl.int64) * stride_row
    gl.warp_specialize([
        (consume, (0, smem_q, smem_do, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, desc_dq, smem_place, p_lse, p_delta, p_start, p_stop,
                   slope, row, first, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, BLOCK_D, BLOCK_DV, BLOCK_N,
                   STAGES, MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI)),
        (consume, (1, smem_q, smem_do, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, desc_dq, smem_place, p_lse, p_delta, p_start, p_stop,
                   slope, row, first, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, BLOCK_D, BLOCK_DV, BLOCK_N,
                   STAGES, MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI)),
        (produce, (desc_q, desc_do, desc_k, desc_v, desc_blanked, smem_q, smem_do, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v,
                   p_blanked, stride_blanked, i_b, i_h, group_size, row, first, n_tiles, BLOCK_N, CONSUMERS, STAGES, MASK)),
    ], [4, 1], [CONSUMER_REGISTERS, 24])  # fmt: skip


@gluon.jit
def produce(
    desc_q, desc_do, desc_k, desc_v, desc_blanked, smem_q, smem_do, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, p_blanked,
    stride_blanked, i_b, i_h, group_size, row, first, n_tiles, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """The warp that moves data: Q and dO once, then K and V as stages of the rings come free."""
    mbarrier.expect(ready_q, CONSUMERS * (desc_q.block_type.nbytes + desc_do.block_type.nbytes))
    for i in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(desc_q, [i_b, i_h, row + i * ROWS, 0], ready_q, smem_q.index(i))
        tma.async_copy_global_to_shared(desc_do, [i_b, i_h, row + i * ROWS, 0], ready_q, smem_do.index(i))
    i_kv = i_h // group_size
    for i in range(n_tiles):
        tile = first + n_tiles - 1 - i
        stage, phase = i % STAGES, i // STAGES & 1
        blanked = 0
        if MASK == INTERVALS:
            blanked = gl.load(p_blanked + i_b * stride_blanked + tile)  # it comes while this warp waits
        mbarrier.wait(empty_k.index(stage), phase ^ 1)
        mbarrier.expect(ready_k.index(stage), desc_k.block_type.nbytes)
        if blanked != 0:
            tma.async_copy_global_to_shared(
                desc_blanked, [i_b, i_kv, tile * BLOCK_N, 0], ready_k.index(stage), smem_k.index(stage)
            )
        else:
            tma.async_copy_global_to_shared(
                desc_k, [i_b, i_kv, tile * BLOCK_N, 0], ready_k.index(stage), smem_k.index(stage)
            )
        mbarrier.wait(empty_v.index(stage), phase ^ 1)
        mbarrier.expect(ready_v.index(stage), desc_v.block_type.nbytes)
        tma.async_copy_global_to_shared(
            desc_v, [i_b, i_kv, tile * BLOCK_N, 0], ready_v.index(stage), smem_v.index(stage)
        )


@gluon.jit
def consume(
    which, smem_q, smem_do, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, desc_dq, smem_place, p_lse, p_delta, p_start,
    p_stop, slope, row, first, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """Four warps that compute dQ of 64 rows."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row += which * ROWS
    o_m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    b_lse = gl.load(p_lse + o_m, mask=o_m < q_len, other=0.0)
    b_delta = gl.load(p_delta + o_m, mask=o_m < q_len, other=0.0)
    q = smem_q.index(which).reshape([ROWS, BLOCK_D])
    do = smem_do.index(which).reshape([ROWS, BLOCK_DV])
    last_tile = first + n_tiles - 1
    mbarrier.wait(ready_q, 0)

    # The first tile has no dS K of a tile before it to run beside.
    mbarrier.wait(ready_k.index(0), 0)
    k = smem_k.index(0).reshape([BLOCK_N, BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    b_s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(ready_v.index(0), 0)
    v = smem_v.index(0).reshape([BLOCK_N, BLOCK_DV])
    b_dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_p, b_factor = probabilities(
        b_s, b_lse, row, last_tile * BLOCK_N, p_start, p_stop, q_len, kv_len, offset, left, right, scale, softcap, slope, BLOCK_N, s_layout,
        MASK, HAS_LEFT, HAS_RIGHT, True, SOFTCAP, ALIBI,
    )  # fmt: skip
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    mbarrier.arrive(empty_v.index(0), count=1)
    b_ds = pack(score_gradients(b_p, b_dp, b_delta, b_factor, True, SOFTCAP), smem_k.dtype)
    b_dq = gl.zeros([ROWS, BLOCK_D], gl.float32, dq_layout)

    b_dq, b_ds = turns(
        1, gl.maximum(right_partial, 1), b_dq, b_ds, q, do, b_lse, b_delta, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v, p_start, p_stop, row,
        last_tile, q_len, kv_len, offset, left, right, scale, softcap, slope, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, s_layout, dq_layout, MASK,
        HAS_LEFT, HAS_RIGHT, True, SOFTCAP, ALIBI,
    )  # fmt: skip
    b_dq, b_ds = turns(
        gl.maximum(right_partial, 1), right_partial + full, b_dq, b_ds, q, do, b_lse, b_delta, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v,
        p_start, p_stop, row, last_tile, q_len, kv_len, offset, left, right, scale, softcap, slope, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, s_layout,
        dq_layout, MASK, HAS_LEFT, HAS_RIGHT, False, SOFTCAP, ALIBI,
    )  # fmt: skip
    if HAS_LEFT or MASK == INTERVALS:
        b_dq, b_ds = turns(
            gl.maximum(right_partial + full, 1), n_tiles, b_dq, b_ds, q, do, b_lse, b_delta, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v,
            p_start, p_stop, row, last_tile, q_len, kv_len, offset, left, right, scale, softcap, slope, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES,
            s_layout, dq_layout, MASK, HAS_LEFT, HAS_RIGHT, True, SOFTCAP, ALIBI,
        )  # fmt: skip

    k = smem_k.index((n_tiles - 1) % STAGES).reshape([BLOCK_N, BLOCK_D])
    b_dq = warpgroup_mma(unpack(b_ds, smem_k.dtype, dq_layout), k, b_dq, is_async=True)
    b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
    # Q is no longer needed: dQ takes its place, and the copy engine takes it from there.
    q.store((b_dq * (scale if SOFTCAP else scale * LOG2_E * LN_2)).to(smem_q.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc_dq, [noted(smem_place, 0), noted(smem_place, 1), row, 0], smem_q.index(which))
    tma.store_wait(0)


@gluon.jit
def turns(
    from_tile, to_tile, b_dq, b_ds, q, do, b_lse, b_delta, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v, p_start, p_stop, row, last_tile,
    q_len, kv_len, offset, left, right, scale, softcap, slope, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, s_layout: gl.constexpr, dq_layout: gl.constexpr, MASK: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """The tiles from the ``from_tile``-th visited on. Each turn starts S and dP of one tile, then dS K of the one before."""
    for i in range(from_tile, to_tile):
        stage, phase = i % STAGES, i // STAGES & 1
        before = (i - 1) % STAGES
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        mbarrier.wait(ready_k.index(stage), phase)
        k = smem_k.index(stage).reshape([BLOCK_N, BLOCK_D])
        b_s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        k_before = smem_k.index(before).reshape([BLOCK_N, BLOCK_D])
        b_left = unpack(b_ds, smem_k.dtype, dq_layout)
        b_dq = warpgroup_mma(b_left, k_before, b_dq, is_async=True)
        mbarrier.wait(ready_v.index(stage), phase)
        v = smem_v.index(stage).reshape([BLOCK_N, BLOCK_DV])
        b_dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(2, deps=(b_s,))
        b_p, b_factor = probabilities(
            b_s, b_lse, row, (last_tile - i) * BLOCK_N, p_start, p_stop, q_len, kv_len, offset, left, right, scale, softcap, slope, BLOCK_N,
            s_layout, MASK, HAS_LEFT, HAS_RIGHT, MASKED, SOFTCAP, ALIBI,
        )  # fmt: skip
        # A barrier that is already complete ends the basic block, without which the assembler moves the next wait above the exp2s.
        mbarrier.wait(ready_v.index(stage), phase)
        b_dq, b_left = warpgroup_mma_wait(1, deps=(b_dq, b_left))
        mbarrier.arrive(empty_k.index(before), count=1)
        b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
        mbarrier.arrive(empty_v.index(stage), count=1)
        b_ds = pack(score_gradients(b_p, b_dp, b_delta, b_factor, MASKED, SOFTCAP), smem_k.dtype)
    return b_dq, b_ds


@gluon.jit
def probabilities(
    b_s, b_lse, row, n, p_start, p_stop, q_len, kv_len, offset, left, right, scale, softcap, slope, BLOCK_N: gl.constexpr,
    s_layout: gl.constexpr, MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """P of raw products, and the slope of the softcap, by which dP is multiplied too (1 without one)."""
    unit = softcap if SOFTCAP else scale
    o_m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    o_n = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    b_factor = 1.0
    if SOFTCAP:
        b_s = 1.0 - 2.0 / (gl.exp2(b_s * (scale / softcap * 2.0 * LOG2_E)) + 1.0)
        b_factor = 1.0 - b_s * b_s
    if ALIBI:
        b_s = b_s - slope / unit * gl.abs(o_m[:, None] + offset - o_n[None, :]).to(gl.float32)
    b_p = gl.exp2(b_s * (unit * LOG2_E) - b_lse[:, None])
    if MASKED:
        stop = gl.zeros_like(o_m) + kv_len
        if MASK == INTERVALS:
            start = gl.load(p_start + o_m, mask=o_m < q_len, other=0)
            stop = gl.load(p_stop + o_m, mask=o_m < q_len, other=0)
            b_p = gl.where(o_n[None, :] >= start[:, None], b_p, 0.0)
        if MASK == BAND:
            if HAS_LEFT:
                b_p = gl.where(o_n[None, :] >= (o_m + (offset - left))[:, None], b_p, 0.0)
            if HAS_RIGHT:
                stop = gl.minimum(stop, o_m + (offset + right + 1))
        b_p = gl.where(o_n[None, :] < stop[:, None], b_p, 0.0)
    return b_p, b_factor


@gluon.jit
def score_gradients(b_p, b_dp, b_delta, b_factor, MASKED: gl.constexpr, SOFTCAP: gl.constexpr):
    """dS, 0 where P is: a key that a row does not see may hold NaN, and so may its dP."""
    b_ds = b_p * (b_dp - b_delta[:, None])
    if SOFTCAP:
        b_ds = b_ds * b_factor
    if MASKED:
        b_ds = gl.where(b_p == 0.0, 0.0, b_ds)
    return b_ds
