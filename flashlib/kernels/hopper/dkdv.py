"""dK and dV for Hopper GPUs, warp-specialised, in Gluon (Dao 2023, arXiv 2307.08691, algorithm 2; Shah et al. 2024, arXiv 2407.08608).

A program owns 64 keys per consumer; their K and V stay in shared memory, their dK and dV in registers. The producer brings Q and
dO of one tile of rows after another. Scores are formed transposed, keys first, so that P and dS come out of one matrix product
in the very registers in which the next one takes them: nothing but Q, dO, K and V ever lies in shared memory.
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

from flashlib.kernels.bundles import DkdvParts, DkdvRings, DkdvSchedule, DkdvTensors, HopperShape, Problem
from flashlib.kernels.common import BAND, INTERVALS, LN_2, LOG2_E, UNMASKED
from flashlib.kernels.hopper.common import note, noted, of_entry, place

KEYS = gl.constexpr(64)  # of one consumer: what one warpgroup's instruction takes
# What the producer tells the consumers: places in shared memory.
PLAN = gl.constexpr(6)
BATCH_ENTRY, GROUP, FULL, PARTIAL, ALL, OWN = (gl.constexpr(slot) for slot in range(6))
warp_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until triton 3.6


@gluon.jit(
    do_not_specialize=[
        "stride_interval", "stride_blank", "stride_slope", "stride_range", "kv_heads", "parts", "group_size",
        "heads_together", "q_len", "kv_len", "unseeing", "offset", "left", "right",
    ]
)  # fmt: skip
def hopper_dkdv(
    desc_q, desc_k, desc_v, desc_do, desc_blank_q, desc_blank_do, desc_rows, desc_dk, desc_dv, p_start, p_stop,
    p_ranges, p_blank, p_slopes, p_dk_parts, p_dv_parts, stride_interval, stride_blank, stride_slope, stride_range,
    kv_heads, parts, group_size, heads_together, q_len, kv_len, unseeing, offset, left, right, scale, softcap, unit,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, IN_PARTS: gl.constexpr,
):  # fmt: skip
    """``64 * CONSUMERS`` keys of one KV head: every row of every query head of the group passes by, in a fixed order.

    IN_PARTS: ``parts`` programs share the query heads of a KV head, ``group_size`` each. What they come to is written to
    ``p_dk_parts`` and ``p_dv_parts``, fp32 ``[B, KV heads * parts, key blocks, 64 * CONSUMERS, BLOCK_D]`` and the same with
    ``BLOCK_DV``; ``kv_heads`` counts each KV head ``parts`` times.
    """
    smem_k = gl.allocate_shared_memory(desc_k.dtype, [CONSUMERS, 1, 1, KEYS, BLOCK_D], desc_k.layout)
    smem_v = gl.allocate_shared_memory(desc_v.dtype, [CONSUMERS, 1, 1, KEYS, BLOCK_DV], desc_v.layout)
    smem_q = gl.allocate_shared_memory(desc_q.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], desc_q.layout)
    smem_do = gl.allocate_shared_memory(desc_do.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_DV], desc_do.layout)
    smem_lse = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BLOCK_M], desc_rows.layout)
    smem_delta = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BLOCK_M], desc_rows.layout)
    smem_seen = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem_row = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem_plan = gl.allocate_shared_memory(gl.int32, [PLAN, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready_kv = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_do = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready_kv, count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(done.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_q.index(i), count=1)
        mbarrier.init(ready_do.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)

    problem = Problem(
        q_len=q_len, kv_len=kv_len, offset=offset, left=left, right=right, p_start=p_start, p_stop=p_stop, scale=scale,
        softcap=softcap, MASK=MASK, HAS_LEFT=HAS_LEFT, HAS_RIGHT=HAS_RIGHT, SOFTCAP=SOFTCAP, ALIBI=ALIBI,
    )  # fmt: skip
    shape = HopperShape(BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK=BLOCK_M, CONSUMERS=CONSUMERS, STAGES=STAGES)
    rings = DkdvRings(
        k=smem_k, v=smem_v, q=smem_q, do=smem_do, lse=smem_lse, delta=smem_delta, seen=smem_seen, row=smem_row,
        plan=smem_plan, ready_kv=ready_kv, ready_q=ready_q, ready_do=ready_do, empty=empty, done=done,
    )  # fmt: skip
    schedule = DkdvSchedule(
        p_ranges=p_ranges, p_blank=p_blank, stride_interval=stride_interval, stride_blank=stride_blank,
        stride_range=stride_range, kv_heads=kv_heads, parts=parts, group_size=group_size, heads_together=heads_together,
        unseeing=unseeing, IN_PARTS=IN_PARTS,
    )  # fmt: skip
    into = DkdvParts(p_dk=p_dk_parts, p_dv=p_dv_parts, IN_PARTS=IN_PARTS)
    tensors = DkdvTensors(
        q=desc_q, k=desc_k, v=desc_v, do=desc_do, blank_q=desc_blank_q, blank_do=desc_blank_do, rows=desc_rows,
        dk=desc_dk, dv=desc_dv
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, rings, into, p_slopes, stride_slope, group_size, unit, problem, shape)),
                (consume, (1, rings, into, p_slopes, stride_slope, group_size, unit, problem, shape)),
                (produce, (tensors, rings, schedule, problem, shape)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, rings, into, p_slopes, stride_slope, group_size, unit, problem, shape)),
                (produce, (tensors, rings, schedule, problem, shape)),
            ],
            [1],
            [24],
        )


@gluon.jit
def row_tiles(n, problem, p_ranges, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Which tiles of rows see these keys: ``(first row, first row of the full ones, how many are full, how many in all)``.

    Rows past the end and keys past the end need no mask: the copy engine brings zeros for them, which add nothing.
    """
    first, last = 0, problem.q_len
    full_first, full_last = 0, problem.q_len
    end = gl.minimum(n + BLOCK_N, problem.kv_len)
    if problem.MASK == INTERVALS:
        first, full_first = gl.load(p_ranges), gl.load(p_ranges + 1)
        full_last, last = gl.load(p_ranges + 2), gl.load(p_ranges + 3)
    if problem.MASK == BAND:
        if problem.HAS_RIGHT:
            first = gl.maximum(first, n - problem.offset - problem.right)
            full_first = gl.maximum(full_first, end - 1 - problem.offset - problem.right)
        if problem.HAS_LEFT:
            last = gl.minimum(last, end - problem.offset + problem.left)
            full_last = gl.minimum(full_last, n - problem.offset + problem.left + 1)
    first = first // BLOCK_M
    last = gl.maximum((gl.maximum(last, 0) + BLOCK_M - 1) // BLOCK_M, first)
    full_first = gl.minimum((full_first + BLOCK_M - 1) // BLOCK_M, last)
    full_last = gl.where(full_last >= problem.q_len, last, gl.maximum(full_last, 0) // BLOCK_M)
    n_full = gl.maximum(gl.minimum(full_last, last) - full_first, 0)
    return first * BLOCK_M, full_first * BLOCK_M, n_full, last - first


@gluon.jit
def row_of(j, first, full_first, n_full, BLOCK_M: gl.constexpr, TWO_SIDED: gl.constexpr):
    """Where the ``j``-th tile visited begins: the full tiles come first, then the partial ones.

    The latter lie on both sides of the full ones (TWO_SIDED), or, without a limit on the left, only in front of them.
    """
    partial = first + (j - n_full) * BLOCK_M
    if TWO_SIDED:
        partial += gl.where(partial < full_first, 0, n_full * BLOCK_M)
    return gl.where(j < n_full, full_first + j * BLOCK_M, partial)


@gluon.jit
def produce(tensors, rings, schedule, problem, shape):
    """The warp that plans and that moves data: K and V once, then Q and dO as stages of the ring come free,
    and in the end dK and dV out.

    Rows that see nothing may hold NaN, so zeros come in their place: under a band they are the first ``unseeing`` ones, which are not in
    the tensors given; under row intervals tiles with such rows come from copies in which they are zeros. What the
    consumers must know lies in shared memory, since their loops need every register.
    """
    CONSUMERS: gl.constexpr = shape.CONSUMERS
    BLOCK_M: gl.constexpr = shape.BLOCK
    BLOCK_N: gl.constexpr = KEYS * CONSUMERS
    key_blocks = (problem.kv_len + BLOCK_N - 1) // BLOCK_N
    heads = gl.num_programs(0) // key_blocks
    i_head, i_n = place(gl.program_id(0), key_blocks, heads, schedule.heads_together)
    # A group: the query heads of one KV head, or a part of them.
    i_b, i_group = i_head // schedule.kv_heads, i_head % schedule.kv_heads
    i_kv = i_group // schedule.parts if schedule.IN_PARTS else i_group
    n = i_n * BLOCK_N
    problem = of_entry(problem, i_b, schedule.stride_interval)
    p_ranges = schedule.p_ranges
    if problem.MASK == INTERVALS:
        p_ranges += i_b * schedule.stride_range + i_n * 4
    first, full_first, n_full, n_tiles = row_tiles(n, problem, p_ranges, BLOCK_M, BLOCK_N)
    note(rings.plan, BATCH_ENTRY, i_b)
    note(rings.plan, GROUP, i_group)
    note(rings.plan, FULL, n_full)
    note(rings.plan, PARTIAL, n_tiles - n_full)
    note(rings.plan, ALL, schedule.group_size * n_tiles)
    if schedule.IN_PARTS:
        note(rings.plan, OWN, i_head * key_blocks + i_n)
    mbarrier.expect(rings.ready_kv, CONSUMERS * (tensors.k.block_type.nbytes + tensors.v.block_type.nbytes))
    for i in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(tensors.k, [i_b, i_kv, n + i * KEYS, 0], rings.ready_kv, rings.k.index(i))
        tma.async_copy_global_to_shared(tensors.v, [i_b, i_kv, n + i * KEYS, 0], rings.ready_kv, rings.v.index(i))
    for i in range(schedule.group_size * n_tiles):
        i_h = i_group * schedule.group_size + i // n_tiles
        head = i_head * schedule.group_size + i // n_tiles
        row = row_of(i % n_tiles, first, full_first, n_full, BLOCK_M, problem.HAS_LEFT or problem.MASK == INTERVALS)
        stage, phase = i % shape.STAGES, i // shape.STAGES & 1
        blank = 0
        if problem.MASK == INTERVALS:
            # It comes while this warp waits.
            blank = gl.load(schedule.p_blank + i_b * schedule.stride_blank + row // BLOCK_M)
        mbarrier.wait(rings.empty.index(stage), phase ^ 1)
        if problem.ALIBI:
            note(rings.row, stage, row + problem.offset - n)
        if problem.MASK != UNMASKED:  # noqa: SIM102  (the compiler decides this one)
            if i % n_tiles >= n_full:
                rings.seen.index(stage).store(seen_keys(row, n, problem, BLOCK_M, BLOCK_N))
                warp_barrier()  # each lane has written what it knows before one of them says so
        mbarrier.expect(rings.ready_q.index(stage), tensors.q.block_type.nbytes + tensors.rows.block_type.nbytes)
        if blank != 0:
            tma.async_copy_global_to_shared(
                tensors.blank_q, [i_b, i_h, row, 0], rings.ready_q.index(stage), rings.q.index(stage)
            )
        else:
            tma.async_copy_global_to_shared(
                tensors.q, [i_b, i_h, row - schedule.unseeing, 0], rings.ready_q.index(stage), rings.q.index(stage)
            )
        tma.async_copy_global_to_shared(
            tensors.rows, [0, head, row], rings.ready_q.index(stage), rings.lse.index(stage)
        )
        mbarrier.expect(rings.ready_do.index(stage), tensors.do.block_type.nbytes + tensors.rows.block_type.nbytes)
        if blank != 0:
            tma.async_copy_global_to_shared(
                tensors.blank_do, [i_b, i_h, row, 0], rings.ready_do.index(stage), rings.do.index(stage)
            )
        else:
            tma.async_copy_global_to_shared(
                tensors.do, [i_b, i_h, row - schedule.unseeing, 0], rings.ready_do.index(stage), rings.do.index(stage)
            )
        tma.async_copy_global_to_shared(
            tensors.rows, [1, head, row], rings.ready_do.index(stage), rings.delta.index(stage)
        )
    if not schedule.IN_PARTS:
        for i in gl.static_range(CONSUMERS):
            mbarrier.wait(rings.done.index(i), 0)
            tma.async_copy_shared_to_global(tensors.dk, [i_b, i_kv, n + i * KEYS, 0], rings.k.index(i))
            tma.async_copy_shared_to_global(tensors.dv, [i_b, i_kv, n + i * KEYS, 0], rings.v.index(i))
        tma.store_wait(0)


@gluon.jit
def seen_keys(row, n, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Which of the keys ``n .. n + BLOCK_N - 1`` each of ``BLOCK_M`` rows sees: the first in the low half of an int32, one past the last
    in the high half, both from ``n``. The consumers have registers for one number per row, not for two."""
    o_rows = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [1], [0]))
    start, stop = gl.zeros_like(o_rows), gl.zeros_like(o_rows) + BLOCK_N
    if problem.MASK == INTERVALS:
        o_m = row + o_rows
        start = gl.load(problem.p_start + o_m, mask=o_m < problem.q_len, other=0) - n
        stop = gl.load(problem.p_stop + o_m, mask=o_m < problem.q_len, other=0) - n
    if problem.MASK == BAND:
        # Not known to be the same each time: what depends on it would be kept for all tiles, and the producer has 24 registers.
        o_rows = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [o_rows], dtype=gl.int32, is_pure=False, pack=1)
        if problem.HAS_LEFT:
            start = o_rows + (row - n + problem.offset - problem.left)
        if problem.HAS_RIGHT:
            stop = o_rows + (row - n + problem.offset + problem.right + 1)
    start = gl.minimum(gl.maximum(start, 0), BLOCK_N)
    stop = gl.minimum(gl.maximum(stop, 0), BLOCK_N)
    return start | (stop << 16)


@gluon.jit
def consume(which, rings, into, p_slopes, stride_slope, group_size, unit, problem, shape):
    """Four warps that compute dK and dV of 64 keys."""
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.BLOCK_DV, 16])
    b_dk = gl.zeros([KEYS, shape.BLOCK_D], gl.float32, dk_layout)
    b_dv = gl.zeros([KEYS, shape.BLOCK_DV], gl.float32, dv_layout)
    k = rings.k.index(which).reshape([KEYS, shape.BLOCK_D])
    v = rings.v.index(which).reshape([KEYS, shape.BLOCK_DV])
    slope = 0.0
    mbarrier.wait(rings.ready_kv, 0)
    if problem.ALIBI:
        p_slopes += noted(rings.plan, BATCH_ENTRY) * stride_slope + noted(rings.plan, GROUP) * group_size
    before = 0  # tiles of the group's heads that have passed by
    while before < noted(rings.plan, ALL):
        if problem.ALIBI:
            slope = gl.load(p_slopes)
            p_slopes += 1
        # What is needed behind a loop takes a register in it, and none is left: only where the loop ends is.
        end = before + noted(rings.plan, FULL)
        b_dk, b_dv = gather_rows(
            before, end, which, b_dk, b_dv, k, v, slope, rings, unit, problem, shape, dk_layout, dv_layout, False
        )
        before = end
        if problem.MASK != UNMASKED:
            end = before + noted(rings.plan, PARTIAL)
            b_dk, b_dv = gather_rows(
                before, end, which, b_dk, b_dv, k, v, slope, rings, unit, problem, shape, dk_layout, dv_layout, True
            )
            before = end
    b_dk *= problem.scale if problem.SOFTCAP else unit * LN_2
    if into.IN_PARTS:  # in fp32, for which the places of K and V are too small
        own = noted(rings.plan, OWN).to(gl.int64) * shape.CONSUMERS + which
        store_part(into.p_dk + own * (KEYS * shape.BLOCK_D), b_dk, dk_layout)
        store_part(into.p_dv + own * (KEYS * shape.BLOCK_DV), b_dv, dv_layout)
    else:
        # K and V are no longer needed: the gradients take their places, and the producer has them fetched from there.
        k.store(b_dk.to(rings.k.dtype))
        v.store(b_dv.to(rings.v.dtype))
        fence_async_shared()
        mbarrier.arrive(rings.done.index(which), count=1)


@gluon.jit
def store_part(p_part, b_part, layout: gl.constexpr):
    """Write a whole tile to memory, as it lies in registers."""
    o_n = gl.arange(0, b_part.shape[0], layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, b_part.shape[1], layout=gl.SliceLayout(0, layout))
    gl.store(p_part + o_n[:, None] * b_part.shape[1] + o_d[None, :], b_part)


@gluon.jit
def gather_rows(
    from_tile, to_tile, which, b_dk, b_dv, k, v, slope, rings, unit, problem, shape, dk_layout: gl.constexpr,
    dv_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add what the tiles of rows from the ``from_tile``-th that the producer brings up to ``to_tile`` give."""
    BLOCK_M: gl.constexpr = shape.BLOCK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    for j in range(from_tile, to_tile):
        stage, phase = j % shape.STAGES, j // shape.STAGES & 1
        q = rings.q.index(stage).reshape([BLOCK_M, shape.BLOCK_D])
        do = rings.do.index(stage).reshape([BLOCK_M, shape.BLOCK_DV])
        zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, s_layout)
        mbarrier.wait(rings.ready_q.index(stage), phase)
        b_s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(rings.ready_do.index(stage), phase)
        b_dp = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        o_n = which * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, s_layout))
        if problem.SOFTCAP:
            b_t = 1.0 - 2.0 / (gl.exp2(b_s * (problem.scale / problem.softcap * 2.0 * LOG2_E)) + 1.0)
            b_s = b_t
        if problem.ALIBI:
            o_m = noted(rings.row, stage) + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
            score_unit = problem.softcap if problem.SOFTCAP else problem.scale
            b_s = b_s - slope / score_unit * gl.abs(o_m[None, :] - o_n[:, None]).to(gl.float32)
        b_lse = rings.lse.index(stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, s_layout))
        b_p = gl.exp2(b_s * unit - b_lse[None, :])
        if MASKED:
            # Rows past the end may keep what they have: their Q and dO are zeros.
            seen = rings.seen.index(stage).load(gl.SliceLayout(0, s_layout))
            b_p = gl.where(o_n[:, None] >= (seen & 0xFFFF)[None, :], b_p, 0.0)
            b_p = gl.where(o_n[:, None] < (seen >> 16)[None, :], b_p, 0.0)
        b_dv = warpgroup_mma(
            gl.convert_layout(b_p.to(rings.do.dtype), gl.DotOperandLayout(0, dv_layout, 2)), do, b_dv, is_async=True
        )
        # A barrier that is already complete ends the basic block, without which the assembler moves the next wait above the exp2s.
        mbarrier.wait(rings.ready_do.index(stage), phase)
        b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
        b_delta = rings.delta.index(stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, s_layout))
        b_ds = b_p * (b_dp - b_delta[None, :])
        if problem.SOFTCAP:
            b_ds = b_ds * (1.0 - b_t * b_t)
        if MASKED:
            b_ds = gl.where(b_p == 0.0, 0.0, b_ds)  # a key that nobody sees may hold NaN, and so may its dP
        b_dk = warpgroup_mma(
            gl.convert_layout(b_ds.to(rings.q.dtype), gl.DotOperandLayout(0, dk_layout, 2)), q, b_dk, is_async=True
        )
        b_dk, b_dv = warpgroup_mma_wait(0, deps=(b_dk, b_dv))
        mbarrier.arrive(rings.empty.index(stage), count=1)
    return b_dk, b_dv
