"""Split-KV decoding in Triton (flash-decoding; Dao, Haziza, Massa and Sizov 2023, pytorch.org/blog/flash-decoding).

With one query token there is one row of work per head, and a GPU of 132 multiprocessors would stand idle while 8 of them read the
keys. So the keys of each request are cut into splits, one program each, and the partial results are merged.

One program computes one split for all query rows that share a KV head: the heads of the group times the query tokens, packed into
one tile, so that K and V are read once for all of them. Everything is transposed: ``S^T = K Q^T`` and ``O^T = V^T P^T``. A tensor
core's instruction is tall (64 rows on Hopper) and may be narrow, and here the keys are many and the query rows few.
"""

import triton
import triton.language as tl

from flashlib.kernels.bundles import Cached, Pages, Problem, Results, Splits
from flashlib.kernels.combine import merge_splits, store_rows
from flashlib.kernels.common import BAND, LN_2, LOG2_E, cap, load_tile, score_unit

# How a tile of keys lies in pages.
IN_A_PAGE = tl.constexpr(0)  # in a single one, as all tiles of a contiguous cache do
OF_PAGES = tl.constexpr(1)  # it is several whole pages
ACROSS_PAGES = tl.constexpr(2)  # it may begin and end anywhere in a page


@triton.jit(
    do_not_specialize=[
        "q_heads", "q_len", "n_rows", "capacity", "fewest_splits", "split_size", "left", "right", "stride_table",
        "n_pages",
    ]
)  # fmt: skip
def decode_split(
    p_q, p_k, p_v, p_out, p_lse, p_partial_out, p_partial_lse, p_arrivals, p_lengths, p_table, stride_qb, stride_qh,
    stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_table, n_pages, q_heads, q_len,
    row_blocks, n_rows, capacity, fewest_splits, split_size, left, right, scale, softcap, head_dim, v_head_dim,
    CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
    FIXED_SIZE: tl.constexpr, MERGE: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one request and KV head, for ``BLOCK_M`` of the query rows that see them.

    A length that is none, below 0 or beyond the capacity, gives NaN, and so do rows that see a page that is none, not one of ``n_pages``.
    For neither is anything read.

    PAGE_SIZE is 0 for a contiguous cache. TILE says how tiles of keys lie in pages: IN_A_PAGE, OF_PAGES or ACROSS_PAGES. With MERGE the
    last program to finish merges the splits; without it they are left for :func:`flashlib.kernels.combine.combine`.
    """
    i_m, i_kv = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    i_split, i_b = tl.program_id(1), tl.program_id(2)
    o_head, o_token, o_rows = query_rows(i_b, i_kv, i_m * BLOCK_M, q_heads, q_len, GROUP_SIZE, BLOCK_M)
    m_rows = o_token < q_len
    o_n, o_d, o_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    # q [BLOCK_D, BLOCK_M]. Asked for first, so that it is on its way while the length is.
    o_q = o_head.to(tl.int64) * stride_qh + o_token.to(tl.int64) * stride_qs
    b_q = tl.trans(load_tile(p_q + i_b.to(tl.int64) * stride_qb, o_q, o_d, 1, m_rows, head_dim, True, CHECK_D))
    b_l = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # summed over the keys once, at the end
    length = capacity
    if p_lengths is not None:
        given = tl.load(p_lengths + i_b)
        length = tl.where((given >= 0) & (given <= capacity), given, 0).to(tl.int32)
        b_l += tl.where(length == given, 0.0, float("nan"))
    problem = Problem(
        q_len=q_len, kv_len=length, offset=length - q_len, left=left, right=right, p_start=None, p_stop=None,
        scale=scale, softcap=softcap, MASK=BAND, HAS_LEFT=HAS_LEFT, HAS_RIGHT=HAS_RIGHT, SOFTCAP=SOFTCAP, ALIBI=0,
    )  # fmt: skip
    start, stop = visible_keys(o_token, problem)
    stop = tl.where(m_rows, stop, 0)
    # The rows see a growing range of keys: together, from the first token's first key to the last token's last.
    first_token = i_m * BLOCK_M // GROUP_SIZE
    last_token = tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // GROUP_SIZE, q_len - 1)
    first, _ = visible_keys(first_token, problem)
    _, last = visible_keys(last_token, problem)
    begin, size, n_live = splits_of(first, last, fewest_splits, split_size, BLOCK_N, FIXED_SIZE)
    if MERGE and i_split >= n_live:
        return
    begin += i_split * size
    end = tl.minimum(begin + size, last)
    begin = tl.maximum(begin, first // BLOCK_N * BLOCK_N)

    p_k += i_kv.to(tl.int64) * stride_kh
    p_v += i_kv.to(tl.int64) * stride_vh
    if PAGE_SIZE > 0:
        p_table += i_b.to(tl.int64) * stride_table
    pages = Pages(p_table=p_table, i_b=i_b, PAGE_SIZE=PAGE_SIZE, TILE=TILE, BLOCK_N=BLOCK_N)
    k = Cached(p_base=p_k, stride_page=stride_kb, stride_key=stride_ks, n_cols=head_dim, CHECK_COLS=CHECK_D)
    v = Cached(p_base=p_v, stride_page=stride_vb, stride_key=stride_vs, n_cols=v_head_dim, CHECK_COLS=CHECK_DV)
    page = pages_of(pages, begin, first, end)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_acc = tl.zeros([BLOCK_DV, BLOCK_M], tl.float32)
    unit = score_unit(problem)
    for n in tl.range(begin, end, BLOCK_N):
        o_keys = n + o_n
        # Keys that none of these rows see are not read: they count as 0.
        m_keys = (o_keys >= first) & (o_keys < end)
        if PAGE_SIZE > 0:
            m_pages = (page >= 0) & (page < n_pages)
            m_keys = m_keys & m_pages
        # k [BLOCK_N, BLOCK_D], s [BLOCK_N, BLOCK_M]
        b_k = load_keys(k, pages, page, n, o_d, m_keys)
        b_s = cap(tl.dot(b_k, b_q, input_precision=PRECISION), problem)
        if PAGE_SIZE > 0:
            no_score = tl.where(m_pages, 0.0, float("nan"))
            b_s += no_score if TILE == IN_A_PAGE else no_score[:, None]
        m_pairs = (o_keys[:, None] >= start[None, :]) & (o_keys[:, None] < tl.minimum(stop, end)[None, :])
        b_s = tl.where(m_pairs, b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 0))
        # A row that has seen nothing keeps m = -inf, and -inf - -inf is NaN: subtract 0 there.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        # Subtract first, and scale then. The difference of two products would be a fused multiply-add, which rounds only one of them:
        # where the maximum stays, rescale would miss 1 by that rounding, and a long request has as many of these factors as tiles.
        b_p = tl.exp2((b_s - pivot[None, :]) * (unit * LOG2_E))
        rescale = tl.exp2((b_m - pivot) * (unit * LOG2_E))
        b_l = b_l * rescale[None, :] + b_p
        b_v = load_keys(v, pages, page, n, o_dv, m_keys)
        # The next tile's pages are looked up while this one is worked on.
        page = pages_of(pages, n + BLOCK_N, first, end)
        b_acc = tl.dot(tl.trans(b_v), b_p.to(b_v.dtype), b_acc * rescale[None, :], input_precision=PRECISION)
        b_m = m_new

    # A row that saw nothing has l = 0: it gives 0, and an LSE of -inf.
    b_l = tl.sum(b_l, 0)
    b_out = tl.trans(b_acc / tl.where(b_l == 0.0, 1.0, b_l)[None, :])
    b_lse = b_m * unit + tl.log2(b_l) * LN_2
    p_split_out = p_partial_out + i_split.to(tl.int64) * n_rows * v_head_dim
    p_split_lse = p_partial_lse + i_split.to(tl.int64) * n_rows
    split = Results(p_out=p_split_out, p_lse=p_split_lse, v_head_dim=v_head_dim, BLOCK_DV=BLOCK_DV)
    results = Results(p_out=p_out, p_lse=p_lse, v_head_dim=v_head_dim, BLOCK_DV=BLOCK_DV)
    if not MERGE:
        store_rows(split, b_out, b_lse, o_rows, m_rows)
    elif n_live == 1:
        store_rows(results, b_out, b_lse, o_rows, m_rows)
    else:
        store_rows(split, b_out, b_lse, o_rows, m_rows)
        if arrives_last(p_arrivals + i_b * tl.num_programs(0) + tl.program_id(0), n_live):
            splits = Splits(
                p_out=p_partial_out, p_lse=p_partial_lse, n_rows=n_rows, n_splits=n_live, v_head_dim=v_head_dim,
                BLOCK_DV=BLOCK_DV, SPLITS=MERGE_SPLITS,
            )  # fmt: skip
            merge_tile(splits, results, i_b, i_kv, i_m * BLOCK_M, q_heads, q_len, GROUP_SIZE, BLOCK_M, MERGE_ROWS)


@triton.jit
def arrives_last(p_arrival, n_programs):
    """Whether all other programs of a set have come here before, so that what they wrote can be read. Counts in a 0, and leaves a 0."""
    # One thread counts for all of its program: each of them must have written its share by then.
    tl.debug_barrier()
    is_last = tl.atomic_add(p_arrival, 1, sem="acq_rel") == n_programs - 1
    if is_last:
        tl.store(p_arrival, 0)
    return is_last


@triton.jit
def merge_tile(
    splits,
    results,
    i_b,
    i_kv,
    first_row,
    q_heads,
    q_len,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge the splits of one tile of packed rows, ``ROWS`` at a time; rows that are all padding are left out."""
    for row in range(first_row, tl.minimum(first_row + BLOCK_M, GROUP_SIZE * q_len), ROWS):
        _, o_token, o_rows = query_rows(i_b, i_kv, row, q_heads, q_len, GROUP_SIZE, ROWS)
        merge_splits(splits, results, o_rows, o_token < q_len, ROWS)


@triton.jit
def query_rows(i_b, i_kv, first, q_heads, q_len, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Head, token, and row of out ``[B, Hq, Sq, Dv]``, of ``ROWS`` packed rows. Neighbours are heads of one group: they see the same keys."""
    o_m = first + tl.arange(0, ROWS)
    o_token, o_head = o_m // GROUP_SIZE, i_kv * GROUP_SIZE + o_m % GROUP_SIZE
    return o_head, o_token, (i_b.to(tl.int64) * q_heads + o_head) * q_len + o_token


@triton.jit
def visible_keys(token, problem):
    """First key that a token sees, and one past the last; the last token sits at the last key of the request."""
    position = token + problem.kv_len - problem.q_len
    start, stop = position * 0, position * 0 + problem.kv_len  # shaped like the tokens: one, or a tile of them
    if problem.HAS_LEFT:
        start = tl.maximum(position - problem.left, 0)
    if problem.HAS_RIGHT:
        stop = tl.minimum(position + problem.right + 1, problem.kv_len)
    return start, stop


@triton.jit
def splits_of(first, last, fewest_splits, split_size, BLOCK_N: tl.constexpr, FIXED_SIZE: tl.constexpr):
    """Where the splits of keys [first, last) begin, how many keys each has, and how many of them there are, at least 1.

    With FIXED_SIZE, boundaries are multiples of ``split_size``. Otherwise the tiles are shared evenly by ``fewest_splits``, or by as many
    more as keep a split within ``split_size`` keys.
    """
    if FIXED_SIZE:
        size = split_size
        begin = first // size * size
    else:
        begin = first // BLOCK_N * BLOCK_N
        n_splits = tl.minimum(tl.maximum(tl.cdiv(last - begin, split_size), fewest_splits), tl.num_programs(1))
        size = tl.maximum(tl.cdiv(tl.cdiv(last - begin, BLOCK_N), n_splits), 1) * BLOCK_N
    return begin, size, tl.maximum(tl.cdiv(last - begin, size), 1)


@triton.jit
def pages_of(pages, n, first, end):
    """The page of the tile of keys that begins at ``n``; or the pages that make it up, in order; or the page of each of its keys.

    A contiguous cache is one page per request. Entries for keys that are not visible are not read: their pages may be gone.
    """
    PAGE_SIZE: tl.constexpr = pages.PAGE_SIZE
    if PAGE_SIZE == 0:
        return pages.i_b
    elif pages.TILE == IN_A_PAGE:
        return tl.load(pages.p_table + n // PAGE_SIZE, mask=n < end, other=0)
    elif pages.TILE == OF_PAGES:
        o_keys = n + tl.arange(0, pages.BLOCK_N)
        p_pages = pages.p_table + n // PAGE_SIZE + tl.arange(0, pages.BLOCK_N) // PAGE_SIZE
        return tl.load(p_pages, mask=(o_keys >= first) & (o_keys < end), other=0)
    else:
        o_keys = n + tl.arange(0, pages.BLOCK_N)
        return tl.load(pages.p_table + o_keys // PAGE_SIZE, mask=(o_keys >= first) & (o_keys < end), other=0)


@triton.jit
def load_keys(cached, pages, page, n, o_cols, m_keys):
    """A tile ``[keys, cols]`` of K or V, 0 where ``m_keys`` is False and beyond the last column, neither of which is read."""
    PAGE_SIZE: tl.constexpr = pages.PAGE_SIZE
    o_n = tl.arange(0, pages.BLOCK_N)
    if pages.TILE == IN_A_PAGE:
        slot = n if PAGE_SIZE == 0 else n % PAGE_SIZE
        p_tile = cached.p_base + page.to(tl.int64) * cached.stride_page + slot.to(tl.int64) * cached.stride_key
        return load_tile(p_tile, o_n, o_cols, cached.stride_key, m_keys, cached.n_cols, True, cached.CHECK_COLS)
    elif pages.TILE == OF_PAGES:
        o_slots = (o_n % PAGE_SIZE).to(tl.int64) * cached.stride_key
        o_keys = page.to(tl.int64) * cached.stride_page + o_slots
        return load_tile(cached.p_base, o_keys, o_cols, 1, m_keys, cached.n_cols, True, cached.CHECK_COLS)
    else:
        o_keys = page.to(tl.int64) * cached.stride_page + ((n + o_n) % PAGE_SIZE).to(tl.int64) * cached.stride_key
        return load_tile(cached.p_base, o_keys, o_cols, 1, m_keys, cached.n_cols, True, cached.CHECK_COLS)
