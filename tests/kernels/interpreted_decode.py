"""The decoding kernels in Triton's interpreter, on random problems, under KernelWatch: no address is out of bounds, and no two
programs race. A program of its own: the interpreter is chosen at import.

TRITON_INTERPRET=1 python tests/kernels/interpreted_decode.py --seed 0 --problems 20
"""

import random
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

sys.path.insert(0, str(Path(__file__).parents[1]))

from decode_problems import random_decode_problem
from seeds import seeds_asked_for

from flashlib.inference import decode, prefix
from flashlib.inference.decode import combine_splits, decode_attention, split_ranges
from flashlib.inference.decode_operator import decode_triton
from flashlib.inference.prefix import SharedPrefix, shared_prefix_attention
from flashlib.launch import counters, splits
from flashlib.launch import decode as decode_launch
from flashlib.launch.decode import DecodeOptions, decode_launches, launch_decode
from flashlib.launch.start import Launch
from flashlib.launch.tiles import TileConfig
from flashlib.measure.counting.kernel_watch import KernelWatch, faults_raised
from flashlib.partial import Partial, fold
from flashlib.reference import check

SMALL_TILE = 16  # keys; small tiles meet more edges in few tokens


def run_one(seed: int) -> None:
    rng = random.Random(seed)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    problem = random_decode_problem(rng, dtypes=dtypes, capacities=(1, 17, 64, 100, 160))
    out, lse = decode_attention(problem.q, problem.k, problem.v, **problem.options, return_lse=True, backend="triton")
    comparison = check(out, lse, *problem.oracle, **problem.oracle_options)
    assert comparison.passed, f"seed {seed}: {problem}: {comparison.message}"


def check_both_merges_and_the_cuts(seed: int) -> None:
    """The last program's merge and the second kernel's agree, and each split holds the keys that split_ranges says."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    length, q_len, left = rng.randint(1, 100), rng.choice((1, 3)), rng.choice((None, 30))
    q = torch.randn(1, 4, q_len, 16, generator=generator)
    k, v = (torch.randn(1, 2, 100, 16, generator=generator) for _ in range(2))
    lengths, how = (
        torch.tensor([length]),
        rng.choice(({"num_splits": 3}, {"num_splits": 1}, {"split_size": 16}, {"split_size": 40})),
    )
    splits = how.get("num_splits") or -(-100 // how["split_size"])
    options = DecodeOptions(lengths, None, left, 0, 0.25, 0.0, splits, how.get("split_size"))
    merged = launch_decode(q, k, v, options)
    launches, out, lse = decode_launches(q, k, v, replace(options, merge_in_kernel=False))
    for launch in launches:
        launch.start()
    torch.testing.assert_close(merged, (out, lse))
    partial_out, partial_lse = (launches[0].arguments[name] for name in ("p_partial_out", "p_partial_lse"))
    pieces = [Partial(*piece) for piece in zip(partial_out, partial_lse, strict=True)]
    first = 0 if left is None else max(length - q_len - left, 0)
    ranges = split_ranges(length, **how, first=first, tile=SMALL_TILE)
    cut = decode.split_partials(q, k[:, :, :length], v[:, :, :length], ranges, window=(left, None), scale=0.25)
    for piece, expected in zip(pieces, cut, strict=False):
        torch.testing.assert_close(piece.lse, expected.lse)
        torch.testing.assert_close(piece.out, expected.out)
    assert all((piece.lse == float("-inf")).all() for piece in pieces[len(cut) :])
    torch.testing.assert_close(out, fold(cut).out)


def check_short_requests() -> None:
    """A short request is cut into no more splits than keep it as finely cut as a full cache, and not into fewer than it should be."""
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 100, 16)
    for length in (0, 10, 33, 41, 70, 100):
        options = DecodeOptions(
            torch.tensor([length]), None, None, 0, 0.25, 0.0, 5, merge_in_kernel=False, fewest_splits=2
        )
        (launch, _), _, _ = decode_launches(q, k, k, options)
        launch.start()
        live = int((launch.arguments["p_partial_lse"] > float("-inf")).sum())
        wanted = split_ranges(length, num_splits=max(2, -(-length // 20)), tile=SMALL_TILE)
        assert live == sum(1 for keys in wanted if keys), (length, live, wanted)


def check_batch_invariance(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(6, 4, 1, 16, generator=generator).half()
    k, v = (torch.randn(6, 2, 90, 16, generator=generator).half() for _ in range(2))
    lengths = torch.randint(0, 91, (6,), generator=generator)
    whole, whole_lse = decode_attention(q, k, v, lengths=lengths, split_size=32, return_lse=True, backend="triton")
    for b in range(6):
        alone, room = slice(b, b + 1), max(int(lengths[b]), 1)
        out, lse = decode_attention(
            q[alone],
            k[alone, :, :room],
            v[alone, :, :room],
            lengths=lengths[alone],
            split_size=32,
            return_lse=True,
            backend="triton",
        )
        assert torch.equal(out[0], whole[b]) and torch.equal(lse[0], whole_lse[b]), (seed, b)


@contextmanager
def fused_multiply_adds():
    """The interpreter rounds as a GPU does: a product that is added to something, or subtracted, is not rounded by itself."""
    multiply, reshapes = InterpreterBuilder.create_fmul, ("create_expand_dims", "create_broadcast")

    def product(builder, a, b):
        result = multiply(builder, a, b)
        result.set_attr("exact", a.data.astype(np.float64) * b.data.astype(np.float64))
        return result

    def fused(add):
        def round_once(builder, a, b):
            term, other = ("exact", "data") if "exact" in a.attr else ("data", "exact")
            exact = [x.attr.get("exact", x.data) if how == "exact" else x.data for x, how in ((a, term), (b, other))]
            return TensorHandle(add(*exact).astype(a.data.dtype), a.dtype.scalar)

        return round_once

    def carried(reshape):
        def with_product(builder, x, to):
            result = reshape(builder, x, to)
            if "exact" in x.attr:
                result.set_attr("exact", reshape(builder, replace(x, data=x.attr["exact"], dtype=tl.float64), to).data)
            return result

        return with_product

    with ExitStack() as patches, np.errstate(invalid="ignore"):
        changed = {"create_fmul": product, "create_fadd": fused(np.add), "create_fsub": fused(np.subtract)}
        changed |= {name: carried(getattr(InterpreterBuilder, name)) for name in reshapes}
        for name, replacement in changed.items():
            patches.enter_context(mock.patch.object(InterpreterBuilder, name, replacement))
        yield


def check_many_tiles(seed: int) -> None:
    """The sums are rescaled once per tile. In a long request too no error may be left but that of its sums, with fused products or not."""
    generator = torch.Generator().manual_seed(seed)
    key, k, v = (4 * torch.randn(1, 1, length, 16, generator=generator) for length in (1, 3000, 3000))
    q = key * torch.tensor([0.8, 0.9, 1.0, 1.1]).view(1, 4, 1, 1)
    k[:, :, :1] = key  # about the largest score of all: the maximum stays where it is from the first tile on
    with fused_multiply_adds():
        out, lse = decode_attention(q, k, v, num_splits=1, return_lse=True, backend="triton")
    comparison = check(out, lse, q, k, v)
    assert comparison.passed, f"seed {seed}: {comparison.message}"


def check_combine(seed: int) -> None:
    """The kernel against Partial's own merge, with infinities, and with NaN where no key was seen."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(40, 2, 3, 2, 24, generator=generator)
    lse = 20 * torch.randn(40, 2, 3, 2, generator=generator)
    draw = torch.rand(lse.shape, generator=generator)
    lse[draw < 0.2] = float("-inf")
    out[draw < 0.1] = float("nan")
    lse[:, 0, 0, 0] = float("-inf")
    lse[7, 1, 1, 1] = float("inf")
    lse[[3, 30], 1, 2, 0] = float("inf")
    expected, merged = (
        fold(Partial(*piece) for piece in zip(out, lse, strict=True)),
        combine_splits(out, lse, backend="triton"),
    )
    torch.testing.assert_close(merged[0], expected.out, equal_nan=True)
    torch.testing.assert_close(merged[1], expected.lse)


def check_shared_prefixes(seed: int) -> None:
    """Each level's keys in pieces or not, requests sorted by prefix or not: one kernel merges what lies in different orders."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    batch, group, q_len, dim = rng.randint(1, 3), rng.choice((1, 3)), rng.choice((1, 2)), rng.choice((16, 24))

    def tensor(*shape):
        return torch.randn(*shape, dim, generator=generator).to(dtype)

    q, own = tensor(batch, 2 * group, q_len), [tensor(batch, 2, 20) for _ in range(2)]
    levels, pieces = [], rng.choice((1, 3))
    for _ in range(rng.randint(1, 2)):
        prefixes = rng.randint(1, 2)
        members = None if prefixes == 1 else [rng.randrange(prefixes) for _ in range(batch)]
        levels.append(SharedPrefix(*(tensor(prefixes, 2, 12) for _ in range(2)), members=members))
    with mock.patch.object(prefix, "_pieces", lambda q, k, *_: pieces if len(k) == 1 else 1):
        started, start = [], Launch.start
        with mock.patch.object(Launch, "start", lambda launch: (started.append(launch.name), start(launch))):
            out, lse = shared_prefix_attention(q, levels, *own, return_lse=True)
    assert started.count("combine_packed") == len(levels), started
    of_request = [[0] * batch if level.members is None else level.members for level in levels]
    keys, values = (
        torch.cat([*(getattr(level, x)[chosen] for level, chosen in zip(levels, of_request, strict=True)), last], dim=2)
        for x, last in zip("kv", own, strict=True)
    )
    comparison = check(out, lse, q, keys, values, causal=True)
    assert comparison.passed, f"seed {seed}: {comparison.message}"


def check_the_operator() -> None:
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 8)
    lengths, table = torch.tensor([40, 7]), torch.tensor([[0, 1], [1, 1]], dtype=torch.int32)
    for options in (
        (lengths, None, None, 0, 0.25, 0.0, 2, None, "ieee"),
        (None, table, 9, 0, 0.25, 2.0, 0, 32, "ieee"),
    ):
        torch.library.opcheck(decode_triton, (q, k, v, *options))

    def step(q, k, v, lengths):
        return decode_attention(q, k, v, lengths=lengths, num_splits=2, backend="triton") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, lengths)
    assert torch.equal(compiled, step(q, k, v, lengths))


def check_the_grid() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 70_000, 16)
    try:
        decode_attention(q, k, k, split_size=1, backend="triton")
    except ValueError as error:
        assert "at most 65535 splits; got 70000 (split_size=1)" in str(error), error
    else:
        raise AssertionError("70000 splits were launched")


def main() -> None:
    seeds = seeds_asked_for(__doc__)
    tile_of = decode_launch.decode_tiles
    decode_launch.decode_tiles = lambda *problem: TileConfig(tile_of(*problem).block_m, SMALL_TILE, 4, 1)
    splits.LONGEST_SPLIT = 48
    decode_launch.MERGED_AT_ONCE = 512  # so that a merge takes several rounds
    with KernelWatch(), faults_raised():
        for seed in seeds:
            run_one(seed)
            check_both_merges_and_the_cuts(seed)
            check_shared_prefixes(seed)
        check_short_requests()
        check_batch_invariance(seeds.start)
        check_many_tiles(seeds.start)
        check_combine(seeds.start)
        check_the_operator()
        check_the_grid()
    left = counters.arrivals(1, torch.device("cpu"))
    assert not left.any(), "a launch left its arrival counters behind"
    print(f"{len(seeds)} problems within the budget")


if __name__ == "__main__":
    main()
