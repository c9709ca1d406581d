"""FlashAttention forward for Hopper GPUs, warp-specialised, in Gluon (Shah et al. 2024, arXiv 2407.08608, sections 3.1 and 3.2).

Triton's language leaves to the compiler who does what. Gluon lets one say it: in each program one warp only moves Q, K and V
into shared memory (the producer), and two or three groups of four warps only compute, 64 rows each (the consumers). They meet at
barriers in shared memory: "ready" once a tile has arrived, "empty" once every consumer is done with it.

There is one program per multiprocessor, and it works through many blocks of rows: while the consumers finish one, the producer
already brings the keys of the next. Which block comes next is asked of a counter in memory, so that a program whose blocks
were short takes more of them.

Within a consumer the two matrix products run asynchronously: while the tensor cores form P V of one tile, the softmax of the next
is computed. Between consumers the right to start products goes round, so that they do not all compute their softmax at once.

Tiles of keys are visited from the last to the first: under a causal mask the partial ones are then the first few, under a
window also the last few.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashlib.kernels.bundles import ForwardRings, ForwardTensors, HopperShape, PerHead, Problem, Schedule
from flashlib.kernels.common import BAND, INTERVALS, LN_2, LOG2_E
from flashlib.kernels.hopper.common import ROWS, key_tiles, note, noted, pack, place, unpack

PLAN = gl.constexpr(7)  # numbers that the producer tells the consumers about each block of rows
OWN = gl.constexpr(16)  # and four about each consumer's rows, if row intervals say what they see; a power of two
PLANS = gl.constexpr(3)  # kept: of a block whose output is still written, of the one under way, and of the next
FIRST_TURN = gl.constexpr(8)  # the hardware barrier of the first consumer's turn; the compiler uses those before it


@gluon.jit(
    do_not_specialize=[
        "stride_interval", "stride_tiles", "stride_slope", "heads", "q_heads", "group_size", "heads_together", "q_len",
        "kv_len", "offset", "left", "right",
    ]
)  # fmt: skip
def hopper_forward(
    desc_q, desc_k, desc_v, desc_blanked, p_out, p_lse, p_counter, p_start, p_stop, p_tiles, p_blanked, p_slopes,
    stride_ob, stride_oh, stride_os, stride_interval, stride_tiles, stride_blanked, stride_slope, heads, q_heads,
    group_size, heads_together, q_len, kv_len, offset, left, right, scale, softcap, v_head_dim, CHECK_DV: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """Blocks of ``64 * CONSUMERS`` rows of one query head. The keys given are those that some row sees, so that none need be blanked."""
    smem_q = gl.allocate_shared_memory(desc_q.dtype, [2 * CONSUMERS, 1, 1, ROWS, BLOCK_D], desc_q.layout)
    smem_k = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], desc_k.layout)
    smem_v = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], desc_v.layout)
    smem_plan = gl.allocate_shared_memory(gl.int32, [PLANS * PLAN, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem_own = gl.allocate_shared_memory(gl.int32, [PLANS, OWN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready_plan = gl.allocate_shared_memory(gl.int64, [PLANS, 1], mbarrier.MBarrierLayout())
    ready_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLANS):
        mbarrier.init(ready_plan.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready_q.index(i), count=1)
        mbarrier.init(empty_q.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(empty_k.index(i), count=CONSUMERS)
        mbarrier.init(empty_v.index(i), count=CONSUMERS)

    problem = Problem(
        q_len=q_len, kv_len=kv_len, offset=offset, left=left, right=right, p_start=p_start, p_stop=p_stop, scale=scale,
        softcap=softcap, MASK=MASK, HAS_LEFT=HAS_LEFT, HAS_RIGHT=HAS_RIGHT, SOFTCAP=SOFTCAP, ALIBI=ALIBI,
    )  # fmt: skip
    per_head = PerHead(
        p_out=p_out, p_lse=p_lse, p_slopes=p_slopes, stride_ob=stride_ob, stride_oh=stride_oh, stride_os=stride_os,
        stride_interval=stride_interval, stride_slope=stride_slope, q_heads=q_heads, v_head_dim=v_head_dim,
        CHECK_DV=CHECK_DV,
    )  # fmt: skip
    shape = HopperShape(BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK=BLOCK_N, CONSUMERS=CONSUMERS, STAGES=STAGES)
    rings = ForwardRings(
        q=smem_q, k=smem_k, v=smem_v, plan=smem_plan, own=smem_own, ready_plan=ready_plan, ready_q=ready_q,
        empty_q=empty_q, ready_k=ready_k, ready_v=ready_v, empty_k=empty_k, empty_v=empty_v,
    )  # fmt: skip
    schedule = Schedule(
        p_counter=p_counter, p_tiles=p_tiles, p_blanked=p_blanked, stride_tiles=stride_tiles,
        stride_blanked=stride_blanked, heads=heads, q_heads=q_heads, group_size=group_size,
        heads_together=heads_together, row_blocks=(q_len + ROWS * CONSUMERS - 1) // (ROWS * CONSUMERS),
    )  # fmt: skip
    tensors = ForwardTensors(q=desc_q, k=desc_k, v=desc_v, blanked=desc_blanked)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, rings, per_head, problem, shape)),
                (consume, (1, rings, per_head, problem, shape)),
                (produce, (tensors, rings, schedule, problem, shape)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, rings, per_head, problem, shape)),
                (consume, (1, rings, per_head, problem, shape)),
                (consume, (2, rings, per_head, problem, shape)),
                (produce, (tensors, rings, schedule, problem, shape)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 32],
        )


@gluon.jit
def produce(tensors, rings, schedule, problem, shape):
    """The warp that moves data, and that asks for the next block: Q, then K and V as stages of the rings come free.

    Beyond the edges the copy engine brings zeros. A tile of V in which some keys are seen by no row comes from a copy in which they
    are zeros too.
    """
    CONSUMERS: gl.constexpr = shape.CONSUMERS
    BLOCK_N: gl.constexpr = shape.BLOCK
    block = gl.program_id(0)
    visited, done = 0, 0  # tiles of keys, and blocks of rows, so far
    while block < schedule.heads * schedule.row_blocks:
        i_head, rank = place(block, schedule.row_blocks, schedule.heads, schedule.heads_together)
        i_b, i_h = i_head // schedule.q_heads, i_head % schedule.q_heads
        i_m, first, n_tiles, right_partial, full = key_tiles(
            i_b, rank, schedule.row_blocks, problem, schedule.p_tiles, schedule.stride_tiles, ROWS * CONSUMERS, BLOCK_N
        )
        if problem.MASK == INTERVALS:
            o_own = gl.arange(0, OWN, layout=gl.BlockedLayout([1], [32], [1], [0]))
            p_own = schedule.p_tiles + (i_b * schedule.stride_tiles + rank) * (5 + 4 * CONSUMERS) + 5
            own = gl.load(p_own + o_own, mask=o_own < 4 * CONSUMERS, other=0)
        block = gl.atomic_add(schedule.p_counter, 1) + gl.num_programs(0)
        # Once the Q before the last is no longer needed, its place is free, and nobody reads the plan before that one any more.
        slot = done & 1
        mbarrier.wait(rings.empty_q.index(slot), (done // 2 & 1) ^ 1)
        if problem.MASK == INTERVALS:
            rings.own.index(done % PLANS).store(own)
        announce(rings, done, i_b, i_h, i_m, first, n_tiles, right_partial, full)
        mbarrier.expect(rings.ready_q.index(slot), CONSUMERS * tensors.q.block_type.nbytes)
        for i in gl.static_range(CONSUMERS):
            rows = [i_b, i_h, (i_m * CONSUMERS + i) * ROWS, 0]
            tma.async_copy_global_to_shared(
                tensors.q, rows, rings.ready_q.index(slot), rings.q.index(slot * CONSUMERS + i)
            )
        i_kv = i_h // schedule.group_size
        for i in range(n_tiles):
            tile = first + n_tiles - 1 - i
            stage, phase = (visited + i) % shape.STAGES, (visited + i) // shape.STAGES & 1
            blanked = 0
            if problem.MASK == INTERVALS:
                # It comes while this warp waits.
                blanked = gl.load(schedule.p_blanked + i_b * schedule.stride_blanked + tile)
            mbarrier.wait(rings.empty_k.index(stage), phase ^ 1)
            mbarrier.expect(rings.ready_k.index(stage), tensors.k.block_type.nbytes)
            tma.async_copy_global_to_shared(
                tensors.k, [i_b, i_kv, tile * BLOCK_N, 0], rings.ready_k.index(stage), rings.k.index(stage)
            )
            mbarrier.wait(rings.empty_v.index(stage), phase ^ 1)
            mbarrier.expect(rings.ready_v.index(stage), tensors.v.block_type.nbytes)
            if blanked != 0:
                tma.async_copy_global_to_shared(
                    tensors.blanked, [i_b, i_kv, tile * BLOCK_N, 0], rings.ready_v.index(stage), rings.v.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    tensors.v, [i_b, i_kv, tile * BLOCK_N, 0], rings.ready_v.index(stage), rings.v.index(stage)
                )
        visited += n_tiles
        done += 1
    mbarrier.wait(rings.empty_q.index(done & 1), (done // 2 & 1) ^ 1)
    announce(rings, done, 0, 0, -1, 0, 0, 0, 0)
    # The last program to finish leaves the counters as it found them, for the next launch.
    if gl.atomic_add(schedule.p_counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(schedule.p_counter, 0)
        gl.store(schedule.p_counter + 1, 0)


@gluon.jit
def announce(rings, done, i_b, i_h, i_m, first, n_tiles, right_partial, full):
    """Tell the consumers what comes next: which rows, and which tiles of keys they need. ``i_m`` of -1 says that all is done."""
    slot = done % PLANS * PLAN
    note(rings.plan, slot, i_b)
    note(rings.plan, slot + 1, i_h)
    note(rings.plan, slot + 2, i_m)
    note(rings.plan, slot + 3, first)
    note(rings.plan, slot + 4, n_tiles)
    note(rings.plan, slot + 5, right_partial)
    note(rings.plan, slot + 6, full)
    mbarrier.arrive(rings.ready_plan.index(done % PLANS), count=1)


@gluon.jit
def next_plan(rings, done):
    """What the producer has announced."""
    mbarrier.wait(rings.ready_plan.index(done % PLANS), done // PLANS & 1)
    return noted_place(rings, done), noted_tiles(rings, done)


@gluon.jit
def noted_tiles(rings, done):
    """The first tile of keys, how many, how many of the last are partial, how many then are full."""
    slot = done % PLANS * PLAN
    return (
        noted(rings.plan, slot + 3),
        noted(rings.plan, slot + 4),
        noted(rings.plan, slot + 5),
        noted(rings.plan, slot + 6),
    )


@gluon.jit
def noted_place(rings, done):
    """Batch entry, query head, and block of rows."""
    slot = done % PLANS * PLAN
    return noted(rings.plan, slot), noted(rings.plan, slot + 1), noted(rings.plan, slot + 2)


@gluon.jit
def consume(which, rings, per_head, problem, shape):
    """Four warps that compute 64 rows of each block."""
    visited, done = 0, 0
    if which == shape.CONSUMERS - 1:
        pass_turn(which, shape.CONSUMERS)  # the first consumer begins
    place, tiles = next_plan(rings, done)
    i_b, i_h, i_m = place
    first, n_tiles, right_partial, full = tiles
    while i_m >= 0:
        slope = 0.0
        if problem.ALIBI:
            slope = gl.load(per_head.p_slopes + i_b * per_head.stride_slope + i_h)
        mbarrier.wait(rings.ready_q.index(done & 1), done // 2 & 1)
        q = rings.q.index((done & 1) * shape.CONSUMERS + which).reshape([ROWS, shape.BLOCK_D])
        empty_q = rings.empty_q.index(done & 1)
        b_m, b_l, b_acc = attend(
            which, q, empty_q, done, i_b, i_m, visited, first, n_tiles, right_partial, full, slope, rings, per_head,
            problem, shape,
        )  # fmt: skip
        i_b, i_h, i_m = noted_place(rings, done)  # read again: the loops need every register
        row = (i_m * shape.CONSUMERS + which) * ROWS
        p_block = per_head.p_out + i_b.to(gl.int64) * per_head.stride_ob + i_h.to(gl.int64) * per_head.stride_oh
        p_rows = per_head.p_lse + (i_b * per_head.q_heads + i_h).to(gl.int64) * problem.q_len
        store(p_block, p_rows, b_m, b_l, b_acc, row, per_head, problem, shape)
        visited += n_tiles
        done += 1
        place, tiles = next_plan(rings, done)
        i_b, i_h, i_m = place
        first, n_tiles, right_partial, full = tiles


@gluon.jit
def attend(
    which, q, empty_q, done, i_b, i_m, visited, first, n_tiles, right_partial, full, slope, rings, per_head, problem,
    shape,
):  # fmt: skip
    """Attention of 64 rows over their tiles: the running maximum, the sum of each thread's weights, and the unnormalised output."""
    CONSUMERS: gl.constexpr = shape.CONSUMERS
    STAGES: gl.constexpr = shape.STAGES
    BLOCK_N: gl.constexpr = shape.BLOCK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.BLOCK_DV, 16])
    unit = problem.softcap if problem.SOFTCAP else problem.scale  # what one unit of a score tile is worth
    row = (i_m * CONSUMERS + which) * ROWS
    # They come while the first tile does.
    start, stop = intervals(i_b * per_head.stride_interval, row, problem, s_layout)

    # Of the tiles that a block of rows needs, these 64 of them may need fewer, from the ``skip``-th up to the ``end``-th visited, and
    # what is partial for the block may be full for them. A band is the same for all, but 192 rows are more than a tile has keys.
    skip, end = 0, n_tiles
    if problem.MASK == INTERVALS:
        skip, end, right_partial, full = own_tiles(rings, done, which, first, n_tiles)
    if problem.MASK == BAND and problem.HAS_RIGHT and CONSUMERS == 3:
        own_stop = gl.minimum(row + ROWS + problem.offset + problem.right, problem.kv_len)
        own_last = gl.maximum((own_stop + BLOCK_N - 1) // BLOCK_N, first + 1)
        skip = gl.maximum(first + n_tiles - own_last, 0)
        if not problem.HAS_LEFT:
            seen_by_all = gl.maximum(gl.minimum(row + problem.offset + problem.right + 1, problem.kv_len), 0) // BLOCK_N
            right_partial = gl.maximum(n_tiles - seen_by_all, 0)
            full = n_tiles - right_partial
    pass_over(0, skip, which, visited, rings, shape)

    # The first tile has no P V of a tile before it to run beside.
    stage, phase = (visited + skip) % STAGES, (visited + skip) // STAGES & 1
    mbarrier.wait(rings.ready_k.index(stage), phase)
    k = rings.k.index(stage).reshape([BLOCK_N, shape.BLOCK_D])
    b_s = warpgroup_mma(
        q, k.permute((1, 0)), gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout), use_acc=False, is_async=True
    )
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(rings.empty_k.index(stage), count=1)
    n = (first + n_tiles - 1 - skip) * BLOCK_N
    b_s = score(b_s, row, n, start, stop, slope / unit, problem, s_layout, True)
    b_m = gl.max(b_s, 1)
    left_s, right_s = halves(b_s)
    left_p, right_p = (
        weights(left_s, finite(b_m, True), unit * LOG2_E),
        weights(right_s, finite(b_m, True), unit * LOG2_E),
    )
    b_l = thread_sums(left_p) + thread_sums(right_p)
    p_left, p_right = pack(left_p, rings.v.dtype), pack(right_p, rings.v.dtype)
    b_acc = gl.zeros([ROWS, shape.BLOCK_DV], gl.float32, o_layout)

    b_m, b_l, b_acc, p_left, p_right = turns(
        skip + 1, gl.maximum(right_partial, skip + 1), which, b_m, b_l, b_acc, p_left, p_right, q, start, stop, visited,
        row, first + n_tiles - 1, slope, rings, problem, shape, s_layout, o_layout, True,
    )  # fmt: skip
    b_m, b_l, b_acc, p_left, p_right = turns(
        gl.maximum(right_partial, skip + 1), right_partial + full, which, b_m, b_l, b_acc, p_left, p_right, q, start,
        stop, visited, row, first + n_tiles - 1, slope, rings, problem, shape, s_layout, o_layout, False,
    )  # fmt: skip
    if problem.HAS_LEFT or problem.MASK == INTERVALS:
        # Looked up again: the loop over the full tiles needs every register. That is quick but for the intervals, which are in memory
        # and are kept if nothing else takes the registers.
        i_b, _, i_m = noted_place(rings, done)
        row = (i_m * CONSUMERS + which) * ROWS
        if CONSUMERS == 3 or problem.SOFTCAP or problem.ALIBI or per_head.CHECK_DV:
            start, stop = intervals(i_b * per_head.stride_interval, row, problem, s_layout)
        if problem.MASK == INTERVALS:
            first, n_tiles, right_partial, full = noted_tiles(rings, done)
            skip, end, right_partial, full = own_tiles(rings, done, which, first, n_tiles)
        b_m, b_l, b_acc, p_left, p_right = turns(
            right_partial + full, end, which, b_m, b_l, b_acc, p_left, p_right, q, start, stop, visited, row, first +
            n_tiles - 1, slope, rings, problem, shape, s_layout, o_layout, True,
        )  # fmt: skip

    mbarrier.arrive(empty_q, count=1)
    stage, phase = (visited + end - 1) % STAGES, (visited + end - 1) // STAGES & 1
    mbarrier.wait(rings.ready_v.index(stage), phase)
    v = rings.v.index(stage).reshape([BLOCK_N, shape.BLOCK_DV])
    b_p = unpack(halves_joined(p_left, p_right), rings.v.dtype, o_layout)
    b_acc = warpgroup_mma(b_p, v, b_acc, is_async=True)
    b_acc, b_p = warpgroup_mma_wait(0, deps=(b_acc, b_p))
    mbarrier.arrive(rings.empty_v.index(stage), count=1)
    pass_over(end, n_tiles, which, visited, rings, shape)
    return b_m, b_l, b_acc


@gluon.jit
def own_tiles(rings, done, which, first, n_tiles):
    """Of the tiles that a block of rows needs under row intervals, those of one consumer, in the order of their visits: the first, one
    past the last, one past the partial ones at the beginning, and how many then are full."""
    layout: gl.constexpr = gl.BlockedLayout([OWN], [32], [4], [0])  # each thread holds them all
    numbers = rings.own.index(done % PLANS).load(layout)
    which_number = gl.arange(0, OWN, layout=layout) - which * 4
    own_first = gl.sum(gl.where(which_number == 0, numbers, 0), 0)
    own_n = gl.sum(gl.where(which_number == 1, numbers, 0), 0)
    own_right_partial = gl.sum(gl.where(which_number == 2, numbers, 0), 0)
    own_full = gl.sum(gl.where(which_number == 3, numbers, 0), 0)
    skip = first + n_tiles - own_first - own_n
    return skip, skip + own_n, skip + own_right_partial, own_full


@gluon.jit
def pass_over(from_tile, to_tile, which, visited, rings, shape):
    """Give back tiles that only other consumers need, in turn as if they had been used."""
    for i in range(from_tile, to_tile):
        stage, phase = (visited + i) % shape.STAGES, (visited + i) // shape.STAGES & 1
        wait_turn(which)
        pass_turn(which, shape.CONSUMERS)
        mbarrier.wait(rings.ready_k.index(stage), phase)
        mbarrier.arrive(rings.empty_k.index(stage), count=1)
        mbarrier.wait(rings.ready_v.index(stage), phase)
        mbarrier.arrive(rings.empty_v.index(stage), count=1)


@gluon.jit
def turns(
    from_tile, to_tile, which, b_m, b_l, b_acc, p_left, p_right, q, start, stop, visited, row, last_tile, slope, rings,
    problem, shape, s_layout: gl.constexpr, o_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The tiles from the ``from_tile``-th visited on. Each turn starts S of one tile, then P V of the one before, and computes
    the softmax of S while the latter runs."""
    STAGES: gl.constexpr = shape.STAGES
    BLOCK_N: gl.constexpr = shape.BLOCK
    unit = problem.softcap if problem.SOFTCAP else problem.scale
    for i in range(from_tile, to_tile):
        stage, phase = (visited + i) % STAGES, (visited + i) // STAGES & 1
        before, before_phase = (visited + i - 1) % STAGES, (visited + i - 1) // STAGES & 1
        wait_turn(which)
        mbarrier.wait(rings.ready_k.index(stage), phase)
        k = rings.k.index(stage).reshape([BLOCK_N, shape.BLOCK_D])
        b_s = warpgroup_mma(
            q, k.permute((1, 0)), gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout), use_acc=False, is_async=True
        )
        mbarrier.wait(rings.ready_v.index(before), before_phase)
        v = rings.v.index(before).reshape([BLOCK_N, shape.BLOCK_DV])
        b_p = unpack(halves_joined(p_left, p_right), rings.v.dtype, o_layout)
        b_acc = warpgroup_mma(b_p, v, b_acc, is_async=True)
        pass_turn(which, shape.CONSUMERS)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        mbarrier.arrive(rings.empty_k.index(stage), count=1)
        b_s = score(b_s, row, (last_tile - i) * BLOCK_N, start, stop, slope / unit, problem, s_layout, MASKED)
        m_new = gl.maximum(b_m, gl.max(b_s, 1))
        pivot = finite(m_new, MASKED)
        rescale = gl.exp2((b_m - pivot) * (unit * LOG2_E))
        b_m = m_new
        # Half of the weights, then P V, which must be done before its P is overwritten, then the other half. The assembler moves the
        # wait up, above all of them, if it stands in their basic block, and then nothing overlaps. Waiting for a barrier that is
        # already complete costs nothing and ends the block.
        left_s, right_s = halves(b_s)
        left_p = weights(left_s, pivot, unit * LOG2_E)
        mbarrier.wait(rings.ready_k.index(stage), phase)
        b_acc, b_p = warpgroup_mma_wait(0, deps=(b_acc, b_p))
        mbarrier.arrive(rings.empty_v.index(before), count=1)
        right_p = weights(right_s, pivot, unit * LOG2_E)
        l_rescale = gl.convert_layout(rescale, gl.SliceLayout(1, b_l.type.layout), assert_trivial=True)
        b_l = b_l * l_rescale[:, None] + (thread_sums(left_p) + thread_sums(right_p))
        b_acc = b_acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
        p_left, p_right = pack(left_p, rings.v.dtype), pack(right_p, rings.v.dtype)
    return b_m, b_l, b_acc, p_left, p_right


@gluon.jit
def wait_turn(which):
    """Wait until the consumer before this one has started its products: all threads of both meet at a hardware barrier."""
    meet("bar.sync $1, 256; mov.b32 $0, $1;", which)


@gluon.jit
def pass_turn(which, CONSUMERS: gl.constexpr):
    """Let the next consumer start its products, and go on."""
    meet("bar.arrive $1, 256; mov.b32 $0, $1;", (which + 1) % CONSUMERS)


@gluon.jit
def meet(instruction: gl.constexpr, which):
    threads = gl.full([128], FIRST_TURN, gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + which
    gl.inline_asm_elementwise(instruction, "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def intervals(entry, row, problem, s_layout: gl.constexpr):
    """Which keys each of 64 rows sees, ``(start, stop)``, under row intervals; rows past the end, all. Other masks are computed
    where they are needed."""
    o_m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    start, stop = o_m, o_m
    if problem.MASK == INTERVALS:
        start = gl.load(problem.p_start + entry + o_m, mask=o_m < problem.q_len, other=0)
        stop = gl.load(problem.p_stop + entry + o_m, mask=o_m < problem.q_len, other=problem.kv_len)
    return start, stop


@gluon.jit
def score(b_s, row, n, start, stop, slope, problem, s_layout: gl.constexpr, MASKED: gl.constexpr):
    """Raw products to scores: softcap, ALiBi, mask. Rows past the end see what they like: they are not stored."""
    o_m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    o_n = n + gl.arange(0, b_s.shape[1], layout=gl.SliceLayout(0, s_layout))
    if problem.SOFTCAP:
        # tanh; its error near 0, where this subtracts two numbers close to 1, is far below a rounding of 16-bit inputs
        b_s = 1.0 - 2.0 / (gl.exp2(b_s * (problem.scale / problem.softcap * 2.0 * LOG2_E)) + 1.0)
    if problem.ALIBI:
        b_s = b_s - slope * gl.abs(o_m[:, None] + problem.offset - o_n[None, :]).to(gl.float32)
    if MASKED:
        if problem.MASK != INTERVALS:
            start, stop = o_m, gl.zeros_like(o_m) + problem.kv_len
            if problem.HAS_LEFT:
                start = o_m + problem.offset - problem.left
            if problem.HAS_RIGHT:
                stop = gl.minimum(stop, o_m + problem.offset + problem.right + 1)
        if problem.MASK == INTERVALS or problem.HAS_LEFT:
            b_s = gl.where(o_n[None, :] >= start[:, None], b_s, float("-inf"))
        b_s = gl.where(o_n[None, :] < stop[:, None], b_s, float("-inf"))
    return b_s


@gluon.jit
def finite(b_m, MASKED: gl.constexpr):
    """What scores are measured against: their maximum, or 0 for a row that has seen nothing yet."""
    return gl.where(b_m == float("-inf"), 0.0, b_m) if MASKED else b_m


@gluon.jit
def weights(b_s, pivot, unit):
    pivot = gl.convert_layout(pivot, gl.SliceLayout(1, b_s.type.layout), assert_trivial=True)
    return gl.exp2(b_s * unit - (pivot * unit)[:, None])


@gluon.jit
def halves(b_s):
    """The left and the right half of the columns, which stay in the registers where they are."""
    return b_s.reshape([b_s.shape[0], 2, b_s.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def halves_joined(left, right):
    """What ``halves`` split."""
    return gl.join(left, right).permute((0, 2, 1)).reshape([left.shape[0], 2 * left.shape[1]])


@gluon.jit
def thread_sums(b_p):
    """The sum of what each thread holds of a row, ``[64, 4]``: the four threads of a row add up once, at the end."""
    b_p = b_p.reshape([b_p.shape[0], b_p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(b_p, 3), 1)


@gluon.jit
def store(p_out, p_lse, b_m, b_l, b_acc, row, per_head, problem, shape):
    """Normalise 64 rows and write them and their LSE. A row that saw nothing has l = 0: it gives 0, and an LSE of -inf."""
    BLOCK_DV: gl.constexpr = shape.BLOCK_DV
    unit = problem.softcap if problem.SOFTCAP else problem.scale
    b_l = gl.convert_layout(gl.sum(b_l, 1), b_m.type.layout)
    b_norm = gl.where(b_l == 0.0, 1.0, 1.0 / b_l)
    b_out = b_acc * gl.convert_layout(b_norm, gl.SliceLayout(1, b_acc.type.layout))[:, None]
    o_m = row + gl.arange(0, ROWS, layout=b_m.type.layout)
    gl.store(p_lse + o_m, b_m * unit + gl.log2(b_l) * LN_2, mask=o_m < problem.q_len)
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
    b_out = gl.convert_layout(b_out.to(p_out.dtype.element_ty), out_layout)
    o_rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
    o_dv = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, out_layout))
    m_out = o_rows[:, None] < problem.q_len
    if per_head.CHECK_DV:
        m_out = m_out & (o_dv[None, :] < per_head.v_head_dim)
    gl.store(p_out + o_rows.to(gl.int64)[:, None] * per_head.stride_os + o_dv[None, :], b_out, mask=m_out)
