"""flash_attn_with_kvcache and flash_attn_combine against the oracle, request by request.

Whatever a call must not read is NaN: slots behind a request's tokens and before its beginning, pages and rows that are nobody's.
Entries of the block table that stand for no token are numbers of pages that do not exist.
"""

import re
from itertools import islice, pairwise

import pytest
import torch
from problems import DTYPES, HEADS

from flashlib.interop.flash_attn import flash_attn_combine, flash_attn_with_kvcache
from flashlib.masks import Window
from flashlib.partial import Partial
from flashlib.reference import check, largest_error, one_rounding, oracle
from flashlib.rotary import rotary_frequencies, rotary_table, turn_pairs

NAN = float("nan")
LAYOUTS = ("contiguous", "batch_idx", "paged")


class Cache:
    """A cache of random tokens in one of the three layouts, and what each request holds.

    Attributes:
        arguments: k_cache, v_cache and what says where each request lies.
        lengths: of each request, before new tokens come; leftpad: how many of them are padding.
    """

    def __init__(self, rng, layout, lengths, new, heads, head_dim, v_head_dim, dtype, leftpad=None):
        self.lengths, self.leftpad = lengths, leftpad or [0] * len(lengths)
        batch = len(lengths)
        room = max((n + new for n in lengths), default=0) + rng.choice((0, 1, 9))
        if layout == "paged":
            page_size = rng.choice((1, 2, 5, 16, 64))
            width = -(-room // page_size)
            needed = [-(-(n + new) // page_size) for n in lengths]
            pages = sum(needed) + rng.randint(1, 3)
            free = iter(torch.randperm(pages).tolist())
            bad = rng.choice((-1, -7, pages, 10**6))
            rows = [[*islice(free, count), *[bad] * (width - count)] for count in needed]
            table = torch.tensor(rows, dtype=torch.int32).view(batch, width)
            lead, self.where = (pages, page_size), {"block_table": table}
        elif layout == "batch_idx":
            rows = batch + rng.randint(0, 2)
            self.where = {"cache_batch_idx": torch.randperm(rows)[:batch].to(torch.int32)}
            lead = (rows, room)
        else:
            lead, self.where = (batch + rng.randint(0, 1), room), {}
        self.k_cache = torch.full((*lead, heads, head_dim), NAN, dtype=dtype)
        self.v_cache = torch.full((*lead, heads, v_head_dim), NAN, dtype=dtype)
        self.room = width * page_size if layout == "paged" else room
        for request, (padding, length) in enumerate(zip(self.leftpad, lengths, strict=True)):
            for position in range(padding, length):
                for memory in (self.k_cache, self.v_cache):
                    memory[self.place(request, position)] = torch.randn(heads, memory.shape[3]).to(dtype)

    def place(self, request, position):
        if "block_table" in self.where:
            page_size = self.k_cache.shape[1]
            return int(self.where["block_table"][request, position // page_size]), position % page_size
        if "cache_batch_idx" in self.where:
            return int(self.where["cache_batch_idx"][request]), position
        return request, position

    def read(self, request, begin, end):
        """Keys and values of some positions, ``[1, heads, n, head_dim]``."""
        places = [self.place(request, position) for position in range(begin, end)]
        return [
            torch.stack([memory[p] for p in places], 1)[None] if places else memory.new_empty(1, memory.shape[2], 0, memory.shape[3])
            for memory in (self.k_cache, self.v_cache)
        ]  # fmt: skip


def random_options(rng):
    options = {"causal": rng.random() < 0.5, "window_size": rng.choice(((-1, -1), (-1, -1), (3, -1), (0, 0), (20, 4)))}
    options["softcap"] = rng.choice((0.0, 0.0, 15.0))
    if rng.random() < 0.3:
        options["softmax_scale"] = rng.choice((0.05, 1.0))
    left, right = (None if width < 0 else width for width in options["window_size"])
    exact = {"mask": Window(left, 0 if options["causal"] else right), "softcap": options["softcap"]}
    return options, exact | {"scale": options.get("softmax_scale")}


def expect(out, lse, q, cache, ends, exact, slopes=None):
    """Every request's rows against the oracle on what its part of the cache holds now."""
    for request, end in enumerate(ends):
        k, v = cache.read(request, cache.leftpad[request], end)
        if slopes is not None:
            exact = exact | {"alibi_slopes": slopes[request] if slopes.dim() == 2 else slopes}
        rows = q[request].transpose(0, 1)[None]
        comparison = check(out[request].transpose(0, 1)[None], lse[request][None], rows, k, v, **exact)
        assert comparison.passed, f"request {request} of {cache.lengths}, {cache.where}, {exact}: {comparison.message}"


@pytest.mark.parametrize("round", range(12))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_request_is_its_own_problem(layout, round, rng):
    """Old tokens, new tokens, rotation, padding and biases, in all three layouts."""
    (heads, kv_heads), dtype = rng.choice(HEADS), rng.choice(DTYPES)
    head_dim, v_head_dim = rng.choice(((8, 8), (24, 8), (64, 64)))
    batch, q_len = rng.choice((1, 3)), rng.choice((1, 1, 4))
    new = rng.choice((None, 1, q_len, 6))
    lengths = [rng.choice((0, 1, 9, 33, 80)) for _ in range(batch)]
    leftpad = [rng.randint(0, n) for n in lengths] if rng.random() < 0.3 else None
    cache = Cache(rng, layout, lengths, new or 0, kv_heads, head_dim, v_head_dim, dtype, leftpad)
    options, exact = random_options(rng)
    slopes = None
    if rng.random() < 0.3:
        slopes = options["alibi_slopes"] = torch.rand(rng.choice(((heads,), (batch, heads))))
    if leftpad:
        options["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32)
    q = torch.randn(batch, q_len, heads, head_dim).to(dtype)
    turned_q, k, v = q, None, None
    if new is not None:
        k, v = (torch.randn(batch, new, kv_heads, d).to(dtype) for d in (head_dim, v_head_dim))
        options |= {"k": k, "v": v}
        if rng.random() < 0.5:
            turned_q, k = rotated(options, q, k, lengths, cache.room, exact, rng)
    before = cache.k_cache.clone(), cache.v_cache.clone()
    options["cache_seqlens"] = torch.tensor(lengths, dtype=rng.choice((torch.int32, torch.int64)))
    out, lse = flash_attn_with_kvcache(
        q, cache.k_cache, cache.v_cache, **cache.where, **options, num_splits=rng.choice((0, 1, 5)), return_softmax_lse=True
    )  # fmt: skip
    assert out.shape == (batch, q_len, heads, v_head_dim) and out.is_contiguous() and out.dtype == dtype
    assert lse.shape == (batch, heads, q_len)
    expect_written(cache, before, k, v, lengths)
    expect(out, lse, turned_q, cache, [n + (new or 0) for n in lengths], exact, slopes)
    if new is None:
        again = flash_attn_with_kvcache(q, cache.k_cache, cache.v_cache, **cache.where, **options)
        expect(again, lse, turned_q, cache, lengths, exact, slopes)


def rotated(options, q, k, lengths, room, exact, rng):
    """Add a rotation to the options; answers q and k as they must be turned."""
    frequencies = rotary_frequencies(rng.choice((2, 8)), 100.0)
    cos, sin = (x.to(rng.choice((q.dtype, torch.float32))) for x in rotary_table(torch.arange(room + 2), frequencies))
    options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rng.random() < 0.5}
    starts = torch.tensor(lengths)[:, None]
    by_row = not (exact["mask"].left is None and exact["mask"].right is None)
    q_positions = starts + torch.arange(q.shape[1]) if by_row else starts.expand(-1, q.shape[1])

    def turned(x, positions):
        positions = positions.clamp(max=len(cos) - 1)
        x = x.transpose(1, 2)
        return turn_pairs(x, cos[positions], sin[positions], interleaved=options["rotary_interleaved"]).transpose(1, 2)

    return turned(q, q_positions), turned(k, starts + torch.arange(k.shape[1]))


def expect_written(cache, before, k, v, lengths):
    """The new tokens are where they belong, to the bit, and nothing else has changed."""
    for memory, old, new in zip((cache.k_cache, cache.v_cache), before, (k, v), strict=True):
        for request, length in enumerate(lengths):
            for i in range(0 if new is None else new.shape[1]):
                old[cache.place(request, length + i)] = new[request, i]
        assert torch.equal(memory.nan_to_num(7.5), old.nan_to_num(7.5))


def test_decoding_step_by_step_is_the_whole_text(rng):
    """A prompt and then token by token, with rotation: what attention over the whole turned text gives."""
    length, kv_heads, head_dim = 12, 2, 16
    q = torch.randn(1, length, 4, head_dim)
    k, v = torch.randn(2, 1, length, kv_heads, head_dim).unbind()
    cos, sin = rotary_table(torch.arange(20), rotary_frequencies(head_dim))
    k_cache, v_cache = torch.full((2, 1, 20, kv_heads, head_dim), NAN).unbind()
    outs, done = [], 0
    for count in (5, 1, 1, 3, 1, 1):
        new = slice(done, done + count)
        outs.append(
            flash_attn_with_kvcache(
                q[:, new], k_cache, v_cache, k[:, new], v[:, new], cos, sin, done, causal=True, rotary_interleaved=False
            )
        )
        done += count
    whole_q, whole_k = (turn_pairs(x.transpose(1, 2), cos[:length], sin[:length]) for x in (q, k))
    comparison = check(torch.cat(outs, 1).transpose(1, 2), None, whole_q, whole_k, v.transpose(1, 2), causal=True)
    assert comparison.passed, comparison.message


def test_without_a_mask_all_queries_stand_where_the_first_one_does(rng):
    """As flash_attn documents it: neither causal nor a window, so all of q is turned by the row cache_seqlens."""
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
    cos, sin = rotary_table(torch.arange(10), rotary_frequencies(8))
    results = []
    for options in ({}, {"window_size": (100, 100)}):
        k_cache, v_cache = torch.zeros(2, 1, 10, 2, 8).unbind()
        results.append(flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cos, sin, 4, **options))
    one_place = turn_pairs(q.transpose(1, 2), cos[[4, 4, 4]], sin[[4, 4, 4]], interleaved=True)
    for result, queries in ((results[0], one_place), (results[1], None)):
        if queries is None:
            queries = turn_pairs(q.transpose(1, 2), cos[4:7], sin[4:7], interleaved=True)
        comparison = check(
            result.transpose(1, 2), None, queries, *(x[:, :7].transpose(1, 2) for x in (k_cache, v_cache))
        )
        assert comparison.passed, comparison.message
    assert largest_error(*(x.double() for x in results)) > 1e-3


def test_defaults_are_the_whole_cache(rng):
    q, k_cache, v_cache = torch.randn(2, 1, 4, 8), *torch.randn(2, 2, 9, 2, 8).unbind()
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, return_softmax_lse=True)
    by_int = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9)
    assert torch.equal(out, by_int)
    comparison = check(out.transpose(1, 2), lse, *(x.transpose(1, 2) for x in (q, k_cache, v_cache)))
    assert comparison.passed, comparison.message


def test_nothing_to_look_at(rng):
    q, empty = torch.randn(2, 3, 4, 8), torch.zeros(2, 0, 2, 8)
    for options in ({}, {"alibi_slopes": torch.rand(4)}):
        out, lse = flash_attn_with_kvcache(q, empty, empty, **options, return_softmax_lse=True)
        assert torch.equal(out, torch.zeros_like(q)) and (lse == -torch.inf).all()


def test_a_gradient_is_refused_not_left_out(rng):
    q, k_cache = torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(1, 5, 2, 8)
    out = flash_attn_with_kvcache(q, k_cache, k_cache)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        out.sum().backward()
    with torch.no_grad():
        assert not flash_attn_with_kvcache(q, k_cache, k_cache).requires_grad


Q, CACHE, NEW = torch.zeros(2, 1, 4, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 2, 2, 8)
COS = torch.ones(6, 4)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
SEQLENS = torch.tensor([3, 4])
BAD_CALLS = [
    ({"k": NEW}, ValueError, "v must be given where k is; got None"),
    ({"v": NEW}, ValueError, "k must be given where v is; got None"),
    ({"k": NEW, "v": NEW}, ValueError, "cache_seqlens must say where k is to be written; got None"),
    ({"k": NEW, "v": NEW, "cache_seqlens": 5}, ValueError, "cache_seqlens must lie between 0 and 4, where each request has room for 6 tokens; got 5"),
    ({"k": NEW, "v": NEW, "cache_seqlens": SEQLENS + 1}, ValueError, "cache_seqlens must lie between 0 and 4, where each request has room for 6 tokens; got 5"),
    ({"k": NEW.half(), "v": NEW, "cache_seqlens": 0}, TypeError, "k has dtype torch.float16, but q has torch.float32"),
    ({"k": NEW[..., :4], "v": NEW, "cache_seqlens": 0}, ValueError, "headdim is 8 in q"),
    ({"cache_seqlens": 7}, ValueError, "cache_seqlens must lie between 0 and 6"),
    ({"cache_seqlens": 1.5}, TypeError, "cache_seqlens must be an int or a torch.Tensor [batch]; got 1.5"),
    ({"cache_seqlens": torch.tensor([1.0, 2.0])}, TypeError, "cache_seqlens must be int32 or int64; got torch.float32"),
    ({"cache_seqlens": torch.tensor([1])}, ValueError, "cache_seqlens must be [batch] with batch 2; got shape (1,)"),
    ({"cache_batch_idx": torch.tensor([0, 2])}, ValueError, "cache_batch_idx must lie between 0 and 1; got 2"),
    ({"cache_batch_idx": SEQLENS, "block_table": TABLE}, ValueError, "cache_batch_idx must be None where there is a block_table"),
    ({"cache_leftpad": torch.tensor([0, 7])}, ValueError, "cache_leftpad must lie between 0 and 6; got 7"),
    ({"block_table": TABLE[:1]}, ValueError, "block_table must be [batch, max_num_blocks_per_seq] with batch 2; got shape (1, 1)"),
    ({"block_table": TABLE - 1, "k": NEW, "v": NEW, "cache_seqlens": 0}, ValueError, "block_table[0, 0] is page -1, but there are 2 pages"),
    ({"block_table": TABLE + 2, "k": NEW, "v": NEW, "cache_seqlens": 0}, ValueError, "block_table[0, 0] is page 2, but there are 2 pages"),
    ({"rotary_cos": COS, "rotary_sin": COS}, ValueError, "rotary_cos and rotary_sin turn new keys and the queries with them; they need k and v"),
    ({"rotary_cos": COS, "k": NEW, "v": NEW, "cache_seqlens": 0}, TypeError, "rotary_sin must be a floating-point torch.Tensor [seqlen_ro, rotary_dim / 2]; got NoneType"),
    ({"rotary_cos": COS[:5], "rotary_sin": COS[:5], "k": NEW, "v": NEW, "cache_seqlens": 0}, ValueError, "rotary_cos must have a row for each of the cache's 6 positions; got 5"),
    ({"rotary_cos": torch.ones(6, 5), "rotary_sin": torch.ones(6, 5), "k": NEW, "v": NEW, "cache_seqlens": 0}, ValueError, "rotary_dim at most headdim, 8; got shape (6, 5)"),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be above 0"),
    ({"k": NEW, "v": NEW, "cache_seqlens": 0, "softcap": float("inf")}, ValueError, "softcap must be finite; got inf"),
    ({"k": NEW, "v": NEW, "cache_seqlens": 0, "alibi_slopes": torch.rand(3)}, ValueError, "alibi_slopes has shape (3,)"),
    ({"k": NEW, "v": NEW, "cache_seqlens": 0, "num_splits": -1}, ValueError, "num_splits must be an int of at least 0; got -1"),
    ({"return_softmax_lse": "yes"}, TypeError, "return_softmax_lse must be True or False; got 'yes'"),
    ({"causal": "no"}, TypeError, "causal must be True or False; got 'no'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD_CALLS, ids=[message[:60] for *_, message in BAD_CALLS])
def test_bad_input_is_refused_before_anything_is_written(options, error, message):
    k_cache, v_cache = CACHE.clone(), CACHE.clone()
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_with_kvcache(Q + 1, k_cache, v_cache, **options)
    assert torch.equal(k_cache, CACHE) and torch.equal(v_cache, CACHE)


# ---- combine


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_combine_is_attention_over_all_the_keys(splits, rng):
    """Pieces of one problem, some of them empty and then NaN in their output."""
    q, (k, v) = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 2, 40, 8).unbind()
    cuts = sorted([0, 40, *(rng.choice((0, 11, 20, 40)) for _ in range(splits - 1))])
    pieces = []
    for begin, end in pairwise(cuts):
        out, lse = oracle(q, k[:, :, begin:end], v[:, :, begin:end])
        pieces.append((out.masked_fill(lse[..., None] == -torch.inf, NAN).float(), lse.float()))
    # As FlashAttention-3 has them: tokens before heads, and the LSE's tokens next to each other in memory.
    outs = torch.stack([out.transpose(1, 2) for out, _ in pieces])
    lses = torch.stack([lse for _, lse in pieces]).transpose(2, 3)
    before = outs.clone(), lses.clone()
    out, lse = flash_attn_combine(outs, lses)
    assert out.shape == (2, 3, 4, 8) and lse.shape == (2, 3, 4) and out.dtype == lse.dtype == torch.float32
    comparison = check(out.transpose(1, 2), lse.transpose(1, 2), q, k, v)
    assert comparison.passed, comparison.message
    given = torch.empty(2, 3, 4, 8, dtype=torch.bfloat16)
    returned, _ = flash_attn_combine(outs, lses, given)
    rounded, _ = flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    assert returned is given and torch.equal(given, rounded) and torch.equal(rounded, out.to(torch.bfloat16))
    assert all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(before, (outs, lses), strict=True))


def test_combine_where_nobody_saw_a_key(rng):
    out, lse = flash_attn_combine(torch.full((3, 1, 2, 2, 4), NAN), torch.full((3, 1, 2, 2), -torch.inf))
    assert torch.equal(out, torch.zeros(1, 2, 2, 4)) and (lse == -torch.inf).all()


def test_combine_of_far_apart_pieces(rng):
    """LSEs of +-800: their exponentials are beyond fp64, and the merge is exact all the same."""
    outs, lses = torch.randn(3, 1, 1, 1, 4), torch.tensor([-800.0, 800.0, 799.0])[:, None, None, None]
    out, lse = flash_attn_combine(outs, lses)
    weights = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64)
    weights = torch.tensor([0.0, 1.0, 1.0]).double() * weights.exp()
    expected = (weights[:, None, None, None, None] * outs.double()).sum(0) / weights.sum()
    assert largest_error(out, expected) <= 4 * one_rounding(expected, torch.float32)
    assert float(lse) == pytest.approx(800 + float(weights.sum().log()), abs=1e-4)


OUT, LSE = torch.zeros(2, 1, 3, 4, 8), torch.zeros(2, 1, 3, 4)
BAD_COMBINES = [
    ((None, LSE), {}, TypeError, "out_partial must be a torch.Tensor [num_splits, batch, seqlen, nheads, headdim]; got NoneType"),
    ((OUT.half(), LSE), {}, TypeError, "out_partial must be float32; got torch.float16"),
    ((OUT, LSE.double()), {}, TypeError, "lse_partial must be float32; got torch.float64"),
    ((OUT, LSE.transpose(2, 3)), {}, ValueError, "lse_partial must be [num_splits, batch, seqlen, nheads]"),
    ((OUT[:0], LSE[:0]), {}, ValueError, "num_splits at least 1"),
    ((OUT, LSE), {"out": OUT}, ValueError, "out must be (1, 3, 4, 8) on cpu; got shape (2, 1, 3, 4, 8)"),
    ((OUT, LSE), {"out": OUT[0], "out_dtype": torch.float16}, TypeError, "out_dtype must be None or that of out, torch.float32; got torch.float16"),
    ((OUT, LSE), {"out": 3}, TypeError, "out must be a torch.Tensor or None; got int"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "options", "error", "message"), BAD_COMBINES, ids=[case[3][:50] for case in BAD_COMBINES]
)
def test_bad_input_to_combine(args, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_combine(*args, **options)


def test_combine_is_the_merge_of_partials(rng):
    outs, lses = torch.randn(2, 1, 2, 3, 4), torch.randn(2, 1, 2, 3)
    merged = Partial(outs[0].double(), lses[0].double()).merge(Partial(outs[1].double(), lses[1].double()))
    for got, exact in zip(flash_attn_combine(outs, lses), (merged.out, merged.lse), strict=True):
        assert largest_error(got, exact) <= 4 * one_rounding(exact, torch.float32)


def test_a_cache_without_room_for_a_token_is_no_error():
    """Whichever of its rows a request has."""
    q, k, v = torch.randn(1, 1, 2, 8), torch.empty(2, 0, 2, 8), torch.empty(2, 0, 2, 8)
    lengths, index = torch.zeros(1, dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, cache_batch_idx=index)
    assert out.shape == q.shape and not out.any()
