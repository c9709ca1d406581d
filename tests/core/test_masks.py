"""Masks against their definition written out as a double loop, and tile classification against the dense mask."""

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import random_mask

from flashlib import masks
from flashlib.masks import Causal, Documents, KeyLengths, Prefix, RowIntervals, Tile, Unmasked, Varlen, Window


def dense(mask, batch, q_len, kv_len):
    return mask.intervals(batch, q_len, kv_len).dense()


def by_definition(sees, batch, q_len, kv_len):
    """A dense mask from a rule ``sees(b, i, j)``, one pair at a time."""
    table = [[[bool(sees(b, i, j)) for j in range(kv_len)] for i in range(q_len)] for b in range(batch)]
    return torch.tensor(table).reshape(batch, q_len, kv_len)


SHAPES = [(1, 5, 5), (2, 3, 7), (2, 7, 3), (3, 1, 6), (2, 4, 0), (2, 0, 4)]


@pytest.mark.parametrize("batch, q_len, kv_len", SHAPES)
def test_each_mask_is_its_definition(batch, q_len, kv_len):
    shift = kv_len - q_len  # bottom-right: the last row sits at the last key
    lengths = [min(kv_len, n) for n in (3, 0, 6)][:batch]
    offsets = torch.tensor([1, -2, 4])[:batch]
    q_ids, k_ids = [4, 4, -1, 9, 9, 2, 2][:q_len], [-1, 4, 4, 4, 2, 9, 9][:kv_len]
    cases = {
        Unmasked(): lambda b, i, j: True,
        Causal(): lambda b, i, j: j <= i + shift,
        Causal(offset=1): lambda b, i, j: j <= i + 1,
        Causal(offset=offsets): lambda b, i, j: j <= i + offsets[b],
        Causal(offset=offsets[:, None] + torch.arange(q_len)): lambda b, i, j: j <= 2 * i + offsets[b],
        Window(2, 1): lambda b, i, j: i + shift - 2 <= j <= i + shift + 1,
        Window(None, 1): lambda b, i, j: j <= i + shift + 1,
        Window(0, None): lambda b, i, j: j >= i + shift,
        KeyLengths(lengths): lambda b, i, j: j < lengths[b],
        Prefix(2): lambda b, i, j: j < 2 or j <= i + shift,
        Prefix(lengths): lambda b, i, j: j < lengths[b] or j <= i + shift,
        Documents(q_ids, k_ids): lambda b, i, j: q_ids[i] == k_ids[j] and q_ids[i] >= 0,
    }
    for mask, rule in cases.items():
        assert torch.equal(
            dense(mask, batch, q_len, kv_len).expand(batch, q_len, kv_len), by_definition(rule, batch, q_len, kv_len)
        ), mask


@settings(max_examples=300, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_and_means_both(rng):
    batch, q_len, kv_len = rng.choice(SHAPES)
    parts = [random_mask(rng, batch, q_len, kv_len) or Unmasked() for _ in range(2)]
    both = dense(parts[0] & parts[1], batch, q_len, kv_len)
    each = dense(parts[0], batch, q_len, kv_len) & dense(parts[1], batch, q_len, kv_len)
    assert torch.equal(both.expand_as(each), each)


@settings(max_examples=300, deadline=None)
@given(rng=st.randoms(use_true_random=False), block_q=st.integers(1, 9), block_k=st.integers(1, 9))
def test_tiles_are_classified_exactly(rng, block_q, block_k):
    batch, q_len, kv_len = rng.choice([(1, 11, 11), (2, 8, 17), (2, 17, 8), (1, 1, 12), (2, 0, 5), (2, 5, 0)])
    visible = (random_mask(rng, batch, q_len, kv_len) or Unmasked()).intervals(batch, q_len, kv_len)
    table, tile_map = visible.dense(), visible.tile_map(block_q, block_k)
    assert tile_map.shape == (table.shape[0], -(-q_len // block_q), -(-kv_len // block_k))
    for i, first_row in enumerate(range(0, q_len, block_q)):
        for j, first_key in enumerate(range(0, kv_len, block_k)):
            rows = slice(first_row, min(first_row + block_q, q_len))
            keys = slice(first_key, min(first_key + block_k, kv_len))
            tile = table[:, rows, keys]
            kinds = [Tile.FULL if t.all() else Tile.PARTIAL if t.any() else Tile.SKIP for t in tile]
            assert tile_map[:, i, j].tolist() == kinds
            assert torch.equal(visible.tile(rows, keys), tile)
            together = Tile.FULL if tile.all() else Tile.PARTIAL if tile.any() else Tile.SKIP
            assert visible.classify(rows, keys) is together


@settings(max_examples=200, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_summaries_agree_with_the_dense_mask(rng):
    batch, q_len, kv_len = rng.choice(SHAPES)
    visible = (random_mask(rng, batch, q_len, kv_len) or Unmasked()).intervals(batch, q_len, kv_len)
    table = visible.dense()
    assert visible.visible_pairs() == int(table.sum())
    assert torch.equal(visible.empty_rows(), ~table.any(-1))
    assert torch.equal(visible.seen_keys(), table.any(1))


@settings(max_examples=300, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_band_is_reported_only_if_it_is_the_whole_mask(rng):
    batch, q_len, kv_len = rng.choice(SHAPES)
    mask = random_mask(rng, batch, q_len, kv_len) or Unmasked()
    if mask.band() is not None:
        expected = dense(Window(*mask.band()), batch, q_len, kv_len)
        assert torch.equal(dense(mask, batch, q_len, kv_len).expand_as(expected), expected)
    assert Causal().band() == (None, 0)
    assert (Causal() & Window(4, 9)).band() == (4, 0)
    assert (Causal() & KeyLengths([1])).band() is None


def test_combining_with_unmasked_changes_nothing():
    causal = Causal()
    assert (Unmasked() & causal) is causal
    assert isinstance(Unmasked() & Unmasked(), Unmasked)


def test_documents_from_lengths_numbers_them_in_order():
    documents = Documents.from_lengths([2, 0, 3])
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    assert torch.equal(dense(documents, 1, 5, 5)[0], expected)


@settings(max_examples=200, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_packed_sequences_are_masked_as_each_by_itself(rng):
    """Plain, causal and windows: block by block the mask of the lone sequence, and nothing outside the blocks."""
    pairs = [(rng.randint(0, 6), rng.randint(0, 6)) for _ in range(rng.randint(0, 4))]
    q_ends, k_ends = ([0, *accumulate(side)] for side in (zip(*pairs, strict=True) if pairs else ((), ())))
    q_len, kv_len = q_ends[-1] + rng.randint(0, 3), k_ends[-1] + rng.randint(0, 3)
    packed = Varlen(torch.tensor(q_ends, dtype=torch.int32), k_ends)
    left, right = (rng.choice((None, 0, 1, 4)) for _ in range(2))
    for inside, rule in (
        (packed, Unmasked()),
        (packed & Window(left, right, packed.offset(q_len)), Window(left, right)),
    ):
        expected = torch.zeros(q_len, kv_len, dtype=torch.bool)
        for (rows, keys), q_end, k_end in zip(pairs, q_ends[1:], k_ends[1:], strict=True):
            expected[q_end - rows : q_end, k_end - keys : k_end] = dense(rule, 1, rows, keys)[0]
        assert torch.equal(dense(inside, 3, q_len, kv_len)[0], expected)


def test_intervals_hold_no_matrix():
    """A mask of a million tokens is two numbers per row."""
    tokens = 1_000_000
    intervals = (Causal() & Window(4096, 0) & KeyLengths([tokens - 5])).intervals(1, tokens, tokens)
    assert intervals.start.numel() == intervals.stop.numel() == tokens
    assert intervals.visible_pairs() > tokens


BAD = [
    (lambda: Window(left=-1), ValueError, "left must be at least 0 or None for no limit; got -1"),
    (lambda: Window(right=1.5), TypeError, "right must be a whole number or None for no limit; got 1.5"),
    (lambda: Causal(offset=torch.tensor([0.5])), TypeError, "offset must hold integers; got torch.float32"),
    (
        lambda: Causal(offset=torch.zeros(1, 1, 1, dtype=torch.int64)),
        ValueError,
        "offset must be 1-dimensional or 2-dim",
    ),
    (
        lambda: Causal(offset=torch.tensor([1, 2])).intervals(3, 4, 4),
        ValueError,
        "offset has shape (2,); expected (3,)",
    ),
    (lambda: KeyLengths([-1]), ValueError, "lengths must be at least 0; got -1"),
    (lambda: KeyLengths([1.0]), TypeError, "lengths must hold integers; got torch.float32"),
    (lambda: KeyLengths([[1]]), ValueError, "lengths must be 1-dimensional; got shape (1, 1)"),
    (lambda: KeyLengths([1, 2]).intervals(3, 4, 4), ValueError, "2 lengths for a batch of 3"),
    (lambda: KeyLengths([5]).intervals(1, 4, 4), ValueError, "lengths go up to 5, but there are only 4 keys"),
    (lambda: Prefix(-2), ValueError, "lengths must be at least 0; got -2"),
    (lambda: Prefix([1, 2]).intervals(3, 4, 4), ValueError, "Prefix: 2 lengths for a batch of 3"),
    (lambda: Documents([0, 1, 0]), ValueError, "document 0 occurs in several places"),
    (lambda: Documents([0.0, 1.0]), TypeError, "q_ids must hold integers"),
    (lambda: Documents([0, 0]).intervals(1, 2, 3), ValueError, "give k_ids when there are more or fewer keys"),
    (
        lambda: Documents([0, 0], [0]).intervals(1, 2, 3),
        ValueError,
        "k_ids has shape (1, 1), but there are 1 sequences of 3",
    ),
    (lambda: Documents.from_lengths([2, -1]), ValueError, "lengths must be at least 0; got -1"),
    (lambda: Varlen([]), ValueError, "cu_seqlens_q must begin with 0; got []"),
    (lambda: Varlen([1, 2]), ValueError, "cu_seqlens_q must begin with 0; got [1]"),
    (lambda: Varlen([0, 2], [0, 3, 1]), ValueError, "cu_seqlens_k must never fall; got 3 and then 1, at entry 2"),
    (lambda: Varlen([0, 2], [0, 1, 2]), ValueError, "cu_seqlens_q has 1 sequences, but cu_seqlens_k has 2"),
    (lambda: Varlen([0.0, 2.0]), TypeError, "cu_seqlens_q must hold integers; got torch.float32"),
    (lambda: Varlen([[0, 2]]), ValueError, "cu_seqlens_q must be 1-dimensional; got shape (1, 2)"),
    (lambda: Varlen([0, 5]).intervals(1, 4, 6), ValueError, "cu_seqlens_q goes up to 5, but there are only 4 tokens"),
    (lambda: Varlen([0, 5]).intervals(1, 6, 4), ValueError, "cu_seqlens_k goes up to 5, but there are only 4 tokens"),
    (
        lambda: masks.Intervals(Causal().intervals(1, 4, 6)).intervals(1, 4, 5),
        ValueError,
        "the mask was made for 1 sequences of 4 queries and 6 keys; got 1 sequences of 4 queries and 5 keys",
    ),
    (lambda: Causal() & torch.ones(2, 2), TypeError, "combines with another flashlib mask by &; got Tensor"),
    (
        lambda: Causal().intervals(1, 4, 4).tile_map(0, 4),
        ValueError,
        "block_q must be a whole number of at least 1; got 0",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_every_public_mask_is_covered_here():
    rng = random.Random(0)
    drawn = {type(part) for _ in range(400) for part in _parts(random_mask(rng, 2, 6, 6))}
    public = {getattr(masks, name) for name in masks.__all__} - {masks.Mask, masks.Intersection, RowIntervals, Tile}
    assert public <= drawn


def _parts(mask):
    return getattr(mask, "parts", (mask or Unmasked(),))
