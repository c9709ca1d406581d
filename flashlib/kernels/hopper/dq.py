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

from flashlib.kernels.bundles import DqBlock, DqRings, DqTensors, HopperShape, Problem
from flashlib.kernels.common import BAND, INTERVALS, LN_2, LOG2_E
from flashlib.kernels.hopper.common import ROWS, key_tiles, noted, of_entry, pack, place, unpack


@gluon.jit(
    do_not_specialize=[
        "stride_interval", "stride_tiles", "stride_blanked", "stride_slope", "q_heads", "group_size", "heads_together",
        "q_len", "kv_len", "offset", "left", "right",
    ]
)  # fmt: skip
def hopper_dq(
    desc_q, desc_k, desc_v, desc_blanked, desc_do, desc_dq, p_lse, p_delta, p_start, p_stop, p_tiles, p_blanked,
    p_slopes, stride_row, stride_interval, stride_tiles, stride_blanked, stride_slope, q_heads, group_size,
    heads_together, q_len, kv_len, offset, left, right, scale, softcap, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """``64 * CONSUMERS`` rows of one query head. Keys that none of all rows sees must not be given, or be zeros in ``desc_blanked``."""
    row_blocks = (q_len + ROWS * CONSUMERS - 1) // (ROWS * CONSUMERS)
    i_head, rank = place(gl.program_id(0), row_blocks, gl.num_programs(0) // row_blocks, heads_together)
    i_b, i_h = i_head // q_heads, i_head % q_heads
    problem = Problem(
        q_len=q_len, kv_len=kv_len, offset=offset, left=left, right=right, p_start=p_start, p_stop=p_stop, scale=scale,
        softcap=softcap, MASK=MASK, HAS_LEFT=HAS_LEFT, HAS_RIGHT=HAS_RIGHT, SOFTCAP=SOFTCAP, ALIBI=ALIBI,
    )  # fmt: skip
    i_m, first, n_tiles, right_partial, full = key_tiles(
        i_b, rank, row_blocks, problem, p_tiles, stride_tiles, ROWS * CONSUMERS, BLOCK_N
    )
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
    problem = of_entry(problem, i_b, stride_interval)
    p_lse += i_head.to(gl.int64) * stride_row
    p_delta += i_head.to(gl.int64) * stride_row
    shape = HopperShape(BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK=BLOCK_N, CONSUMERS=CONSUMERS, STAGES=STAGES)
    rings = DqRings(
        q=smem_q, do=smem_do, k=smem_k, v=smem_v, place=smem_place, ready_q=ready_q, ready_k=ready_k, ready_v=ready_v,
        empty_k=empty_k, empty_v=empty_v,
    )  # fmt: skip
    tensors = DqTensors(q=desc_q, do=desc_do, k=desc_k, v=desc_v, blanked=desc_blanked)
    block = DqBlock(row=row, first=first, n_tiles=n_tiles, right_partial=right_partial, full=full, i_b=i_b, i_h=i_h)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, rings, desc_dq, p_lse, p_delta, problem, slope, block, shape)),
                (consume, (1, rings, desc_dq, p_lse, p_delta, problem, slope, block, shape)),
                (produce, (tensors, rings, p_blanked, stride_blanked, group_size, block, problem, shape)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, rings, desc_dq, p_lse, p_delta, problem, slope, block, shape)),
                (produce, (tensors, rings, p_blanked, stride_blanked, group_size, block, problem, shape)),
            ],
            [1],
            [24],
        )


@gluon.jit
def produce(tensors, rings, p_blanked, stride_blanked, group_size, block, problem, shape):
    """The warp that moves data: Q and dO once, then K and V as stages of the rings come free."""
    CONSUMERS: gl.constexpr = shape.CONSUMERS
    i_b, i_h = block.i_b, block.i_h
    mbarrier.expect(rings.ready_q, CONSUMERS * (tensors.q.block_type.nbytes + tensors.do.block_type.nbytes))
    for i in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(tensors.q, [i_b, i_h, block.row + i * ROWS, 0], rings.ready_q, rings.q.index(i))
        tma.async_copy_global_to_shared(
            tensors.do, [i_b, i_h, block.row + i * ROWS, 0], rings.ready_q, rings.do.index(i)
        )
    i_kv = i_h // group_size
    for i in range(block.n_tiles):
        tile = block.first + block.n_tiles - 1 - i
        stage, phase = i % shape.STAGES, i // shape.STAGES & 1
        blanked = 0
        if problem.MASK == INTERVALS:
            blanked = gl.load(p_blanked + i_b * stride_blanked + tile)  # it comes while this warp waits
        mbarrier.wait(rings.empty_k.index(stage), phase ^ 1)
        mbarrier.expect(rings.ready_k.index(stage), tensors.k.block_type.nbytes)
        if blanked != 0:
            tma.async_copy_global_to_shared(
                tensors.blanked, [i_b, i_kv, tile * shape.BLOCK, 0], rings.ready_k.index(stage), rings.k.index(stage)
            )
        else:
            tma.async_copy_global_to_shared(
                tensors.k, [i_b, i_kv, tile * shape.BLOCK, 0], rings.ready_k.index(stage), rings.k.index(stage)
            )
        mbarrier.wait(rings.empty_v.index(stage), phase ^ 1)
        mbarrier.expect(rings.ready_v.index(stage), tensors.v.block_type.nbytes)
        tma.async_copy_global_to_shared(
            tensors.v, [i_b, i_kv, tile * shape.BLOCK, 0], rings.ready_v.index(stage), rings.v.index(stage)
        )


@gluon.jit
def consume(which, rings, desc_dq, p_lse, p_delta, problem, slope, block, shape):
    """Four warps that compute dQ of 64 rows."""
    STAGES: gl.constexpr = shape.STAGES
    BLOCK_N: gl.constexpr = shape.BLOCK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.BLOCK_D, 16])
    row = block.row + which * ROWS
    o_m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    b_lse = gl.load(p_lse + o_m, mask=o_m < problem.q_len, other=0.0)
    b_delta = gl.load(p_delta + o_m, mask=o_m < problem.q_len, other=0.0)
    q = rings.q.index(which).reshape([ROWS, shape.BLOCK_D])
    do = rings.do.index(which).reshape([ROWS, shape.BLOCK_DV])
    last_tile = block.first + block.n_tiles - 1
    mbarrier.wait(rings.ready_q, 0)

    # The first tile has no dS K of a tile before it to run beside.
    mbarrier.wait(rings.ready_k.index(0), 0)
    k = rings.k.index(0).reshape([BLOCK_N, shape.BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    b_s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(rings.ready_v.index(0), 0)
    v = rings.v.index(0).reshape([BLOCK_N, shape.BLOCK_DV])
    b_dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_p, b_factor = probabilities(b_s, b_lse, row, last_tile * BLOCK_N, slope, problem, s_layout, True)
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    mbarrier.arrive(rings.empty_v.index(0), count=1)
    b_ds = pack(score_gradients(b_p, b_dp, b_delta, b_factor, True, problem), rings.k.dtype)
    b_dq = gl.zeros([ROWS, shape.BLOCK_D], gl.float32, dq_layout)

    right_partial, full, n_tiles = block.right_partial, block.full, block.n_tiles
    b_dq, b_ds = turns(
        1, gl.maximum(right_partial, 1), b_dq, b_ds, q, do, b_lse, b_delta, row, last_tile, slope, rings, problem,
        shape, s_layout, dq_layout, True,
    )  # fmt: skip
    b_dq, b_ds = turns(
        gl.maximum(right_partial, 1), right_partial + full, b_dq, b_ds, q, do, b_lse, b_delta, row, last_tile, slope,
        rings, problem, shape, s_layout, dq_layout, False,
    )  # fmt: skip
    if problem.HAS_LEFT or problem.MASK == INTERVALS:
        b_dq, b_ds = turns(
            gl.maximum(right_partial + full, 1), n_tiles, b_dq, b_ds, q, do, b_lse, b_delta, row, last_tile, slope,
            rings, problem, shape, s_layout, dq_layout, True,
        )  # fmt: skip

    k = rings.k.index((n_tiles - 1) % STAGES).reshape([BLOCK_N, shape.BLOCK_D])
    b_dq = warpgroup_mma(unpack(b_ds, rings.k.dtype, dq_layout), k, b_dq, is_async=True)
    b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
    # Q is no longer needed: dQ takes its place, and the copy engine takes it from there.
    q.store((b_dq * (problem.scale if problem.SOFTCAP else problem.scale * LOG2_E * LN_2)).to(rings.q.dtype))
    fence_async_shared()
    i_b, i_h = noted(rings.place, 0), noted(rings.place, 1)
    tma.async_copy_shared_to_global(desc_dq, [i_b, i_h, row, 0], rings.q.index(which))
    tma.store_wait(0)


@gluon.jit
def turns(
    from_tile, to_tile, b_dq, b_ds, q, do, b_lse, b_delta, row, last_tile, slope, rings, problem, shape,
    s_layout: gl.constexpr, dq_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The tiles from the ``from_tile``-th visited on. Each turn starts S and dP of one tile, then dS K of the one before."""
    STAGES: gl.constexpr = shape.STAGES
    BLOCK_N: gl.constexpr = shape.BLOCK
    for i in range(from_tile, to_tile):
        stage, phase = i % STAGES, i // STAGES & 1
        before = (i - 1) % STAGES
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
        mbarrier.wait(rings.ready_k.index(stage), phase)
        k = rings.k.index(stage).reshape([BLOCK_N, shape.BLOCK_D])
        b_s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        k_before = rings.k.index(before).reshape([BLOCK_N, shape.BLOCK_D])
        b_left = unpack(b_ds, rings.k.dtype, dq_layout)
        b_dq = warpgroup_mma(b_left, k_before, b_dq, is_async=True)
        mbarrier.wait(rings.ready_v.index(stage), phase)
        v = rings.v.index(stage).reshape([BLOCK_N, shape.BLOCK_DV])
        b_dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(2, deps=(b_s,))
        b_p, b_factor = probabilities(b_s, b_lse, row, (last_tile - i) * BLOCK_N, slope, problem, s_layout, MASKED)
        # A barrier that is already complete ends the basic block, without which the assembler moves the next wait above the exp2s.
        mbarrier.wait(rings.ready_v.index(stage), phase)
        b_dq, b_left = warpgroup_mma_wait(1, deps=(b_dq, b_left))
        mbarrier.arrive(rings.empty_k.index(before), count=1)
        b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
        mbarrier.arrive(rings.empty_v.index(stage), count=1)
        b_ds = pack(score_gradients(b_p, b_dp, b_delta, b_factor, MASKED, problem), rings.k.dtype)
    return b_dq, b_ds


@gluon.jit
def probabilities(b_s, b_lse, row, n, slope, problem, s_layout: gl.constexpr, MASKED: gl.constexpr):
    """P of raw products, and the slope of the softcap, by which dP is multiplied too (1 without one)."""
    unit = problem.softcap if problem.SOFTCAP else problem.scale
    o_m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    o_n = n + gl.arange(0, b_s.shape[1], layout=gl.SliceLayout(0, s_layout))
    b_factor = 1.0
    if problem.SOFTCAP:
        b_s = 1.0 - 2.0 / (gl.exp2(b_s * (problem.scale / problem.softcap * 2.0 * LOG2_E)) + 1.0)
        b_factor = 1.0 - b_s * b_s
    if problem.ALIBI:
        b_s = b_s - slope / unit * gl.abs(o_m[:, None] + problem.offset - o_n[None, :]).to(gl.float32)
    b_p = gl.exp2(b_s * (unit * LOG2_E) - b_lse[:, None])
    if MASKED:
        stop = gl.zeros_like(o_m) + problem.kv_len
        if problem.MASK == INTERVALS:
            start = gl.load(problem.p_start + o_m, mask=o_m < problem.q_len, other=0)
            stop = gl.load(problem.p_stop + o_m, mask=o_m < problem.q_len, other=0)
            b_p = gl.where(o_n[None, :] >= start[:, None], b_p, 0.0)
        if problem.MASK == BAND:
            if problem.HAS_LEFT:
                b_p = gl.where(o_n[None, :] >= (o_m + (problem.offset - problem.left))[:, None], b_p, 0.0)
            if problem.HAS_RIGHT:
                stop = gl.minimum(stop, o_m + (problem.offset + problem.right + 1))
        b_p = gl.where(o_n[None, :] < stop[:, None], b_p, 0.0)
    return b_p, b_factor


@gluon.jit
def score_gradients(b_p, b_dp, b_delta, b_factor, MASKED: gl.constexpr, problem):
    """dS, 0 where P is: a key that a row does not see may hold NaN, and so may its dP."""
    b_ds = b_p * (b_dp - b_delta[:, None])
    if problem.SOFTCAP:
        b_ds = b_ds * b_factor
    if MASKED:
        b_ds = gl.where(b_p == 0.0, 0.0, b_ds)
    return b_ds
