"""Packed and paged calls of flash_attn's functions read nothing from the device on the way to the kernels: sizes come from arguments and shapes.

On the meta device there is nothing to read. To compare numbers, tensors on a CPU are taken for ones on a GPU, where nobody may look, and every
operator that hands a value to the host fails.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from varlen_problems import Packed, expect

import flashlib
from flashlib import FlashAttentionConfig, attention, masks, use_config
from flashlib.inference import decode as decoding
from flashlib.interop.flash_attn import (
    bert_padding,
    flash_attn_interface,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    kv_cache,
    pages,
)
from flashlib.launch.engines import TiledEngine

READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in READS, f"{function} hands a value to the host"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (masks, flash_attn_interface, pages, kv_cache, bert_padding, decoding):
        if hasattr(module, "may_read"):
            monkeypatch.setattr(module, "may_read", lambda *tensors: False)
    # These two stand for the Triton kernels, which look at lengths where they are.
    monkeypatch.setitem(decoding._RUN, "torch", _unwatched(decoding._RUN["torch"]))
    monkeypatch.setattr(TiledEngine, "forward", _unwatched(TiledEngine.forward))
    with NoReads():
        yield


def _unwatched(function):
    def run(*arguments):
        with _disable_current_modes():
            return function(*arguments)

    return run


def test_the_mode_notices():
    with NoReads(), pytest.raises(AssertionError, match="hands a value to the host"):
        int(torch.tensor([3]).max())


@pytest.mark.parametrize("round", range(6))
def test_packed(round, rng, as_on_a_gpu):
    with _disable_current_modes():
        problem = Packed.draw(rng, alibi=round % 2 == 0)
    results = _run(problem)
    with _disable_current_modes():
        expect(problem, problem.compare(*results))


@pytest.mark.parametrize("round", range(10))
def test_pages(round, rng, as_on_a_gpu):
    """Read where they lie, and copied."""
    with _disable_current_modes():
        problem = Packed.draw(rng, alibi=round % 3 == 0, alike=round % 3 == 1, lengths_q=(0, 1, 1, 2, 7, 33))
        k, v, table = problem.paged()
    results = _run(problem, k, v, block_table=table)
    with _disable_current_modes():
        expect(problem, problem.compare(*results))


def _run(problem, k=None, v=None, **options):
    with _disable_current_modes():
        lengths = problem.lengths()
    k, v = (problem.k, problem.v) if k is None else (k, v)
    return flash_attn_varlen_func(problem.q, k, v, *lengths, **problem.options, **options, return_attn_probs=True)[:2]


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


ENDS, TABLE = meta(4, dtype=torch.int32), meta(3, 2, dtype=torch.int32)
Q, PAGES, LENGTHS = meta(9, 4, 8), meta(6, 16, 2, 8), meta(3, dtype=torch.int32)
CACHE, NEW, COS = meta(3, 32, 2, 8), meta(3, 1, 2, 8), meta(32, 4)
CALLS = {
    "packed": lambda: flash_attn_varlen_func(Q, Q, Q, ENDS, ENDS, 5, 5, causal=True, window_size=(3, 0)),
    "packed, dropout": lambda: flash_attn_varlen_func(Q, Q, Q, ENDS, ENDS, 5, 5, 0.5),
    "packed, ALiBi": lambda: flash_attn_varlen_func(Q, Q, Q, ENDS, ENDS, 5, 5, alibi_slopes=meta(3, 4)),
    "qkv": lambda: flash_attn_varlen_qkvpacked_func(meta(9, 3, 4, 8), ENDS, 5),
    "kv": lambda: flash_attn_varlen_kvpacked_func(Q, meta(9, 2, 2, 8), ENDS, ENDS, 5, 5),
    "decoding from pages": lambda: flash_attn_varlen_func(Q, PAGES, PAGES, ENDS, ENDS, 5, 30, block_table=TABLE),
    "pages copied": lambda: flash_attn_varlen_func(Q, PAGES, PAGES, ENDS, ENDS, 30, 30, block_table=TABLE),
    "cache": lambda: flash_attn_with_kvcache(meta(3, 1, 4, 8), CACHE, CACHE, NEW, NEW, COS, COS, LENGTHS, causal=True),
    "cache, left padding": lambda: flash_attn_with_kvcache(meta(3, 1, 4, 8), CACHE, CACHE, cache_seqlens=LENGTHS, cache_leftpad=LENGTHS),
    "cache rows": lambda: flash_attn_with_kvcache(meta(3, 1, 4, 8), CACHE, CACHE, cache_seqlens=LENGTHS, cache_batch_idx=LENGTHS),
    "cache in pages": lambda: flash_attn_with_kvcache(meta(3, 1, 4, 8), PAGES, PAGES, NEW, NEW, cache_seqlens=LENGTHS, block_table=TABLE),
    "lengths": lambda: attention(meta(3, 2, 4, 8), *[meta(3, 2, 9, 8)] * 2, mask=masks.KeyLengths(LENGTHS)),
    "prefix": lambda: attention(meta(3, 2, 4, 8), *[meta(3, 2, 9, 8)] * 2, mask=masks.Prefix(LENGTHS)),
    "documents": lambda: attention(*[meta(1, 2, 9, 8)] * 3, mask=masks.Documents(meta(9, dtype=torch.int32))),
    "index_put": lambda: bert_padding.index_put_first_axis(Q, meta(9, dtype=torch.int32), 12),
    "index": lambda: bert_padding.index_first_axis(Q, meta(12, dtype=torch.int32)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_nothing_needs_a_value(name):
    assert CALLS[name]().device.type == "meta"


@pytest.mark.parametrize("round", range(8))
def test_lengths_that_lie_lead_nowhere_outside(round, rng, as_on_a_gpu):
    """On a GPU nobody looks whether cumulative lengths make sense. The keys that are read for them exist, and what others see is right."""
    with _disable_current_modes():
        q, k = torch.randn(6, 2, 8), torch.randn(7, 2, 8)
        wrong = [rng.choice((-(2**40), -3, 2, 5, 100, 2**40)) for _ in range(3)]
        ends = torch.tensor([0, *wrong])
        lengths = torch.tensor(wrong)
    with use_config(FlashAttentionConfig(backend="tiled")):
        packed = flash_attn_varlen_func(q, k, k, ends, ends, 6, 7, causal=round % 2 == 0)
        padded = attention(
            *(x.transpose(0, 1)[None].expand(3, -1, -1, -1) for x in (q, k, k)), mask=masks.KeyLengths(lengths)
        )
    with _disable_current_modes():
        assert packed.isfinite().all(), wrong
        for n, length in enumerate(wrong):
            right = attention(*(x.transpose(0, 1)[None] for x in (q, k[: max(0, length)], k[: max(0, length)])))
            torch.testing.assert_close(padded[n : n + 1], right)
        memory, table = torch.full((4, 4, 2, 8), 1e30), torch.tensor([[0, 1]] * 3, dtype=torch.int32)
        memory[:2] = 1.0
    for longest in (
        20,
    ):  # with fewer queries pages are decoded, in plain PyTorch by a host that reads the lengths and refuses them
        paged = flash_attn_varlen_func(q, memory, memory, ends, ends, longest, 8, block_table=table)
        with _disable_current_modes():
            # Nothing of another's page, which would be large: what is right, or 0, or the NaN of lengths that cannot be.
            assert ((paged == 0) | ((paged - 1).abs() < 1e-5) | paged.isnan()).all(), wrong


def test_values_are_checked_where_that_waits_for_nobody():
    lengths = torch.tensor([3, 11])
    mask = masks.KeyLengths(lengths)
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 9, 8)
    with pytest.raises(ValueError, match="lengths go up to 11, but there are only 9 keys"):
        attention(q, k, k, mask=mask)
    lengths.data[1] = 9  # a mask is of the lengths that its tensor holds when it is used
    attention(q, k, k, mask=mask)
    packed = masks.Varlen(torch.tensor([0, 2, 5]))
    assert packed.lengths_q.tolist() == packed.lengths_k.tolist() == [2, 3] and packed.num_sequences == 2
    with flashlib.check_values():
        assert flashlib.values.may_read(lengths) and not flashlib.values.may_read(lengths.to("meta"))
