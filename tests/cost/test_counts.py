"""Counts of schedules, against the loops themselves run on small random problems."""

from collections import Counter

import pytest
import torch
from problems import random_mask

from flashlib import masks
from flashlib.cost import counts
from flashlib.cost.counts import BYTES, Problem, Work
from flashlib.cost.visible import Visible

PROBLEMS = 1000


def test_counts_equal_brute_force(rng) -> None:
    """Naive, FA-1, FA-2 and both backwards: each loop is run tile by tile on the dense mask, and counts what it does."""
    for _ in range(PROBLEMS):
        problem, dense = _random(rng)
        block_q, block_k = rng.randint(1, 12), rng.randint(1, 12)
        _equal(counts.naive(problem), _naive(problem, dense), problem)
        _equal(counts.fa1(problem, block_q, block_k), _fa1(problem, dense, block_q, block_k), problem)
        _equal(counts.fa2(problem, block_q, block_k), _fa2(problem, dense, block_q, block_k), problem)
        for products in (5, 7):
            _equal(
                counts.backward(problem, block_q, block_k, products=products),
                _backward(problem, dense, block_q, block_k, products),
                problem,
            )
        _equal(counts.formula(problem), _formula(problem, dense), problem)


def _random(rng) -> tuple[Problem, torch.Tensor]:
    batch, q_len, kv_len = rng.choice((1, 1, 2)), rng.randint(0, 24), rng.randint(0, 24)
    kv_heads, group = rng.choice((1, 2)), rng.choice((1, 1, 3))
    mask = random_mask(rng, batch, q_len, kv_len) or masks.Unmasked()
    intervals = mask.intervals(batch, q_len, kv_len)
    ends = zip(intervals.start.tolist(), intervals.stop.tolist(), strict=True)
    visible = tuple(Visible.from_intervals(*both, kv_len) for both in ends)
    problem = Problem(
        batch, kv_heads * group, kv_heads, q_len, kv_len, rng.randint(1, 9), rng.randint(1, 9), visible,
        dtype=rng.choice(("bf16", "fp32")), kv_dtype=rng.choice(("", "fp8")), softcap=rng.random() < 0.3,
    )  # fmt: skip
    return problem, intervals.dense().expand(batch, -1, -1).numpy()


def _equal(counted: Work, found: Counter, problem: Problem) -> None:
    told = Counter(products=counted.products, exponentials=counted.exponentials, other=counted.other)
    told.update({f"read {name}": value for name, value in counted.read.items()})
    told.update({f"written {name}": value for name, value in counted.written.items()})
    told, found = ({name: value for name, value in count.items() if value} for count in (told, found))
    assert told == found, problem


# The loops. Each adds up what it does where it does it.


def _formula(problem: Problem, dense) -> Counter:
    did = Counter()
    for entry in dense:
        for _ in range(problem.q_heads):
            for row in entry:
                seen = int(row.sum())
                _scores(did, problem, seen, seen, 0)
                did["products"] += 2 * problem.v_head_dim * seen
                did["other"] += problem.v_head_dim * (seen > 0)
                _move(did, "read q", 1, problem.head_dim, problem.dtype)
                _move(did, "written out", 1, problem.v_head_dim, problem.dtype)
        for _ in range(problem.kv_heads):
            keys = int(entry.any(0).sum())
            _move(did, "read k", keys, problem.head_dim, problem.kv_dtype)
            _move(did, "read v", keys, problem.v_head_dim, problem.kv_dtype)
    return did


def _naive(problem: Problem, dense) -> Counter:
    did, masked = Counter(), not dense.all()
    for _ in dense:
        for _ in range(problem.kv_heads):
            _move(did, "read k", problem.kv_len, problem.head_dim, problem.kv_dtype)
            _move(did, "read v", problem.kv_len, problem.v_head_dim, problem.kv_dtype)
        for _ in range(problem.q_heads):
            _move(did, "read q", problem.q_len, problem.head_dim, problem.dtype)
            _move(did, "written out", problem.q_len, problem.v_head_dim, problem.dtype)
            area = problem.q_len * problem.kv_len
            did["products"] += 2 * problem.head_dim * area
            _move(did, "written scores", area, 1, problem.dtype)
            steps = ["scale", *["cap"] * problem.softcap, *["mask"] * bool(masked)]
            for step in steps:
                _move(did, "read scores", area, 1, problem.dtype)
                did["other"] += area * (2 if step == "cap" else 1)
                did["exponentials"] += area * (step == "cap")
                _move(did, "written scores", area, 1, problem.dtype)
            _move(did, "read scores", area, 1, problem.dtype)  # the softmax: maximum, difference, exp, sum, division
            did["other"] += 4 * area
            did["exponentials"] += area
            _move(did, "written weights", area, 1, problem.dtype)
            _move(did, "read weights", area, 1, problem.dtype)
            did["products"] += 2 * problem.v_head_dim * area
    return did


def _fa1(problem: Problem, dense, block_q: int, block_k: int) -> Counter:
    did = Counter()
    for entry in dense:
        for _ in range(problem.q_heads):
            _move(did, "written out", problem.q_len, problem.v_head_dim, problem.dtype)
            _move(did, "written statistics", problem.q_len, 2, "fp32")
            for key in range(0, problem.kv_len, block_k):
                if entry[:, key : key + block_k].any():
                    keys = min(block_k, problem.kv_len - key)
                    _move(did, "read k", keys, problem.head_dim, problem.kv_dtype)
                    _move(did, "read v", keys, problem.v_head_dim, problem.kv_dtype)
                for row in range(0, problem.q_len, block_q):
                    tile = entry[row : row + block_q, key : key + block_k]
                    if not tile.any():
                        continue
                    rows = len(tile)
                    _move(did, "read q", rows, problem.head_dim, problem.dtype)
                    _move(did, "read out", rows, problem.v_head_dim, problem.dtype)
                    _move(did, "read statistics", rows, 2, "fp32")
                    _scores(did, problem, tile.size, tile.size, 0 if tile.all() else tile.size)
                    did["products"] += 2 * problem.v_head_dim * tile.size
                    did["other"] += rows  # m_new = max(m, m~)
                    did["other"] += 2 * rows  # m - m_new and m~ - m_new
                    did["exponentials"] += 2 * rows
                    did["other"] += 3 * rows  # l_new = e^(m - m_new) l + e^(m~ - m_new) l~
                    did["other"] += rows  # l e^(m - m_new), by which O is multiplied
                    did["other"] += 4 * rows * problem.v_head_dim  # O scaled, PV scaled, their sum, divided by l_new
                    _move(did, "written out", rows, problem.v_head_dim, problem.dtype)
                    _move(did, "written statistics", rows, 2, "fp32")
    return did


def _fa2(problem: Problem, dense, block_q: int, block_k: int) -> Counter:
    did = Counter()
    for entry in dense:
        for _ in range(problem.q_heads):
            for row in range(0, problem.q_len, block_q):
                rows = min(block_q, problem.q_len - row)
                _move(did, "read q", rows, problem.head_dim, problem.dtype)
                for key in range(0, problem.kv_len, block_k):
                    tile = entry[row : row + block_q, key : key + block_k]
                    if not tile.any():
                        continue
                    _move(did, "read k", tile.shape[1], problem.head_dim, problem.kv_dtype)
                    _move(did, "read v", tile.shape[1], problem.v_head_dim, problem.kv_dtype)
                    _scores(did, problem, tile.size, tile.size, 0 if tile.all() else tile.size)
                    did["products"] += 2 * problem.v_head_dim * tile.size
                    did["other"] += rows  # the new maximum
                    did["other"] += rows  # the old one less the new
                    did["exponentials"] += rows
                    did["other"] += 2 * rows  # l
                    did["other"] += rows * problem.v_head_dim  # O, corrected; the product is added to it
                did["other"] += rows * problem.v_head_dim + rows  # O / l, and m + log l
                did["exponentials"] += rows
                _move(did, "written out", rows, problem.v_head_dim, problem.dtype)
                _move(did, "written lse", rows, 1, "fp32")
    return did


def _backward(problem: Problem, dense, block_q: int, block_k: int, products: int) -> Counter:
    did, d, dv = Counter(), problem.head_dim, problem.v_head_dim
    for entry in dense:
        for _ in range(problem.q_heads):
            for _ in range(problem.q_len):
                _move(did, "read out", 1, dv, problem.dtype)
                _move(did, "read grad_out", 1, dv, problem.dtype)
                did["other"] += dv + dv - 1
                _move(did, "written delta", 1, 1, "fp32")
        for _ in range(problem.kv_heads):
            _move(did, "written dk", problem.kv_len, d, problem.dtype)
            _move(did, "written dv", problem.kv_len, dv, problem.dtype)
            for key in range(0, problem.kv_len, block_k):
                if entry[:, key : key + block_k].any():
                    _move(did, "read k", min(block_k, problem.kv_len - key), d, problem.kv_dtype)
                    _move(did, "read v", min(block_k, problem.kv_len - key), dv, problem.kv_dtype)
        for _ in range(problem.q_heads):
            for key in range(0, problem.kv_len, block_k):
                for row in range(0, problem.q_len, block_q):
                    tile = entry[row : row + block_q, key : key + block_k]
                    if not tile.any():
                        continue
                    _rows_again(did, problem, len(tile))
                    _weights_again(did, tile)
                    did["products"] += 2 * tile.size * (d + dv + dv + d)  # S, dP, dV, dK
                    if products == 5:
                        did["products"] += 2 * tile.size * d
                        _move(did, "read dq", len(tile), d, "fp32")
                        _move(did, "written dq", len(tile), d, "fp32")
            if products == 7:
                for row in range(0, problem.q_len, block_q):
                    rows = min(block_q, problem.q_len - row)
                    _rows_again(did, problem, rows)
                    _move(did, "written dq", rows, d, problem.dtype)
                    for key in range(0, problem.kv_len, block_k):
                        tile = entry[row : row + block_q, key : key + block_k]
                        if not tile.any():
                            continue
                        _move(did, "read k", tile.shape[1], d, problem.kv_dtype)
                        _move(did, "read v", tile.shape[1], dv, problem.kv_dtype)
                        _weights_again(did, tile)
                        did["products"] += 2 * tile.size * (d + dv + d)  # S, dP, dQ
    return did


def _scores(did: Counter, problem: Problem, pairs: int, exponentials: int, masked: int) -> None:
    did["products"] += 2 * problem.head_dim * pairs
    did["other"] += 4 * pairs + masked  # scale, maximum, difference, sum
    did["exponentials"] += exponentials
    if problem.softcap:
        did["other"] += 2 * pairs
        did["exponentials"] += pairs


def _weights_again(did: Counter, tile) -> None:
    did["other"] += 2 * tile.size + (0 if tile.all() else tile.size)  # scale, difference to the LSE
    did["exponentials"] += tile.size
    did["other"] += 2 * tile.size  # dP less delta, times P


def _rows_again(did: Counter, problem: Problem, rows: int) -> None:
    _move(did, "read q", rows, problem.head_dim, problem.dtype)
    _move(did, "read grad_out", rows, problem.v_head_dim, problem.dtype)
    _move(did, "read lse", rows, 1, "fp32")
    _move(did, "read delta", rows, 1, "fp32")


def _move(did: Counter, what: str, rows: int, channels: int, dtype: str) -> None:
    did[what] += rows * channels * BYTES[dtype]


def test_flashattention_forms_the_same_products_and_moves_fewer_bytes() -> None:
    """The gain is in bytes: at tiles of 128 the products are those of the formula, plus what half-masked tiles add."""
    problem = Problem.causal(1, 32, 8, 8192, 8192, 128)
    whole, tiled, least = counts.naive(problem), counts.fa2(problem, 128, 128), counts.formula(problem)
    assert least.products < tiled.products < 1.02 * least.products
    assert whole.products == pytest.approx(2 * least.products, rel=1e-3)
    assert whole.bytes > 5 * tiled.bytes
    assert counts.fa1(problem, 128, 128).bytes > tiled.bytes
    assert tiled.bytes > 10 * least.bytes  # asked of the cache, which answers most of it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "q_heads must be a multiple of kv_heads; got 8 and 3"),
        ({"q_len": -1}, "q_len must be at least 0; got -1"),
        ({"dtype": "bf17"}, "dtype must be one of .*; got 'bf17'"),
        ({"visible": (Visible.band(3, 3),)}, "visible is for 3 rows and 3 keys, but the problem has 16 and 16"),
    ],
)
def test_impossible_problems_are_refused(change, message) -> None:
    sizes = {"batch": 2, "q_heads": 8, "kv_heads": 2, "q_len": 16, "kv_len": 16, "head_dim": 64}
    with pytest.raises(ValueError, match=message):
        Problem(**(sizes | change))
