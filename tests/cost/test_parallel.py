"""What each device does of a shared call, against the rows and heads that it has; and what it sends."""

import pytest

from flashlib.cost.counts import Problem, formula
from flashlib.cost.parallel import Parallel
from flashlib.cost.visible import Visible


def test_shares_add_up_to_the_whole(rng) -> None:
    for _ in range(60):
        length, window = rng.randint(16, 60), rng.choice((None, 5))
        problem = Problem.causal(2, 8, 4, length, length + rng.choice((0, 7)), 16, window=window)
        parallel = Parallel(
            rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 2, 3)), rng.choice(("zigzag", "contiguous"))
        )
        shared = parallel.share(problem)
        assert len(shared.problems) * shared.copies == parallel.devices
        for kind in ("products", "exponentials", "other"):
            assert getattr(shared.total, kind) == getattr(formula(problem), kind), parallel
        rows = sorted(row for parts in parallel.rows(length) for part in parts for row in part)
        assert rows == list(range(length))


def test_rows_of_a_device_see_what_they_saw(rng) -> None:
    mask = Visible.band(40, 47, left=9, right=0)
    parts = [range(3, 11), range(30, 40)]
    taken = mask.take(parts)
    rows = [(max(0, row + 7 - 9), row + 8) for part in parts for row in part]
    assert taken.pairs == sum(stop - start for start, stop in rows)
    assert [taken.take([range(n, n + 1)]).pairs for n in range(18)] == [stop - start for start, stop in rows]


def test_zigzag_balances_a_causal_mask() -> None:
    problem = Problem.causal(1, 8, 8, 8192, 8192, 64)
    assert Parallel(context=8).share(problem).imbalance < 1.001
    assert Parallel(context=8, order="contiguous").share(problem).imbalance == pytest.approx(15 / 8, rel=1e-3)


def test_bytes_sent() -> None:
    problem = Problem(1, 32, 8, 1024, 1024, 128)
    # A ring: a device's keys and values, an eighth of all, go out seven times. In the backward again, and their gradients come back.
    assert Parallel(context=8).sent(problem) == 7 * (1024 / 8) * 8 * 2 * 128 * 2
    assert Parallel(context=8).sent_backward(problem) == 2 * Parallel(context=8).sent(problem)
    # All-to-all: of its tokens' q, k, v and out, all but the part that it keeps.
    assert Parallel(sequence=4).sent(problem) == 256 * (32 * 2 + 8 * 2) * 128 * 2 * 3 / 4
    # Two KV heads for four devices: each device's tokens' keys go to three others, one head to each.
    few = Problem(1, 32, 2, 1024, 1024, 128)
    assert Parallel(sequence=4).sent(few) == 256 * (32 * 2 * 3 / 4 + 3 * 2) * 128 * 2
    assert Parallel(tensor=8).sent(problem) == 0


def test_what_no_row_sees_is_not_sent() -> None:
    causal = Problem.causal(1, 1, 1, 64, 64, 1)
    assert Parallel(context=4, order="contiguous").received(causal) == [0, 16, 32, 48]
    assert Parallel(context=4, order="contiguous").sent_by(causal) == [48, 32, 16, 0]
    # In zigzag order the last of a device's rows see all before them, and of 8 parts device n has the n-th from either end.
    assert Parallel(context=4).received(causal) == [8 * 8 - 8 * n - 16 for n in range(4)]
    window = Problem.causal(1, 1, 1, 64, 64, 1, window=5)
    assert Parallel(context=4, order="contiguous").received(window) == [0, 5, 5, 5]
    packed = Problem(1, 1, 1, 64, 64, 1, visible=(Visible.packed([16] * 4),))
    assert Parallel(context=4, order="contiguous").received(packed) == [0, 0, 0, 0]
    both = Problem(2, 1, 1, 64, 64, 1, visible=(Visible.packed([16] * 4), Visible.packed([20, 44])))
    assert Parallel(context=4, order="contiguous").received(both) == [4, 48, 28, 28]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parallel(tensor=0), "tensor must be at least 1; got 0"),
        (lambda: Parallel(order="striped"), "order must be one of zigzag, contiguous; got 'striped'"),
        (lambda: Parallel(tensor=3).heads(32, 8), "must divide the 32 query heads; got 3"),
        (lambda: Parallel(tensor=4).heads(12, 6), "must divide the 6 KV heads, or be a multiple of them; got 4"),
        (lambda: Parallel(context=8).rows(10), "10 rows do not make 16 parts"),
    ],
)
def test_impossible_shares_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
