"""Nothing hangs: a rank that refuses, disagrees, raises, dies or is elsewhere ends the call on all of them, by name."""

import time

import pytest
from worlds import World

from flashlib.parallel import ParallelError

BOUND = 30.0  # seconds


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("head_dim", "disagree about head_dim: 8 on ranks 0, 2, 3; 16 on rank 1"),
        ("dtype", "disagree about dtype: float32 on ranks 0, 2, 3; float64 on rank 1"),
        ("heads", "disagree about query heads: 4 on ranks 0, 2, 3; 8 on rank 1"),
        ("mask", "disagree about mask"),
        ("method", "disagree about method: 'ring' on ranks 0, 2, 3; 'gather' on rank 1"),
        ("layout", "disagree about layout: 'contiguous' on ranks 0, 2, 3; 'zigzag' on rank 1"),
    ],
)
def test_ranks_that_disagree(four_ranks, about, message):
    four_ranks.ask("parallel_ranks:disagreeing", about)
    for answer in four_ranks.answers(BOUND):
        assert isinstance(answer, ParallelError) and message in str(answer) and answer.ranks == (1,), answer
    assert four_ranks.run("parallel_ranks:works_again") == [[1, 4, 8, 8]] * 4


def test_a_rank_that_refuses(four_ranks):
    four_ranks.ask("parallel_ranks:disagreeing", "type")
    answers = four_ranks.answers(BOUND)
    assert isinstance(answers[1], TypeError) and "mask must be a flashlib.masks.Mask" in str(answers[1])
    for answer in (answers[0], *answers[2:]):
        assert isinstance(answer, ParallelError) and "rank 1 refused the call: TypeError: mask must be" in str(answer)
    assert four_ranks.run("parallel_ranks:works_again") == [[1, 4, 8, 8]] * 4


@pytest.mark.parametrize(
    ("about", "message"),
    [("lengths", "layout 'zigzag' of 23 tokens has"), ("mask of other lengths", "Documents: q_ids has shape (1, 5)")],
)
def test_what_fits_no_rank_is_told_to_all(four_ranks, about, message):
    four_ranks.ask("parallel_ranks:disagreeing", about)
    for answer in four_ranks.answers(BOUND):
        assert isinstance(answer, ValueError) and message in str(answer), answer
    assert four_ranks.run("parallel_ranks:works_again") == [[1, 4, 8, 8]] * 4


def test_ranks_that_are_at_different_places(four_ranks):
    four_ranks.ask("parallel_ranks:one_goes_back")
    for answer in four_ranks.answers(BOUND):
        told = "disagree about what to call: parallel_attention on ranks 1, 2, 3; the backward pass of parallel_attention on rank 0"
        assert isinstance(answer, ParallelError) and told in str(answer), answer
    assert four_ranks.run("parallel_ranks:works_again") == [[1, 4, 8, 8]] * 4


@pytest.mark.parametrize("how", ["raises", "raises backward", "interrupted"])
def test_a_rank_that_raises_ends_all(four_ranks, how):
    begun = time.monotonic()
    four_ranks.ask("parallel_ranks:failing", how, 2)
    answers = four_ranks.answers(BOUND)
    assert time.monotonic() - begun < BOUND
    own = KeyboardInterrupt if how == "interrupted" else MemoryError
    assert isinstance(answers[2], own), answers[2]
    for answer in (*answers[:2], answers[3]):
        assert isinstance(answer, ParallelError) and f"rank 2 raised {own.__name__}" in str(answer), answer
        assert answer.ranks == (2,)
    assert four_ranks.run("parallel_ranks:works_again") == [[1, 4, 8, 8]] * 4


@pytest.mark.parametrize(
    ("how", "culprit"),
    [
        ("killed", 1),
        ("killed backward", 0),  # which keeps the store
        ("hangs", 1),
        pytest.param("killed backward", 2, marks=pytest.mark.long),
        pytest.param("absent", 2, marks=pytest.mark.long),
        pytest.param("hangs backward", 0, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_is_gone_ends_all(how, culprit):
    world = World(3, timeout=60.0 if how.startswith("killed") else 8.0)
    try:
        others = [rank for rank in range(3) if rank != culprit]
        begun = time.monotonic()
        world.ask("parallel_ranks:failing", how, culprit)
        answers = world.answers(BOUND, others)
        assert time.monotonic() - begun < BOUND
        for answer in answers:
            assert isinstance(answer, ParallelError), answer
            assert answer.ranks == (culprit,) and f"rank {culprit}" in str(answer), answer
    finally:
        world.close()
    assert not any(process.is_alive() for process in world.processes)
