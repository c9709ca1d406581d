"""Unpadding and padding: what is taken, where it stands, that it comes back, and the gradients."""

import inspect
from itertools import accumulate, pairwise

import pytest
import torch

from flashlib.interop.flash_attn import bert_padding
from flashlib.interop.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

SIGNATURES = {  # as in flash_attn 2.8.3; the index functions take their arguments by position only
    "unpad_input": "(hidden_states, attention_mask, unused_mask=None)",
    "unpad_input_for_concatenated_sequences": "(hidden_states, attention_mask_in_length)",
    "pad_input": "(hidden_states, indices, batch, seqlen)",
    "index_first_axis": "(input, indices)",
    "index_put_first_axis": "(values, indices, first_axis_dim)",
    "index_first_axis_residual": "(input, indices)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name):
    signature = inspect.signature(getattr(bert_padding, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name] and set(SIGNATURES) == set(bert_padding.__all__)


def random_batch(rng, trailing=None):
    """``(hidden_states, marks)``: marks [batch, seqlen] is 1 for a real token, 2 for a place that is only kept, 0 for padding."""
    batch, seqlen = rng.randint(1, 4), rng.randint(1, 9)
    trailing = rng.choice(((), (3,), (2, 5))) if trailing is None else trailing
    return torch.randn(batch, seqlen, *trailing), torch.randint(0, 3, (batch, seqlen))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("with_unused", [False, True])
@pytest.mark.parametrize("round", range(10))
def test_unpad_takes_what_is_marked(round, with_unused, kind, rng):
    hidden, marks = random_batch(rng)
    kept = marks > 0 if with_unused else marks == 1
    unused = [(marks == 2).to(kind)] if with_unused else []
    packed, indices, cu_seqlens, longest, used = unpad_input(hidden, (marks == 1).to(kind), *unused)
    tokens = [(b, s) for b in range(kept.shape[0]) for s in range(kept.shape[1]) if kept[b, s]]
    lengths = [int(row.sum()) for row in kept]
    assert torch.equal(packed, torch.stack([hidden[place] for place in tokens]) if tokens else packed[:0])
    assert indices.tolist() == [b * kept.shape[1] + s for b, s in tokens] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, *accumulate(lengths)] and cu_seqlens.dtype == torch.int32
    assert longest == max(lengths) and type(longest) is int
    assert used.tolist() == (marks == 1).sum(1).tolist() and used.dtype == torch.int32


@pytest.mark.parametrize("round", range(10))
def test_padding_again_gives_the_batch_with_zeros(round, rng):
    hidden, marks = random_batch(rng)
    hidden.requires_grad_()
    packed, indices, *_ = unpad_input(hidden, marks == 1)
    again = pad_input(packed, indices, *hidden.shape[:2])
    real = (marks == 1).reshape(*marks.shape, *[1] * (hidden.dim() - 2))
    assert torch.equal(again, torch.where(real, hidden, 0.0))
    grad = torch.randn_like(again)
    assert torch.equal(torch.autograd.grad(again, hidden, grad)[0], torch.where(real, grad, 0.0))


@pytest.mark.parametrize("round", range(10))
def test_rows_that_hold_several_sequences(round, rng):
    hidden, _ = random_batch(rng)
    batch, seqlen = hidden.shape[:2]
    lengths = []
    for _ in range(batch):
        cuts = sorted({rng.randint(0, seqlen) for _ in range(4)})
        lengths.append([b - a for a, b in pairwise(cuts)])
    in_length = torch.tensor([row + [0] * (seqlen - len(row)) for row in lengths])
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(hidden, in_length)
    every = [length for row in lengths for length in row]
    assert cu_seqlens.tolist() == [0, *accumulate(every)] and cu_seqlens.dtype == torch.int32
    assert longest == max(every, default=0)
    assert torch.equal(packed, torch.cat([hidden[b, : sum(row)] for b, row in enumerate(lengths)]))
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])


def test_indexing_is_differentiable_also_where_a_token_is_taken_twice(rng):
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    once, twice = torch.tensor([4, 0, 5]), torch.tensor([4, 0, 4])
    assert torch.equal(index_first_axis(x, twice), x[twice])
    assert torch.autograd.gradcheck(index_first_axis, (x, twice))
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x, once, 6), (x[:3].detach().requires_grad_(),))
    picked, residual = index_first_axis_residual(x, once)
    assert torch.equal(picked, x[once]) and torch.equal(residual, x)
    assert torch.autograd.gradcheck(lambda x: index_first_axis_residual(x, twice), (x,))


def test_nothing_to_keep():
    packed, indices, cu_seqlens, longest, used = unpad_input(torch.ones(2, 3, 4), torch.zeros(2, 3))
    assert packed.shape == (0, 4) and indices.shape == (0,) and longest == 0
    assert cu_seqlens.tolist() == [0, 0, 0] and used.tolist() == [0, 0]
    assert torch.equal(pad_input(packed, indices, 2, 3), torch.zeros(2, 3, 4))


X, MASK, PLACES = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([0, 1, 3])
BAD = [
    (lambda: unpad_input([1.0], MASK), TypeError, "hidden_states must be a torch.Tensor; got list"),
    (lambda: unpad_input(X[0, 0], MASK), ValueError, "hidden_states must be [batch, seqlen, ...]; got shape (4,)"),
    (lambda: unpad_input(X, [1]), TypeError, "attention_mask must be a torch.Tensor; got list"),
    (lambda: unpad_input(X, MASK[:1]), ValueError, "attention_mask has shape (1, 3); expected [batch, seqlen] as in hidden_states (2, 3, 4)"),
    (lambda: unpad_input(X, 2 * MASK), ValueError, "attention_mask must hold 1 for a token and 0 for none; got 2 too"),
    (lambda: unpad_input(X, torch.full((2, 3), float("-inf"))), ValueError, "got -inf too"),
    (lambda: unpad_input(X, MASK, MASK[:, :2]), ValueError, "unused_mask has shape (2, 2)"),
    (lambda: unpad_input(X, MASK, MASK), ValueError, "unused_mask marks tokens that attention_mask marks too"),
    (lambda: unpad_input_for_concatenated_sequences(X[0, 0], MASK), ValueError, "hidden_states must be [batch, seqlen, ...]"),
    (lambda: unpad_input_for_concatenated_sequences(X, MASK.bool()), TypeError, "attention_mask_in_length must hold integers; got torch.bool"),
    (lambda: unpad_input_for_concatenated_sequences(X, 2 * MASK), ValueError, "lengths of at least 0 that fill at most 3 tokens of each row; got rows from 0 up, the fullest of 4 tokens"),
    (lambda: unpad_input_for_concatenated_sequences(X, -MASK), ValueError, "got rows from -1 up"),
    (lambda: pad_input(X[0], PLACES[:2], 2, 3), ValueError, "indices must be one for each token; got 2 for 3 tokens"),
    (lambda: pad_input(X[0], PLACES, 1, 3), ValueError, "indices must be at least 0 and below 3; got 0 to 3"),
    (lambda: pad_input(X[0], [0, 1, 3], 2, 3), TypeError, "indices must be a torch.Tensor; got list"),
    (lambda: index_put_first_axis(X[0], PLACES.float(), 6), TypeError, "indices must hold integers; got torch.float32"),
    (lambda: index_first_axis(X[0], PLACES - 1), ValueError, "indices must be at least 0 and below 3; got -1 to 2"),
    (lambda: index_first_axis_residual(X[0], PLACES[None]), ValueError, "indices must be 1-dimensional; got shape (1, 3)"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
