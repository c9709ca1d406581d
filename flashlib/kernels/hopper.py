"""FlashAttention forward for Hopper GPUs, warp-specialised, in Gluon (Shah et al. 2024, arXiv 2407.08608, sections 3.1 and 3.2).

Triton's language leaves to the compiler who does what. Gluon lets one say it: in each program one warp only moves K and V into
shared memory (the producer), and two or three groups of four warps only compute, 64 rows each (the consumers). They meet at
barriers in shared memory: "ready" once a tile has arrived, "empty" once every consumer is done with it.

Within a consumer the two matrix products run asynchronously, so that while the tensor cores form P V of one tile, the softmax
of the next is computed.

Tiles of keys are visited from the last to the first: under a causal mask the partial ones are then the first few, under a
window also the last few.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from flashlib.kernels.common import BAND, INTERVALS, LN_2, LOG2_E

# Of flashlib.kernels.common only the constants serve here: its functions are Triton's and cannot be called from Gluon.
ROWS = gl.constexpr(64)  # of one consumer: what one warpgroup's instruction takes


@gluon.jit(do_not_specialize=["stride_interval", "stride_slope", "q_heads", "group_size", "q_len", "kv_len", "offset", "left", "right"])  # fmt: skip
def hopper_forward(
    desc_q, desc_k, desc_v, p_out, p_lse, p_start, p_stop, p_slopes, stride_ob, stride_oh, stride_os, stride_interval, stride_slope,
    q_heads, group_size, q_len, kv_len, offset, left, right, scale, softcap, v_head_dim, CHECK_DV: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """``64 * CONSUMERS`` rows of one query head. The keys given are those that some row sees, so that none need be blanked."""
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    row_blocks = (q_len + BLOCK_M - 1) // BLOCK_M
    i_head = gl.program_id(0) // row_blocks
    i_m = row_blocks - 1 - gl.program_id(0) % row_blocks
    i_b, i_h = i_head // q_heads, i_head % q_heads
    i_kv = i_h // group_size
    row = i_m * BLOCK_M
    if MASK == INTERVALS:
        p_start += i_b.to(gl.int64) * stride_interval
        p_stop += i_b.to(gl.int64) * stride_interval
    tiles, right_partial, full = key_tiles(
        row, q_len, kv_len, offset, left, right, p_start, p_stop, BLOCK_M, BLOCK_N, MASK, HAS_LEFT, HAS_RIGHT
    )
    first_tile, n_tiles = tiles

    smem_q = gl.allocate_shared_memory(desc_q.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], desc_q.layout)
    smem_k = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], desc_k.layout)
    smem_v = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], desc_v.layout)
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

    p_out += i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_lse += i_head.to(gl.int64) * q_len
    slope = 0.0
    if ALIBI:
        slope = gl.load(p_slopes + i_b * stride_slope + i_h)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (0, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, p_out, p_lse, p_start, p_stop, stride_os,
                       row, first_tile, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, slope,
                       v_head_dim, CHECK_DV, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI)),
            (consume, (1, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, p_out, p_lse, p_start, p_stop, stride_os,
                       row, first_tile, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, slope,
                       v_head_dim, CHECK_DV, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI)),
            (produce, (desc_q, desc_k, desc_v, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, i_b, i_h, i_kv, row,
                       first_tile, n_tiles, CONSUMERS, BLOCK_N, STAGES)),
        ], [4, 1], [CONSUMER_REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (0, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, p_out, p_lse, p_start, p_stop, stride_os,
                       row, first_tile, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, slope,
                       v_head_dim, CHECK_DV, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI)),
            (consume, (1, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, p_out, p_lse, p_start, p_stop, stride_os,
                       row, first_tile, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, slope,
                       v_head_dim, CHECK_DV, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI)),
            (consume, (2, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, p_out, p_lse, p_start, p_stop, stride_os,
                       row, first_tile, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, slope,
                       v_head_dim, CHECK_DV, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI)),
            (produce, (desc_q, desc_k, desc_v, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, i_b, i_h, i_kv, row,
                       first_tile, n_tiles, CONSUMERS, BLOCK_N, STAGES)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24])  # fmt: skip


@gluon.jit
def row_intervals(
    o_rows, q_len, kv_len, offset, left, right, p_start, p_stop, MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):  # fmt: skip
    """First visible key, and one past the last, of each row. A row past the end sees nothing."""
    m_rows = o_rows < q_len
    start = gl.zeros_like(o_rows)
    stop = gl.zeros_like(o_rows) + kv_len
    if MASK == INTERVALS:
        start = gl.load(p_start + o_rows, mask=m_rows, other=0)
        stop = gl.load(p_stop + o_rows, mask=m_rows, other=0)
    if MASK == BAND:
        if HAS_LEFT:
            start = gl.maximum(start, o_rows + offset - left)
        if HAS_RIGHT:
            stop = gl.minimum(stop, o_rows + offset + right + 1)
    return start, gl.where(m_rows, stop, start)


@gluon.jit
def key_tiles(
    row, q_len, kv_len, offset, left, right, p_start, p_stop, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Which tiles of keys these rows need: ``(the first, how many)``, how many of the last are partial, how many then are full.

    At least one tile is visited, so that a program whose rows see nothing needs no code of its own.
    """
    WIDTH: gl.constexpr = 256  # rows per block are no power of two when there are three consumers
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    o_rows = row + gl.arange(0, WIDTH, layout=layout)
    m_rows = (o_rows < q_len) & (o_rows < row + BLOCK_M)
    start, stop = row_intervals(o_rows, q_len, kv_len, offset, left, right, p_start, p_stop, MASK, HAS_LEFT, HAS_RIGHT)
    sees = m_rows & (start < stop)
    first = gl.min(gl.where(sees, start, kv_len), 0) // BLOCK_N
    last = (gl.max(gl.where(sees, stop, 0), 0) + BLOCK_N - 1) // BLOCK_N
    full_first = (gl.max(gl.where(m_rows, start, 0), 0) + BLOCK_N - 1) // BLOCK_N
    full_last = gl.min(gl.where(m_rows, gl.maximum(stop, start), kv_len), 0) // BLOCK_N
    full_last = gl.where(gl.max((m_rows & (start >= stop)).to(gl.int32), 0) > 0, 0, full_last)
    first = gl.minimum(first, gl.maximum(last - 1, 0))
    n_tiles = gl.maximum(last - first, 1)
    full_first = gl.minimum(gl.maximum(full_first, first), first + n_tiles)
    full_last = gl.minimum(gl.maximum(full_last, full_first), first + n_tiles)
    return (first, n_tiles), first + n_tiles - full_last, full_last - full_first


@gluon.jit
def produce(
    desc_q, desc_k, desc_v, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, i_b, i_h, i_kv, row, first_tile,
    n_tiles, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that moves data: Q once, then K and V as stages of the rings come free. Beyond the edges it brings zeros."""
    mbarrier.expect(ready_q, CONSUMERS * desc_q.block_type.nbytes)
    for i in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(desc_q, [i_b, i_h, row + i * ROWS, 0], ready_q, smem_q.index(i))
    for i in range(n_tiles):
        n = (first_tile + n_tiles - 1 - i) * BLOCK_N
        stage, phase = i % STAGES, i // STAGES & 1
        mbarrier.wait(empty_k.index(stage), phase ^ 1)
        mbarrier.expect(ready_k.index(stage), desc_k.block_type.nbytes)
        tma.async_copy_global_to_shared(desc_k, [i_b, i_kv, n, 0], ready_k.index(stage), smem_k.index(stage))
        mbarrier.wait(empty_v.index(stage), phase ^ 1)
        mbarrier.expect(ready_v.index(stage), desc_v.block_type.nbytes)
        tma.async_copy_global_to_shared(desc_v, [i_b, i_kv, n, 0], ready_v.index(stage), smem_v.index(stage))


@gluon.jit
def consume(
    which, smem_q, smem_k, smem_v, ready_q, ready_k, ready_v, empty_k, empty_v, p_out, p_lse, p_start, p_stop, stride_os,
    row, first_tile, n_tiles, right_partial, full, q_len, kv_len, offset, left, right, scale, softcap, slope, v_head_dim,
    CHECK_DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """Four warps that compute 64 rows."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    unit = softcap if SOFTCAP else scale  # what one unit of a score tile is worth
    o_m = row + which * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    start, stop = row_intervals(o_m, q_len, kv_len, offset, left, right, p_start, p_stop, MASK, HAS_LEFT, HAS_RIGHT)
    b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    b_l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    b_acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, o_layout)
    q = smem_q.index(which).reshape([ROWS, BLOCK_D])

    # The first tile has no P V of a tile before it to run beside.
    mbarrier.wait(ready_q, 0)
    mbarrier.wait(ready_k.index(0), 0)
    k = smem_k.index(0).reshape([BLOCK_N, BLOCK_D])
    b_s = warpgroup_mma(
        q, k.permute((1, 0)), gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout), use_acc=False, is_async=True
    )
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(empty_k.index(0), count=1)
    n = (first_tile + n_tiles - 1) * BLOCK_N
    b_s = score(b_s, o_m, n, start, stop, offset, scale, softcap, slope / unit, BLOCK_N, s_layout, True, SOFTCAP, ALIBI)
    b_m, b_l, b_p, _ = softmax(b_s, b_m, b_l, unit * LOG2_E, True)
    b_p = gl.convert_layout(b_p.to(smem_v.dtype), gl.DotOperandLayout(0, o_layout, 2))

    b_m, b_l, b_acc, b_p = attend(
        1, gl.maximum(right_partial, 1), b_m, b_l, b_acc, b_p, q, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v, o_m, start, stop,
        first_tile, n_tiles, offset, scale, softcap, slope, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, s_layout, o_layout, True, SOFTCAP, ALIBI,
    )  # fmt: skip
    b_m, b_l, b_acc, b_p = attend(
        gl.maximum(right_partial, 1), right_partial + full, b_m, b_l, b_acc, b_p, q, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v,
        o_m, start, stop, first_tile, n_tiles, offset, scale, softcap, slope, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, s_layout, o_layout,
        False, SOFTCAP, ALIBI,
    )  # fmt: skip
    if HAS_LEFT or MASK == INTERVALS:
        b_m, b_l, b_acc, b_p = attend(
            gl.maximum(right_partial + full, 1), n_tiles, b_m, b_l, b_acc, b_p, q, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v, o_m,
            start, stop, first_tile, n_tiles, offset, scale, softcap, slope, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, s_layout, o_layout,
            True, SOFTCAP, ALIBI,
        )  # fmt: skip

    stage, phase = (n_tiles - 1) % STAGES, (n_tiles - 1) // STAGES & 1
    mbarrier.wait(ready_v.index(stage), phase)
    v = smem_v.index(stage).reshape([BLOCK_N, BLOCK_DV])
    b_acc = warpgroup_mma(b_p, v, b_acc, is_async=True)
    b_acc, b_p = warpgroup_mma_wait(0, deps=(b_acc, b_p))

    # A row that saw nothing has l = 0: it gives 0, and an LSE of -inf.
    b_norm = gl.where(b_l == 0.0, 1.0, 1.0 / b_l)
    b_out = b_acc * gl.convert_layout(b_norm, gl.SliceLayout(1, o_layout))[:, None]
    gl.store(p_lse + o_m, b_m * unit + gl.log2(b_l) * LN_2, mask=o_m < q_len)
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
    b_out = gl.convert_layout(b_out.to(p_out.dtype.element_ty), out_layout)
    o_rows = row + which * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
    o_dv = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, out_layout))
    m_out = o_rows[:, None] < q_len
    if CHECK_DV:
        m_out = m_out & (o_dv[None, :] < v_head_dim)
    gl.store(p_out + o_rows.to(gl.int64)[:, None] * stride_os + o_dv[None, :], b_out, mask=m_out)


@gluon.jit
def attend(
    from_tile, to_tile, b_m, b_l, b_acc, b_p, q, smem_k, smem_v, ready_k, ready_v, empty_k, empty_v, o_m, start, stop, first_tile,
    n_tiles, offset, scale, softcap, slope, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
    ALIBI: gl.constexpr,
):  # fmt: skip
    """The tiles from the ``from_tile``-th visited on. Each turn starts S of one tile, then P V of the one before, and computes
    the softmax of S while the latter runs."""
    unit = softcap if SOFTCAP else scale
    for i in range(from_tile, to_tile):
        stage, phase = i % STAGES, i // STAGES & 1
        before, before_phase = (i - 1) % STAGES, (i - 1) // STAGES & 1
        mbarrier.wait(ready_k.index(stage), phase)
        k = smem_k.index(stage).reshape([BLOCK_N, BLOCK_D])
        b_s = warpgroup_mma(
            q, k.permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, s_layout), use_acc=False, is_async=True
        )
        mbarrier.wait(ready_v.index(before), before_phase)
        v = smem_v.index(before).reshape([BLOCK_N, BLOCK_DV])
        b_acc = warpgroup_mma(b_p, v, b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        mbarrier.arrive(empty_k.index(stage), count=1)
        n = (first_tile + n_tiles - 1 - i) * BLOCK_N
        b_s = score(
            b_s, o_m, n, start, stop, offset, scale, softcap, slope / unit, BLOCK_N, s_layout, MASKED, SOFTCAP, ALIBI
        )
        b_m, b_l, p_new, rescale = softmax(b_s, b_m, b_l, unit * LOG2_E, MASKED)
        # The assembler moves the wait below up, above the softmax, as long as both stand in one basic block, and then nothing
        # overlaps. Waiting for a barrier that is already complete costs nothing and ends the block.
        mbarrier.wait(ready_k.index(stage), phase)
        b_acc, b_p = warpgroup_mma_wait(0, deps=(b_acc, b_p))
        mbarrier.arrive(empty_v.index(before), count=1)
        b_acc = b_acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
        b_p = gl.convert_layout(p_new.to(smem_v.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return b_m, b_l, b_acc, b_p


@gluon.jit
def score(
    b_s, o_m, n, start, stop, offset, scale, softcap, slope, BLOCK_N: gl.constexpr, s_layout: gl.constexpr, MASKED: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """Raw products to scores: softcap, ALiBi, mask."""
    o_n = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    if SOFTCAP:
        # tanh; its error near 0, where this subtracts two numbers close to 1, is far below a rounding of 16-bit inputs
        b_s = 1.0 - 2.0 / (gl.exp2(b_s * (scale / softcap * 2.0 * LOG2_E)) + 1.0)
    if ALIBI:
        b_s = b_s - slope * gl.abs(o_m[:, None] + offset - o_n[None, :]).to(gl.float32)
    if MASKED:
        b_s = gl.where((o_n[None, :] >= start[:, None]) & (o_n[None, :] < stop[:, None]), b_s, float("-inf"))
    return b_s


@gluon.jit
def softmax(b_s, b_m, b_l, unit, MASKED: gl.constexpr):
    """One step of online softmax: the new maximum and sum, the weights, and the factor for what was summed before."""
    m_new = gl.maximum(b_m, gl.max(b_s, 1))
    pivot = gl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    b_p = gl.exp2(b_s * unit - (pivot * unit)[:, None])
    rescale = gl.exp2((b_m - pivot) * unit)
    return m_new, b_l * rescale + gl.sum(b_p, 1), b_p, rescale
