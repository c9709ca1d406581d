"""The choices repeated in flashlib.cost.launches, held against the kernels that make them."""

import pytest
import torch

from flashlib import masks
from flashlib.cost import launches
from flashlib.cost.counts import Problem
from flashlib.cost.devices import device
from flashlib.cost.launches import Tiles, backward_launches, decode_launches, forward_launches
from flashlib.cost.visible import Visible
from flashlib.inference import decode
from flashlib.launch import decode as decode_launch
from flashlib.launch import hopper as hopper_launch
from flashlib.launch import plain as plain_launch
from flashlib.launch import splits, tiles
from flashlib.launch.options import KernelOptions
from flashlib.spec import AttentionSpec

H200, A100 = device("h200"), device("a100")


def _same(mine: Tiles, theirs) -> bool:
    return mine == Tiles(theirs.block_m, theirs.block_n)


def test_tables_are_those_of_the_kernels() -> None:
    for name in ("HOPPER", "HOPPER_BACKWARD", "HOPPER_BACKWARD_ROOMY", "HOPPER_DQ"):
        mine, theirs = getattr(launches, name), getattr(tiles, name)
        assert mine.keys() == theirs.keys()
        assert all(_same(mine[width], theirs[width]) for width in mine), name
    for name in ("HOPPER_ROOMY", "HOPPER_NARROW", "HOPPER_BACKWARD_PAIRED"):
        assert _same(getattr(launches, name), getattr(tiles, name)), name
    for name in ("HOPPER_LEAST_KEYS", "HOPPER_BACKWARD_LEAST_KEYS"):
        assert getattr(launches, name) == getattr(tiles, name), name
    for name in (
        "HOPPER_CACHE",
        "HOPPER_SPREAD",
        "BACKWARD_SPREAD",
        "PAIR_CHANNELS_PER_NS",
        "PART_BYTES_PER_NS",
        "SUM_NS",
        "MOST_PARTS",
        "MOST_PART_WAVES",
        "SUMMED_KEYS",
    ):
        assert getattr(launches, name) == getattr(hopper_launch, name), name
    for width in (64, 128, 256):
        for major in (8, 9):
            assert _same(launches.DECODE_TABLE[major][width], decode_launch.DECODE_TABLE[major][width])
    assert _same(launches.DECODE_FP32, decode_launch.DECODE_FP32)
    for name in (
        "SPLIT_COST",
        "MOST_SPLITS",
        "LONGEST_SPLIT",
        "LONGEST_SPLIT_OF_SMALL_PAGES",
        "LEAST_MERGED_IN_KERNEL",
    ):
        assert getattr(launches, name) == getattr(splits, name), name


def _random(rng) -> tuple[AttentionSpec, Problem]:
    """A spec on the meta device, so that no memory is taken, and the problem that it is."""
    kv_heads, group = rng.choice((1, 2, 8)), rng.choice((1, 4, 8))
    q_len = rng.choice((1, 60, 500, 1000, 3000))
    kv_len = rng.choice((q_len, q_len + 700))
    head_dim, batch = rng.choice((32, 64, 80, 128, 256)), rng.choice((1, 3))
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    mask = rng.choice((None, masks.Causal(), masks.Window(100, 0), masks.KeyLengths([kv_len // 2] * batch)))
    q = torch.empty(batch, kv_heads * group, q_len, head_dim, dtype=dtype)
    k = torch.empty(batch, kv_heads, kv_len, head_dim, dtype=dtype)
    spec = AttentionSpec.from_tensors(q, k, k, mask=mask, softcap=rng.choice((0.0, 0.0, 30.0)))
    return spec, Problem.from_spec(spec)


def test_tiles_are_chosen_as_the_kernels_choose_them(rng) -> None:
    for _ in range(60):
        spec, problem = _random(rng)
        options = KernelOptions.from_spec(spec)
        q, k = (torch.empty(shape, dtype=spec.dtype) for shape in _shapes(problem))
        wide = problem.head_dim
        plain = options.demands(q, k, k)
        for gpu in (H200, A100):
            hopper = gpu is H200 and spec.dtype != torch.float32 and wide <= 128
            for kernel, mine in (("forward", launches.forward_tiles), ("dkdv", launches.dkdv_tiles), ("dq", launches.dq_tiles)):  # fmt: skip
                if hopper and kernel != "forward":
                    continue  # these are held against whole launches below
                theirs = tiles.tile_config(kernel, spec.dtype, wide, gpu.capability, demands=plain)
                if hopper:
                    keys = hopper_launch.keys_per_row(spec.q_len, spec.kv_len, options)
                    theirs = hopper_launch.hopper_tiles(wide, keys, options)
                assert _same(mine(problem, gpu), theirs), (kernel, gpu.name, problem)
            rows = problem.group * problem.q_len
            assert _same(
                launches.decode_tiles(problem, gpu), decode_launch.decode_tiles(rows, spec.dtype, wide, gpu.capability)
            )


def test_the_backward_of_hopper_is_tiled_ordered_and_cut_into_parts_as_it_is_launched(rng) -> None:
    cut = paired = 0
    for _ in range(120):
        spec, problem = _random(rng)
        if spec.dtype == torch.float32 or problem.head_dim > 128:
            continue
        launched = {launch.name: launch for launch in _hopper_backward(spec, problem)}
        mine = {launch.kernel: launch for launch in backward_launches(problem, H200)}
        assert ("hopper_sum_parts" in mine) == ("hopper_sum_parts" in launched), problem
        if "hopper_sum_parts" in mine:
            assert mine["hopper_sum_parts"].program_count == launched["hopper_sum_parts"].grid[0]
            written = sum(launched["hopper_dkdv"].arguments[name].numel() for name in ("p_dk_parts", "p_dv_parts"))
            assert mine["hopper_dkdv"].work.written["partial"] == 4 * written
        of_keys, of_rows = launched["hopper_dkdv"], launched["hopper_dq"]
        parts = launches.dkdv_parts(problem, H200)
        assert of_keys.arguments["parts"] == parts
        assert _same(launches.dkdv_tiles(problem, H200), of_keys.tiles)
        assert _same(launches.dq_tiles(problem, H200), of_rows.tiles)
        group = problem.group // parts
        passing = problem.q_len * 2 * problem.head_dim * problem.itemsize * group
        for launch, heads, head_bytes in (
            (of_keys, problem.kv_heads * parts, passing),
            (of_rows, problem.q_heads, launches._bytes_per_head(problem)),
        ):
            count = mine[launch.name].program_count
            assert count == launch.grid[0], problem
            heads *= problem.batch
            together = launches.backward_together(problem, heads, count // heads, H200, head_bytes)
            assert together == launch.arguments["heads_together"], (launch.name, problem)
        cut += parts > 1
        paired += of_keys.tiles.consumers == 1
    assert cut and paired


def _hopper_backward(spec: AttentionSpec, problem: Problem):
    """The launches of a backward on a Hopper GPU, which need not be there."""
    q, k, v, out = (
        torch.empty(shape, dtype=spec.dtype) for shape in (*_shapes(problem), *reversed([*_shapes(problem)]))
    )
    lse = torch.empty(problem.batch, problem.q_heads, problem.q_len)
    return plain_launch.backward_launches(
        q, k, v, out, lse, out, None, KernelOptions.from_spec(spec),
        dkdv=hopper_launch.hopper_dkdv_launches, dq=hopper_launch.hopper_dq_launches,
    )[0]  # fmt: skip


def _shapes(problem: Problem):
    sizes = ((problem.q_heads, problem.q_len), (problem.kv_heads, problem.kv_len))
    return ((problem.batch, heads, length, problem.head_dim) for heads, length in sizes)


def test_heads_are_grouped_and_keys_split_as_the_kernels_do(rng) -> None:
    for _ in range(200):
        batch, kv_heads, length = rng.randint(1, 64), rng.choice((1, 2, 8)), rng.randint(1, 200_000)
        chosen = decode.choose_num_splits(batch, kv_heads, length, sm_count=132, block_n=64)
        assert launches.num_splits(batch, kv_heads, length, units=132, block_n=64) == chosen
        problem = Problem.causal(rng.randint(1, 16), 16, 4, rng.randint(1, 9000), rng.randint(1, 9000), 128)
        row_blocks, heads = -(-problem.q_len // 128), problem.batch * 16
        programs = min(132, row_blocks * heads)
        head_bytes, spread = problem.visible[0].seen_keys * 128 * 2 * 2 / 4, hopper_launch.HOPPER_SPREAD
        theirs = hopper_launch.heads_together(heads, row_blocks, programs, head_bytes, spread)
        assert launches._heads_together(problem, heads, row_blocks, 132, head_bytes, spread) == theirs


def test_programs_visit_the_tiles_of_the_schedule(rng) -> None:
    """Over all programs of the forward: each head's blocks, each with the tiles from its first to its last."""
    for _ in range(30):
        q_len, kv_len = rng.randint(1, 2000), rng.randint(1, 2000)
        problem = Problem(2, 8, 2, q_len, kv_len, 128, visible=(Visible.band(q_len, kv_len, right=0),))
        main = forward_launches(problem, H200)[-1]
        tile = launches.forward_tiles(problem, H200)
        assert main.program_count == -(-q_len // tile.block_m) * 16
        hulls = [max(1, block.hull) for block in problem.visible[0].trimmed().by_rows(tile.block_m, tile.block_n)]
        assert main.tiles == 16 * sum(hulls)
        assert main.work.products == main.tiles * main.tile.products


def test_seven_products_in_the_backward_and_k_and_v_once_in_decoding() -> None:
    problem = Problem(1, 16, 16, 4096, 4096, 128)
    executed = sum(launch.work.products for launch in backward_launches(problem, H200))
    assert executed == 7 * 2 * 128 * 16 * 4096 * 4096
    step = Problem.causal(16, 32, 8, 1, 8192, 128)
    (kernel,) = decode_launches(step, H200)
    once = 16 * 8 * 8192 * 128 * 2
    assert kernel.work.read["k"] == kernel.work.read["v"] == once
    paged = decode_launches(step, H200, page_size=16)[0]
    assert paged.work.read["block_table"] == 16 * 8 * (8192 // 16) * 4
    ragged = decode_launches(step, H200, lengths=[8192] + [1] * 15)[0]
    assert ragged.work.read["k"] == 8 * (8192 + 15) * 128 * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: forward_launches(Problem(1, 1, 1, 8, 8, 320), H200), "head_dim of at most 256; got 320"),
        (lambda: forward_launches(Problem(1, 1, 1, 8, 8, 64, dtype="fp8"), H200), "dtype must be fp16, bf16 or fp32"),
        (lambda: forward_launches(Problem(1, 1, 1, 8, 8, 64), device("epyc-9654")), "our kernels run on GPUs"),
        (lambda: decode_launches(Problem(2, 1, 1, 1, 8, 64), H200, lengths=[3]), "one for each of the 2 requests; got 1"),
        (lambda: decode_launches(Problem(1, 1, 1, 1, 8, 64), H200, lengths=[9]), "at most the capacity, 8; got 9"),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_run_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
