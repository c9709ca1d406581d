"""Lengths, page numbers and tokens that have no place in a cache, where nobody may look at them, as on a GPU: in Triton's interpreter,
under KernelWatch, and with every reading of a value by the host an error. A program of its own: the interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/everyday/interpreted_caches.py --seed 0 --problems 2
"""

import random
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton  # noqa: F401  (KernelWatch asks whether it interprets)
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels.seeds import seeds_asked_for

from flashlib import FlashAttentionConfig, use_config
from flashlib.inference.decode import decode_attention
from flashlib.interop.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from flashlib.interop.flash_attn.pages import Pages
from flashlib.measure.counting.kernel_watch import KernelWatch, faults_raised

BATCH, HEADS, DIM, CAPACITY = 3, 2, 16, 24
BAD = 1  # the request that something is wrong with
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)


class NoHostReads(TorchDispatchMode):
    """On a GPU each of these would wait for all the work that was queued, and in a CUDA graph they are forbidden."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"the host reads a value: {func}"
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu(*more):
    """Nobody looks whether values make sense, and nothing out of bounds is read or written; ``more`` contexts."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("flashlib.") and hasattr(module, "may_read"):
                stack.enter_context(mock.patch.object(module, "may_read", lambda *tensors: False))
        for context in (KernelWatch(), faults_raised(), *more):
            stack.enter_context(context)
        yield


def check_alone_is_nan(out, lse, expected, seed) -> None:
    """The bad request, all of it, is NaN, and the others are to the bit what they are without it."""
    assert out[BAD].isnan().all() and lse[BAD].isnan().all(), (seed, out[BAD], lse[BAD])
    for b in set(range(BATCH)) - {BAD}:
        assert torch.equal(out[b], expected[0][b]) and torch.equal(lse[b], expected[1][b]), (seed, b)


def check_decoding(seed: int) -> None:
    """A page that is not there, and a length that cannot be, for tiles within a page, of pages and across pages, and any splits."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    page_size, width = rng.choice((1, 3, 16, 64)), 3
    how = rng.choice(({}, {"num_splits": 3}, {"split_size": 32}))
    num_pages = BATCH * width
    q = torch.randn(BATCH, 4, 2, DIM, generator=generator)
    k, v = (torch.randn(num_pages, HEADS, page_size, DIM, generator=generator) for _ in range(2))
    table = torch.randperm(num_pages, generator=generator).view(BATCH, width).to(torch.int32)
    lengths = torch.tensor([width * page_size, 2 * page_size, page_size])
    call = {"block_table": table, "return_lse": True, "backend": "triton", **how}
    expected = decode_attention(q, k, v, lengths=lengths, **call)
    wrong = table.clone()
    wrong[BAD, 0] = rng.choice((-1, num_pages, 2**31 - 1))  # every row sees its first key
    length = rng.choice((-1, width * page_size + 1, 2**32 + 1))
    wrong_lengths = torch.where(torch.arange(BATCH) == BAD, length, lengths)
    for changes in ({"lengths": lengths, "block_table": wrong}, {"lengths": wrong_lengths}):
        with as_on_a_gpu(NoHostReads()):
            out, lse = decode_attention(q, k, v, **{**call, **changes})
        check_alone_is_nan(out, lse, expected, seed)
    unseen = table.masked_fill(torch.arange(width) * page_size >= lengths[:, None], num_pages)
    with as_on_a_gpu(NoHostReads()):
        out, lse = decode_attention(q, k, v, lengths=lengths, **{**call, "block_table": unseen})
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]), seed


def check_appending(seed: int) -> None:
    """Tokens without a place: the request's cache stays as it was, and so does everybody else's; its result is NaN."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, DIM, generator=generator)

    new, paged = rng.choice((1, 3)), rng.random() < 0.6
    lengths = torch.tensor([5, 7, CAPACITY - new])
    before = lengths.clone()
    if paged:
        where = {"block_table": torch.randperm(9, generator=generator).view(BATCH, 3)}
        caches = [tensor(9, 8, HEADS) for _ in range(2)]
    else:
        where = {"cache_batch_idx": torch.tensor([3, 0, 2])}
        caches = [tensor(4, CAPACITY, HEADS) for _ in range(2)]
    options = rng.choice(
        ({}, {"alibi_slopes": torch.rand(4, generator=generator)}, {"cache_leftpad": torch.tensor([2, 0, 1])})
    )
    options |= {
        "k": tensor(BATCH, new, HEADS),
        "v": tensor(BATCH, new, HEADS),
        "causal": True,
        "return_softmax_lse": True,
    }
    if rng.random() < 0.5:
        options |= {"rotary_cos": torch.rand(CAPACITY, 4), "rotary_sin": torch.rand(CAPACITY, 4)}
    q = tensor(BATCH, rng.choice((1, 3)), 4)
    sound = [x.clone() for x in caches]
    with use_config(FlashAttentionConfig(backend="triton")):
        expected = flash_attn_with_kvcache(q, *sound, cache_seqlens=lengths, **where, **options)
    untouched = Pages(*caches, where["block_table"] if paged else where["cache_batch_idx"][:, None])
    page, slot, _ = untouched.places(torch.tensor([[BAD]]), lengths[BAD] + torch.arange(new)[None])
    for now, old in zip(sound, caches, strict=True):
        now[page, slot] = old[page, slot]  # as if the bad request had written nothing

    wrong = rng.choice(("room", "nowhere", "place"))
    if wrong == "place" and paged:
        where = {"block_table": where["block_table"].clone()}
        where["block_table"][BAD, 0] = rng.choice((-1, 9, 2**32))
    elif wrong == "place":
        where = {"cache_batch_idx": torch.tensor([3, rng.choice((-1, 4, 2**32)), 2])}
    else:
        before[BAD] = CAPACITY - new + 1 if wrong == "room" else rng.choice((-1, -9, 2**32, 2**62))
    with as_on_a_gpu(NoHostReads(), use_config(FlashAttentionConfig(backend="triton"))):
        out, lse = flash_attn_with_kvcache(q, *caches, cache_seqlens=before, **where, **options)
    check_alone_is_nan(out, lse, expected, seed)
    assert all(map(torch.equal, caches, sound)), (seed, wrong)


def check_nobody_has_room(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    caches = [torch.randn(BATCH, CAPACITY, HEADS, DIM, generator=generator) for _ in range(2)]
    old, (q, k) = [x.clone() for x in caches], torch.randn(2, BATCH, 2, HEADS, DIM, generator=generator)
    with as_on_a_gpu(NoHostReads()):
        out = flash_attn_with_kvcache(q, *caches, k, k, cache_seqlens=torch.tensor([CAPACITY - 1, CAPACITY, -1]))
    assert out.isnan().all() and all(map(torch.equal, caches, old)), seed


def check_packed(seed: int) -> None:
    """Packed queries over pages, where they lie and as copies."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 6, 4, HEADS, DIM, generator=generator).unbind()
    q = torch.randn(6, 4, DIM, generator=generator)
    ends_k, table = torch.tensor([0, 5, 12, 15]), torch.tensor([[0, 1], [2, 3], [4, 5]])
    wrong = table.clone()
    wrong[BAD, 0] = rng.choice((-1, 6, 2**32))
    for ends_q in ([0, 2, 4, 6], [0, 1, 4, 6]):
        call = (torch.tensor(ends_q), ends_k, 3, 7)
        expected = flash_attn_varlen_func(q, k, v, *call, causal=True, block_table=table)
        bad = slice(ends_q[BAD], ends_q[BAD + 1])
        with as_on_a_gpu():
            out = flash_attn_varlen_func(q, k, v, *call, causal=True, block_table=wrong)
        assert out[bad].isnan().all(), seed
        assert torch.equal(out[: bad.start], expected[: bad.start]), seed
        assert torch.equal(out[bad.stop :], expected[bad.stop :]), seed
    with as_on_a_gpu(NoHostReads()):
        keys, _ = Pages(k, v, wrong).packed(ends_k, torch.ones(15, dtype=torch.bool))
    assert torch.equal(keys.isnan()[:, 0, 0], (torch.arange(15) >= 5) & (torch.arange(15) < 9)), seed


def main() -> None:
    seeds = seeds_asked_for(__doc__)
    for seed in seeds:
        check_decoding(seed)
        check_appending(seed)
        check_packed(seed)
    check_nobody_has_room(seeds.start)
    print(f"{len(seeds)} of each hold")


if __name__ == "__main__":
    main()
