"""flash_attn_varlen_func over keys and values in pages, against the oracle, sequence by sequence."""

import pytest
import torch
from varlen_problems import Packed, expect

from flashlib import FlashAttentionConfig, use_config
from flashlib.interop.flash_attn import flash_attn_varlen_func
from flashlib.interop.flash_attn.pages import Pages


@pytest.mark.parametrize("round", range(15))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ragged_queries(backend, round, rng):
    problem = Packed.draw(rng, alibi=rng.random() < 0.4)
    with use_config(FlashAttentionConfig(backend=backend)):
        expect(problem, problem.compare(*problem.run(in_pages=True)))


@pytest.mark.parametrize("round", range(15))
def test_as_many_queries_of_each_sequence(round, rng):
    problem = Packed.draw(rng, alibi=rng.random() < 0.1, alike=True)
    expect(problem, problem.compare(*problem.run(in_pages=True)))


def test_a_decoding_step_copies_no_keys(rng, monkeypatch):
    """Few queries of each sequence, of some more than of others; with a left window, one of each."""

    def copied(*_):
        raise AssertionError("keys and values are copied")

    monkeypatch.setattr(Pages, "packed", copied)
    for _ in range(30):
        problem = Packed.draw(rng, alibi=False, lengths_q=(0, 1, 2, 7))
        if sum(problem.lengths_q) and problem.options["window_size"][0] < 0:
            expect(problem, problem.compare(*problem.run(in_pages=True)))
    q = torch.randn(3, 2, 8)
    k, table = torch.randn(4, 16, 2, 8), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    ends_q, ends_k = torch.tensor([0, 1, 2]), torch.tensor([0, 20, 50], dtype=torch.int32)
    flash_attn_varlen_func(q, k, k, ends_q, ends_k, 1, 30, window_size=(3, 0), block_table=table)
    copying = (
        {"alibi_slopes": torch.rand(2)},
        {"dropout_p": 0.5},
        {"window_size": (3, 0), "max_seqlen_q": 2},
        {"max_seqlen_q": 17},
    )
    for options in copying:
        sizes = {"max_seqlen_q": 1, "max_seqlen_k": 30} | options
        with pytest.raises(AssertionError, match="are copied"):
            flash_attn_varlen_func(q, k, k, ends_q, ends_k, **sizes, block_table=table)


def test_only_out_unless_more_is_asked_for(rng):
    for alike in (False, True):
        problem = Packed.draw(rng, alibi=False, alike=alike)
        k, v, table = problem.paged()
        out = flash_attn_varlen_func(problem.q, k, v, *problem.lengths(), **problem.options, block_table=table)
        _, lse = problem.run(in_pages=True)  # the LSE may take another backend, which rounds otherwise
        expect(problem, problem.compare(out, lse))


@pytest.mark.parametrize("alike", [False, True])
def test_a_gradient_is_refused_not_left_out(alike, rng):
    problem = Packed.draw(rng, alibi=False, alike=alike)
    problem.q.requires_grad_()
    out, lse = problem.run(in_pages=True)
    expect(problem, problem.compare(out, lse))
    for result in (out, lse):
        with pytest.raises(NotImplementedError, match="flash_attn_varlen_func with a block_table has no backward pass"):
            result.sum().backward()
    with torch.no_grad():
        assert not problem.run(in_pages=True)[0].requires_grad


Q, PAGES = torch.zeros(3, 4, 8), torch.zeros(5, 16, 2, 8)
ENDS_Q, ENDS_K = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 20, 50], dtype=torch.int32)
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
BAD = [
    ({"block_table": ENDS_K}, ValueError, "block_table must be [batch, max_num_blocks_per_seq] with batch 2; got shape (3,)"),
    ({"block_table": TABLE[:1]}, ValueError, "with batch 2; got shape (1, 2)"),
    ({"block_table": [[0, 1], [2, 3]]}, TypeError, "block_table must be a torch.Tensor [batch, max_num_blocks_per_seq]; got list"),
    ({"block_table": TABLE.float()}, TypeError, "block_table must be int32 or int64; got torch.float32"),
    ({"block_table": TABLE.to("meta")}, TypeError, "block_table has device meta, but q has cpu"),
    ({"block_table": TABLE[:, :1]}, ValueError, "block_table has 1 pages of 16 tokens for each sequence, but cu_seqlens_k has a sequence of 30"),
    ({"block_table": TABLE + 2, "max_seqlen_q": 17}, ValueError, "block_table[1, 1] is page 5, but there are 5 pages"),
    ({"block_table": TABLE + 2, "cu_seqlens_q": torch.tensor([0, 1, 2])}, ValueError, "block_table[1, 1] is page 5, but there are 5 pages"),
    ({"k": torch.zeros(50, 2, 8)}, ValueError, "k must be [num_blocks, page_block_size, nheads_k, headdim]; got shape (50, 2, 8)"),
    ({"v": PAGES[:, :8]}, ValueError, "page_block_size is 16 in k"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 4])}, ValueError, "cu_seqlens_q goes up to 4, but there are only 3 tokens"),
    ({"cu_seqlens_q": torch.tensor([0, 1, 4]), "max_seqlen_q": 3}, ValueError, "cu_seqlens_q goes up to 4, but there are only 3 tokens"),
    ({"max_seqlen_k": 29}, ValueError, "max_seqlen_k must be at least the length of the longest sequence, 30; got 29"),
    ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, "alibi_slopes has shape (3, 4); expected (4,) or (2, 4)"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(changes, error, message):
    call = {
        "q": Q,
        "k": PAGES,
        "v": PAGES,
        "cu_seqlens_q": ENDS_Q,
        "cu_seqlens_k": ENDS_K,
        "max_seqlen_q": 2,
        "max_seqlen_k": 30,
    }
    with pytest.raises(error) as caught:
        flash_attn_varlen_func(**{**call, "block_table": TABLE, **changes})
    assert message in str(caught.value)


def test_pages_are_chosen_by_the_table(rng):
    """The same tokens in another order of pages, and the same result to the bit."""
    k, v = torch.randn(2, 5, 16, 2, 8).unbind()
    q, call = torch.randn(3, 4, 8), (ENDS_Q, ENDS_K, 2, 30)
    order = torch.randperm(5)
    moved = order.argsort()[TABLE.long()].to(torch.int32)
    first = flash_attn_varlen_func(q, k, v, *call, causal=True, block_table=TABLE)
    assert torch.equal(flash_attn_varlen_func(q, k[order], v[order], *call, causal=True, block_table=moved), first)
