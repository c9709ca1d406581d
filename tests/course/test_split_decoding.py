"""What chapter 12 runs: schedules that work is conserved in, the wrong merge, merges in any order, and two figures."""

import random
import subprocess
import sys

import pytest
import torch

from flashlib.course import figures, recorded, widgets
from flashlib.course.chapters import split_decoding
from flashlib.course.chapters.split_decoding import distinct, merged_on_arrival, schedule, sum_of_splits
from flashlib.course.display import Figure
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.inference.decode import choose_num_splits, split_partials, split_ranges
from flashlib.launch.splits import SPLIT_COST
from flashlib.measure.records.record import load_record, new_record, save_record
from flashlib.partial import Partial, fold
from flashlib.reference import assert_within_budget, error_budget, largest_error, one_rounding, oracle


@pytest.fixture
def seed():
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    return seed


@pytest.fixture
def problem(seed):
    """q [2, 6, 1, 16], k [2, 2, n, 16], v [2, 2, n, 5]"""
    generator = torch.Generator().manual_seed(seed)
    keys = random.Random(seed).randint(20, 60)
    shapes = ((2, 6, 1, 16), (2, 2, keys, 16), (2, 2, keys, 5))
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def test_each_tile_is_read_once_and_nobody_reads_two_at_a_time(seed):
    draw = random.Random(seed)
    tiles = [draw.randint(0, 30) for _ in range(draw.randint(1, 12))]
    num_splits, sm_count = draw.randint(1, 9), draw.randint(1, 10)
    launch = schedule(tiles, num_splits, sm_count)
    for pair, count in enumerate(tiles):
        assert sum(program.tiles for program in launch.programs if program.pair == pair) == count
    for sm in range(sm_count):
        times = [time for p in launch.programs if p.sm == sm for time in (p.start, p.stop)]
        assert times == sorted(times)
    assert all(p.stop - p.start == p.tiles + SPLIT_COST and p.tiles > 0 for p in launch.programs)
    assert launch.busy == min(len(launch.programs), sm_count)
    assert launch.reading * launch.time * sm_count == pytest.approx(sum(tiles))


def test_splits_of_equal_requests_run_in_waves(seed):
    draw = random.Random(seed)
    for _ in range(20):
        pairs, tiles, sm_count = draw.randint(1, 40), draw.randint(1, 60), draw.randint(1, 20)
        num_splits = draw.choice([n for n in range(1, tiles + 1) if tiles % n == 0])
        waves = -(-pairs * num_splits // sm_count)
        assert schedule([tiles] * pairs, num_splits, sm_count).time == waves * (tiles // num_splits + SPLIT_COST)


def test_the_choice_is_the_best_of_the_schedules():
    """Up to 64 tiles of 64 keys, where no split is too long."""
    for batch in (1, 2, 5, 30):
        chosen = choose_num_splits(batch, 8, 64 * 64, sm_count=132)
        times = [schedule([64] * 8 * batch, n, 132).time for n in range(1, 65)]
        assert times[chosen - 1] <= 1.1 * min(times)


@pytest.mark.parametrize("tiles, num_splits, sm_count", [([4], 0, 3), ([4], 2, 0), ([4, -1], 2, 3)])
def test_a_schedule_of_nonsense_is_refused(tiles, num_splits, sm_count):
    with pytest.raises(ValueError, match=r"num_splits and sm_count must be at least 1, and tiles at least 0"):
        schedule(tiles, num_splits, sm_count)


def test_nothing_to_do():
    launch = schedule([0, 0], 4, 3)
    assert (launch.time, launch.busy, launch.reading) == (0, 0, 0)


def test_the_sum_of_splits_is_wrong_by_about_their_number(problem):
    q, k, v = problem
    exact = oracle(q, k, v)[0]
    assert_within_budget(sum_of_splits(q, k, v, 1), q, k, v)
    for num_splits in (2, 7):
        shared = torch.ones_like(v[:, :1]).expand_as(v)  # all values 1: the output is the sum of the weights
        total = sum_of_splits(q, k, shared, num_splits)
        assert torch.allclose(total, torch.full_like(total, num_splits))
        assert (sum_of_splits(q, k, v, num_splits).double() - exact).norm() > 0.1 * exact.norm()
    with pytest.raises(ValueError, match=rf"from 1 to the number of keys, {k.shape[2]}; got 0"):
        sum_of_splits(q, k, v, 0)


def test_in_any_order_the_merge_is_right_and_some_bits_differ(problem):
    q, k, v = problem
    pieces = split_partials(q, k, v, split_ranges(k.shape[2], num_splits=9, tile=2))
    runs = merged_on_arrival(pieces, runs=60)
    exact, budget, merges = Partial(*oracle(q, k, v)), error_budget(q, k, v), len(pieces) - 1
    for run in runs:  # each merge rounds once more
        assert largest_error(run.out, exact.out) <= budget.out + merges * one_rounding(exact.out, torch.float32)
        assert largest_error(run.lse, exact.lse) <= budget.lse + merges * one_rounding(exact.lse, torch.float32)
    assert 1 < distinct(run.out for run in runs) <= 60
    assert distinct(fold(pieces).out for _ in range(5)) == 1
    again = merged_on_arrival(pieces, runs=60)
    assert all(torch.equal(a.out, b.out) for a, b in zip(runs, again, strict=True))


def test_distinct_counts_bits():
    zero = torch.zeros(3)
    assert distinct([zero, -zero, zero.clone()]) == 2
    assert distinct([torch.ones(2, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)[::2]]) == 1
    assert distinct([]) == 0


def test_the_schedule_is_told_in_words():
    figure = figures.split_schedule([24, 6], 4, 12)
    assert figure.alt == (
        "2 pairs of a request and a KV head, with 24, 6 tiles of keys, on 12 multiprocessors, 4 splits of each. Of the multiprocessors 7 had "
        "something to do, the last program ended after the time of 8 tiles, and keys were read in 31% of all multiprocessors' time."
    )
    assert "1 pair of a request" in figures.split_schedule([5], 1, 1).alt
    with pytest.raises(ValueError, match=r"tiles must hold at least one tile; got \[0\]"):
        figures.split_schedule([0], 1, 4)


def test_the_shares_are_told_in_words():
    figure = figures.split_shares(torch.tensor([[0.9, 0.1], [0.25, 0.75]]), title="Two heads")
    assert figure.alt == (
        "Two heads. The heaviest of 2 splits, and its share. head 0: split 0 has 0.9; head 1: split 1 has 0.8."
    )
    for shares in (torch.ones(4), torch.ones(2, 2), torch.empty(0, 3)):
        with pytest.raises(ValueError, match=r"shares must be \[heads, splits\], with rows that sum to 1"):
            figures.split_shares(shares, title="x")


def test_the_explorer_redraws_and_stands_still_without_a_reader(reader):
    explorer = widgets.split_explorer()
    before = explorer.figure.alt
    for value in explorer.controls["batch"].options:
        explorer.controls["batch"].value = value
    explorer.controls["num_splits"].value = 24
    assert explorer.figure.alt != before and "24 splits of each" in explorer.figure.alt


def test_without_widgets_it_is_a_figure(nobody):
    assert isinstance(widgets.split_explorer(), Figure)


def test_recorded_split_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "BENCHMARKS", tmp_path)
    (missing,) = recorded.recorded_split_counts()
    assert "Not recorded yet" in str(missing) and "benchmarks/split_counts.py" in str(missing)
    assert (REPOSITORY / "benchmarks/split_counts.py").exists()

    case = {"kv_heads": 8, "length": 8192, "sm_count": 132}
    rows = [
        {**case, "batch": batch, "chosen": chosen, "num_splits": count, "split_size": size, "ms": ms}
        for batch, chosen in ((1, 16), (4, 5))
        for count, size, ms in ((1, None, 0.8), (4, None, 0.2), (16, None, 0.1), (None, 512, 0.15))
    ]
    save_record(new_record("split_counts", rows, []), tmp_path / "a100")
    monkeypatch.setattr(recorded, "load_record", lambda name: load_record(name, tmp_path))
    chart, choices = recorded.recorded_split_counts()
    assert "batch 4: 800 at 1 to 100 at 16" in chart.alt and "recorded on" in chart.alt
    first, second = [line.split() for line in str(choices).splitlines()[2:4]]
    assert first == ["1", "16", "16", "8.00", "1.00", "1.50"]
    assert second == ["4", "16", "5", "8.00", "2.00", "1.50"]  # 4 splits stand in for 5, which were not measured


def test_the_script_that_records_them_runs_without_a_gpu(tmp_path):
    command = [sys.executable, "benchmarks/split_counts.py", "--out", str(tmp_path), "--seconds", "0"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    rows = load_record("split_counts", tmp_path).rows
    assert {row["num_splits"] for row in rows} == {1, 2, 4, None} and all(row["ms"] > 0 for row in rows)


def test_the_module_says_what_it_offers():
    assert all(hasattr(split_decoding, name) for name in split_decoding.__all__)
