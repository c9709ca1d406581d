"""Decoding in plain PyTorch, the algebra and the arithmetic of splits, and what bad input is told."""

import random
import re

import pytest
import torch
from decode_problems import random_decode_problem

from flashlib import BackendUnavailableError
from flashlib.inference.decode import choose_num_splits, combine_splits, decode_attention, split_partials, split_ranges
from flashlib.masks import Causal, KeyLengths, Window
from flashlib.partial import Partial, fold
from flashlib.reference import assert_within_budget, check

EVERY_DTYPE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("problems", [25])
def test_random_problems_stay_within_the_budget(problems):
    first = random.SystemRandom().getrandbits(40)
    for seed in range(first, first + problems):
        problem = random_decode_problem(random.Random(seed), dtypes=EVERY_DTYPE, capacities=(1, 2, 33, 64, 100, 300))
        out, lse = decode_attention(
            problem.q, problem.k, problem.v, **problem.options, return_lse=True, backend="torch"
        )
        comparison = check(out, lse, *problem.oracle, **problem.oracle_options)
        assert comparison.passed, f"seed {seed}: {problem}: {comparison.message}"


@pytest.mark.parametrize("window", [None, (40, None)])
def test_folding_the_splits_is_attention_over_all_keys(window):
    q, k, v = torch.randn(2, 8, 3, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 24)
    partials = split_partials(q, k, v, split_ranges(200, num_splits=5, tile=16), window=window)
    assert len(partials) == 5 and all(isinstance(piece, Partial) for piece in partials)
    whole = fold(partials)
    mask = Causal() if window is None else Window(window[0], 0)
    assert_within_budget(whole.out, q, k, v, lse=whole.lse, mask=mask)
    merged_out, merged_lse = combine_splits(
        torch.stack([p.out for p in partials]), torch.stack([p.lse for p in partials])
    )
    assert torch.equal(merged_out, whole.out) and torch.equal(merged_lse, whole.lse)


def test_ranges_cover_every_key_once():
    rng = random.Random(seed := random.SystemRandom().getrandbits(40))
    for _ in range(500):
        length = rng.choice((0, 1, 63, 64, 65, rng.randint(0, 5000)))
        first, tile = rng.choice((0, 0, rng.randint(0, length + 3))), rng.choice((1, 16, 64, 128))
        how = {"num_splits": rng.randint(1, 140)} if rng.random() < 0.5 else {"split_size": rng.randint(1, 600)}
        ranges = split_ranges(length, **how, first=first, tile=tile)
        keys = [key for keys in ranges for key in keys]
        assert keys == list(range(min(first, length), length)), (seed, length, how, first, tile)
        if "num_splits" in how:
            assert len(ranges) == how["num_splits"]
            assert all(keys.start % tile == 0 for keys in ranges if keys and keys.start != first)
        else:
            assert all(keys.start % how["split_size"] == 0 for keys in ranges if keys.start != first)
            assert all(0 < len(keys) <= how["split_size"] for keys in ranges)


def test_ranges_by_hand():
    assert split_ranges(200, num_splits=2) == [range(0, 128), range(128, 200)]
    assert split_ranges(100, num_splits=3) == [range(0, 64), range(64, 100), range(100, 100)]
    assert split_ranges(200, split_size=64, first=70) == [range(70, 128), range(128, 192), range(192, 200)]
    assert split_ranges(0, split_size=64) == []


@pytest.mark.parametrize("paged", [False, True])
def test_a_request_gives_the_same_bits_in_every_batch(paged):
    batch, capacity, page_size = 64, 96, 16
    torch.manual_seed(seed := torch.seed())
    q = torch.randn(batch, 4, 2, 16, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, 2, capacity, 16, dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.randint(2, capacity + 1, (batch,))
    table = None
    if paged:
        pages = capacity // page_size
        table = torch.randperm(batch * pages).to(torch.int32).view(batch, pages)
        pools = [torch.empty(batch * pages, 2, page_size, 16, dtype=x.dtype) for x in (k, v)]
        for pool, x in zip(pools, (k, v), strict=True):
            pool[table.long()] = x.unflatten(2, (pages, page_size)).transpose(1, 2)
        k, v = pools

    def decode(n, some=slice(None)):
        cache = (k, v) if paged else (k[:n][some], v[:n][some])
        some_table = table[:n][some] if paged else None
        options = {"lengths": lengths[:n][some], "block_table": some_table, "split_size": 32, "return_lse": True}
        return decode_attention(q[:n][some], *cache, **options, backend="torch")

    whole, whole_lse = decode(batch)
    for n in range(1, batch):
        out, lse = decode(n, slice(n - 1, n))  # the last of the first n requests, alone
        assert torch.equal(out[0], whole[n - 1]) and torch.equal(lse[0], whole_lse[n - 1]), (
            f"seed {seed}: request {n - 1}"
        )
    for n in (2, 3):
        assert torch.equal(decode(n)[0], whole[:n]), f"seed {seed}: batch {n}"


def test_more_room_in_the_cache_changes_no_bit():
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    lengths = torch.tensor([90, 17])
    tight = decode_attention(q, k[:, :, :90], v[:, :, :90], lengths=lengths, split_size=32)
    assert torch.equal(decode_attention(q, k, v, lengths=lengths, split_size=32), tight)


def test_gradients_reach_the_cache():
    q, k, v = (
        x.double().requires_grad_() for x in (torch.randn(1, 2, 1, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4))
    )
    lengths = torch.tensor([7])
    assert torch.autograd.gradcheck(
        lambda *qkv: decode_attention(*qkv, lengths=lengths, num_splits=3, backend="torch"), (q, k, v)
    )


def test_nothing_to_attend_to():
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    out, lse = decode_attention(q, k, k, lengths=torch.tensor([0, 1]), return_lse=True)
    assert not out[0].any() and (lse[0] == float("-inf")).all()
    assert not out[1, :, :2].any() and (lse[1, :, :2] == float("-inf")).all() and lse[1, :, 2].isfinite().all()
    assert decode_attention(q, k[:, :, :0], k[:, :, :0]).count_nonzero() == 0
    assert decode_attention(q[:0], k[:0], k[:0]).shape == (0, 4, 3, 8)
    assert decode_attention(q[:, :, :0], k, k).shape == (2, 4, 0, 8)


def test_without_lengths_the_cache_is_full():
    q, k, v = torch.randn(2, 4, 2, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    full = decode_attention(q, k, v, lengths=torch.tensor([50, 50]))
    assert torch.equal(decode_attention(q, k, v), full)
    assert_within_budget(decode_attention(q, k, v, causal=False), q, k, v, mask=KeyLengths([50, 50]))


INFINITE = float("inf")


@pytest.mark.parametrize(
    "pieces, expected, expected_lse",
    [
        ([(1.0, -INFINITE), (3.0, -INFINITE)], 0.0, -INFINITE),
        ([(float("nan"), -INFINITE), (3.0, 0.5)], 3.0, 0.5),
        ([(1.0, INFINITE), (3.0, 0.5)], 1.0, INFINITE),
        ([(1.0, INFINITE), (3.0, INFINITE)], float("nan"), INFINITE),
        ([(1.0, 2.0)], 1.0, 2.0),
        ([(float("nan"), -INFINITE)], 0.0, -INFINITE),
    ],
)
def test_pieces_at_infinity(pieces, expected, expected_lse):
    out = torch.tensor([[value] for value, _ in pieces]).view(-1, 1, 1, 1, 1)
    lse = torch.tensor([lse for _, lse in pieces]).view(-1, 1, 1, 1)
    merged, merged_lse = combine_splits(out, lse)
    torch.testing.assert_close(merged.flatten(), torch.tensor([expected]), equal_nan=True, rtol=0, atol=0)
    assert merged_lse.item() == expected_lse


def test_the_heuristic_fills_the_gpu_and_no_more():
    def splits(*shape):
        return choose_num_splits(*shape, sm_count=132)

    assert splits(64, 8, 4096) == 1  # 512 programs as it is
    assert 16 <= splits(1, 8, 4096) <= 33  # 8 heads: so that most of the 132 have something to do
    assert splits(1, 8, 131072) >= 16
    assert splits(1, 8, 1) == 1
    assert splits(0, 8, 0) == 1
    for length in (1000, 100_000, 1_000_000):
        assert -(-length // splits(16, 8, length)) <= 8192


Q, K = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 10, 8)
PAGES, TABLE = torch.randn(6, 2, 4, 8), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
BAD = [
    (lambda: decode_attention([1.0], K, K), TypeError, "q must be a torch.Tensor; got list"),
    (lambda: decode_attention(Q, K.half(), K), TypeError, "k is torch.float16; expected"),
    (lambda: decode_attention(Q.long(), K, K), TypeError, "q is torch.int64; expected"),
    (lambda: decode_attention(Q[0], K, K), ValueError, "q must be 4-dimensional"),
    (lambda: decode_attention(Q, K, K[:, :1]), ValueError, "k and v must agree in all but their channels"),
    (lambda: decode_attention(Q, K[..., :7], K), ValueError, "k has head_dim 7 but q has head_dim 8"),
    (lambda: decode_attention(Q[:, :3], K, K), ValueError, "q has 3 heads and k has 2"),
    (lambda: decode_attention(Q, K[:1], K[:1]), ValueError, "k has batch 1 but q has batch 2"),
    (lambda: decode_attention(Q, K.mT.contiguous().mT, K), ValueError, "k must have its channels next to each other"),
    (lambda: decode_attention(Q, K, K, lengths=[3, 4]), TypeError, "lengths must be a torch.Tensor or None; got list"),
    (lambda: decode_attention(Q, K, K, lengths=torch.rand(2)), TypeError, "lengths is torch.float32; expected int32 or"),
    (lambda: decode_attention(Q, K, K, lengths=torch.tensor([3])), ValueError, "lengths has shape (1,); expected (2,)"),
    (lambda: decode_attention(Q, K, K, lengths=torch.tensor([3, 11])), ValueError, "between 0 and the capacity, 10; got"),
    (lambda: decode_attention(Q, K, K, lengths=torch.tensor([-1, 4])), ValueError, "between 0 and the capacity, 10; got"),
    (lambda: decode_attention(Q, PAGES, PAGES, block_table=TABLE.long()), TypeError, "block_table is torch.int64"),
    (lambda: decode_attention(Q, PAGES, PAGES, block_table=TABLE[:1]), ValueError, "block_table must be [2, max_pages]"),
    (lambda: decode_attention(Q, PAGES, PAGES, block_table=TABLE.mT.contiguous().mT), ValueError, "next to each other; got strides"),
    (lambda: decode_attention(Q, PAGES, PAGES, block_table=[[0]]), TypeError, "block_table must be a torch.Tensor or"),
    (lambda: decode_attention(Q, PAGES[:, :, :0], PAGES[:, :, :0], block_table=TABLE), ValueError, "at least one key"),
    (lambda: decode_attention(Q, PAGES[:3], PAGES[:3], block_table=TABLE), ValueError, "block_table[1, 1] is page 3, but there are 3 pages"),
    (lambda: decode_attention(Q, PAGES, PAGES, block_table=TABLE - 1), ValueError, "block_table[0, 0] is page -1, but there are 6 pages"),
    (lambda: decode_attention(Q, K, K, causal=1), TypeError, "causal must be True or False; got 1"),
    (lambda: decode_attention(Q, K, K, window=5), TypeError, "window must be (left, right), each an int or None; got 5"),
    (lambda: decode_attention(Q, K, K, window=(-1, 0)), ValueError, "window's left must be at least 0; got -1"),
    (lambda: decode_attention(Q, K, K, scale=0.0), ValueError, "scale must be greater than 0; got 0.0"),
    (lambda: decode_attention(Q, K, K, scale="1"), TypeError, "scale must be a number; got '1'"),
    (lambda: decode_attention(Q, K, K, softcap=-1.0), ValueError, "softcap must be at least 0"),
    (lambda: decode_attention(Q, K, K, softcap=float("inf")), ValueError, "softcap must be finite; got inf"),
    (lambda: decode_attention(Q, K, K, num_splits=-1), ValueError, "num_splits must be at least 0; got -1"),
    (lambda: decode_attention(Q, K, K, num_splits=2.0), TypeError, "num_splits must be an int; got 2.0"),
    (lambda: decode_attention(Q, K, K, split_size=0), ValueError, "split_size must be at least 1; got 0"),
    (lambda: decode_attention(Q, K, K, num_splits=2, split_size=64), ValueError, "give num_splits or split_size, not both"),
    (lambda: decode_attention(Q, K, K, backend="quick"), ValueError, "backend must be one of auto, triton, cpu, torch; got 'quick'"),
    (lambda: decode_attention(Q, K, K, backend="triton"), BackendUnavailableError, "the kernels run on cuda here; the tensors are on cpu"),
    (lambda: decode_attention(Q.double(), K.double(), K.double(), backend="cpu"), BackendUnavailableError, "got torch.float64"),
    (lambda: decode_attention(Q.clone().requires_grad_(), K, K, backend="cpu"), BackendUnavailableError, "has no gradient"),
    (lambda: decode_attention(Q.double(), K.double(), K.double(), backend="triton"), BackendUnavailableError, "got torch.float64"),
    (lambda: split_ranges(-1, num_splits=2), ValueError, "length must be at least 0; got -1"),
    (lambda: split_ranges(9), ValueError, "give num_splits or split_size, one of them; got num_splits=0, split_size=None"),
    (lambda: split_ranges(9, num_splits=1, split_size=4), ValueError, "one of them; got num_splits=1, split_size=4"),
    (lambda: split_ranges(9, split_size=0), ValueError, "split_size must be at least 1; got 0"),
    (lambda: split_partials(Q, K, K, [range(0, 11)]), ValueError, "ranges must be ranges of keys between 0 and 10; got range(0, 11)"),
    (lambda: split_partials(Q, K, K, [range(0, 10, 2)]), ValueError, "ranges must be ranges of keys"),
    (lambda: split_partials(Q, K, K, [slice(0, 4)]), ValueError, "ranges must be ranges of keys"),
    (lambda: choose_num_splits(1, 8, 4096, sm_count=0), ValueError, "sm_count must be at least 1; got 0"),
    (lambda: choose_num_splits(1, 8, 4096.0, sm_count=1), TypeError, "max_length must be an int; got 4096.0"),
    (lambda: combine_splits(K, K), ValueError, "out must be [splits, B, Hq, Sq, Dv] and lse [splits, B, Hq, Sq]"),
    (lambda: combine_splits(K[None].half(), K), TypeError, "out is torch.float16; expected torch.float32"),
    (lambda: combine_splits(K[None], [1.0]), TypeError, "lse must be a torch.Tensor; got list"),
    (lambda: combine_splits(K[None][:0], K[None][:0, ..., 0]), ValueError, "of at least one split"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
