"""What ranks send, how evenly they work, what they hold, and that all of it repeats: counted, on two and four ranks."""

import secrets

import pytest
import torch
from parallel_ranks import cache_steps, loaded, whole

from flashlib import attention, masks
from flashlib.cost import Parallel, Problem, Visible
from flashlib.inference import KVCache
from flashlib.parallel.layout import part_positions
from flashlib.parallel.plan import Plan
from flashlib.reference import check, check_gradients

FP32 = 4


def test_same_bits_twice(two_ranks, rng):
    assert all(two_ranks.run("parallel_ranks:repeated", [rng.getrandbits(32) for _ in range(12)]))


@pytest.mark.parametrize("method", ["ring", "all_to_all", "gather"])
def test_gradcheck(two_ranks, method):
    two_ranks.run("parallel_ranks:checked_by_torch", method, "zigzag")


@pytest.mark.parametrize(
    ("method", "layout"), [("ring", "striped"), ("all_to_all", "zigzag"), ("gather", "contiguous")]
)
def test_sinks_and_their_gradient(two_ranks, method, layout):
    seed = secrets.randbits(32)
    parts = [loaded(x) for x in two_ranks.run("parallel_ranks:with_sinks", seed, method, layout)]
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, heads, 19, 8) for heads in (4, 2, 2))
    sinks = torch.randn(4)
    inputs = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    attention(*inputs[:3], causal=True, sinks=inputs[3], backend="reference").square().sum().backward()
    out, *gradients = (whole(list(each), layout) for each in zip(*(part[:4] for part in parts), strict=True))
    assert check(out, None, q, k, v, causal=True, sinks=sinks).passed, f"seed {seed}"
    assert torch.equal(parts[0][4], parts[1][4])
    naive = [x.detach().clone().requires_grad_() for x in (q, k, v, sinks)]
    attention(*naive[:3], causal=True, sinks=naive[3], backend="reference").square().sum().backward()
    for found, exact, rounded in zip((*gradients, parts[0][4]), inputs, naive, strict=True):
        # Of a loss that is a square the gradient is made from an output that was rounded: a few of its roundings are granted.
        error = (rounded.grad - exact.grad).abs().max()
        granted = 2 * error + 8 * torch.finfo(torch.float32).eps * exact.grad.abs().max()
        assert (found - exact.grad).abs().max() <= granted, f"seed {seed}"


def test_dtensors(two_ranks):
    parts = [loaded(x) for x in two_ranks.run("parallel_ranks:on_dtensors", 13)]
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 4, 13, 8) for _ in range(3))
    out, *gradients = parts[0]
    assert check(out, None, q, k, v, causal=True).passed
    assert check_gradients(gradients, q, k, v, 2 * out, causal=True).passed


def test_shard_and_unshard(four_ranks, rng):
    assert all(four_ranks.run("parallel_ranks:sharded_and_back", [rng.getrandbits(32) for _ in range(12)]))


def test_checkpoints_and_compiled_programs(two_ranks):
    plain, kept, compiled = (
        [loaded(part) for part in two_ranks.run("parallel_ranks:as_programs_call_it", how)]
        for how in ("plain", "checkpoint", "compile")
    )
    for other in (kept, compiled):
        assert all(
            torch.equal(a, b) for one, two in zip(plain, other, strict=True) for a, b in zip(one, two, strict=True)
        )


def test_a_mesh_of_some_of_the_ranks(four_ranks):
    answers = four_ranks.run("parallel_ranks:on_a_part_of_the_ranks")
    assert answers[:2] == [[1, 2, 4, 8]] * 2
    assert answers[2:] == ["mesh must have this rank in it; got ranks [0, 1]"] * 2


# Bytes


def rule_of(name: str, length: int):
    return {
        "all": masks.Unmasked(),
        "causal": masks.Causal(),
        "window": masks.Window(9, 0),
        "documents": masks.Documents.from_lengths([length // 3, length // 2, length - length // 3 - length // 2]),
        "padded": masks.KeyLengths([length - 7, length // 2]),
    }[name]


def problem_of(rule, length: int, heads: tuple[int, int]) -> Problem:
    """The problem of :func:`parallel_ranks.sent`, on paper."""
    intervals = rule.intervals(2, length, length)
    rows = zip(intervals.start.tolist(), intervals.stop.tolist(), strict=True)
    visible = tuple(Visible.from_intervals(*both, length) for both in rows)
    return Problem(2, *heads, length, length, 16, visible=visible, dtype="fp32")


@pytest.mark.parametrize("name", ["all", "causal", "window", "documents", "padded"])
@pytest.mark.parametrize(("method", "layout"), [("ring", "zigzag"), ("ring", "contiguous"), ("gather", "zigzag")])
def test_bytes_of_a_ring_are_those_of_the_formula(four_ranks, name, method, layout):
    length, heads = 101, (4, 2)
    rule = rule_of(name, length)
    found = four_ranks.run("parallel_ranks:sent", length, method, layout, heads, rule, (4,))
    shared, problem = Parallel(context=4, order=layout), problem_of(rule, length, heads)
    key = 2 * heads[1] * 2 * 16 * FP32  # of both batch entries, key and value
    sent, received = shared.sent_by(problem), shared.received(problem)
    assert [rank["forward"] for rank in found] == [keys * key for keys in sent]
    # Keys once more, and the gradients of those that came.
    assert [rank["backward"] for rank in found] == [
        (out + back) * key for out, back in zip(sent, received, strict=True)
    ]
    assert sum(rank["forward"] for rank in found) == pytest.approx(4 * shared.sent(problem))
    assert sum(rank["backward"] for rank in found) == pytest.approx(4 * shared.sent_backward(problem))


@pytest.mark.parametrize("heads", [(8, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize(("method", "shape"), [("all_to_all", (4,)), ("hybrid", (2, 2))])
def test_bytes_of_teams_are_those_of_the_formula(four_ranks, heads, method, shape):
    length = 96
    found = four_ranks.run("parallel_ranks:sent", length, method, "zigzag", heads, masks.Causal(), shape)
    ring = 4 // shape[-1] if method == "hybrid" else 1
    shared, problem = Parallel(sequence=shape[-1], context=ring), problem_of(masks.Causal(), length, heads)
    assert sum(rank["forward"] for rank in found) == pytest.approx(4 * shared.sent(problem))
    assert sum(rank["backward"] for rank in found) == pytest.approx(4 * shared.sent_backward(problem))


def test_what_nobody_sees_is_not_sent(four_ranks):
    """Documents that end where parts end, and a window within one part: nothing; a window: its keys alone."""
    apart = masks.Documents.from_lengths([20] * 4)
    for method in ("ring", "gather"):
        found = four_ranks.run("parallel_ranks:sent", 80, method, "contiguous", (2, 1), apart, (4,))
        assert [(rank["forward"], rank["backward"], rank["messages"]) for rank in found] == [(0, 0, 0)] * 4
    found = four_ranks.run("parallel_ranks:sent", 80, "ring", "contiguous", (2, 1), masks.Window(3, 0), (4,))
    assert [rank["forward"] for rank in found] == [3 * 2 * 2 * 16 * FP32] * 3 + [0]


# Balance and memory


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_causal_work_is_balanced(ranks, layout):
    for length in (ranks * 64, 1000, 4097):
        parts = part_positions(length, ranks, layout)
        assert Plan.of(masks.Causal(), 1, length, length, parts, parts).imbalance() < 1.1, length
        contiguous = part_positions(length, ranks, "contiguous")
        unbalanced = Plan.of(masks.Causal(), 1, length, length, contiguous, contiguous).imbalance()
        assert unbalanced == pytest.approx(2 - 1 / ranks, rel=0.02)


def test_pieces_of_a_plan_are_the_whole():
    """Every visible pair is in one piece, whatever the layout."""
    for layout in ("contiguous", "zigzag", "striped"):
        parts = part_positions(53, 4, layout)
        for rule in (masks.Causal(), masks.Window(9, 3), masks.Documents.from_lengths([10, 30, 13])):
            plan = Plan.of(rule, 1, 53, 53, parts, parts)
            pieces = [
                sum(piece.pairs for sender in range(4) for piece in plan.pieces(receiver, sender))
                for receiver in range(4)
            ]
            assert pieces == [plan.pairs(receiver) for receiver in range(4)]
            assert sum(pieces) == rule.intervals(1, 53, 53).visible_pairs()


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_memory_is_linear_in_the_own_part(two_ranks, four_ranks, method):
    """Twice the tokens take twice the memory; twice the tokens on twice the ranks take as much, and what more ranks have under way."""
    once, twice = (max(two_ranks.run("parallel_ranks:peak", length, method)) for length in (2048, 4096))
    spread = max(four_ranks.run("parallel_ranks:peak", 4096, method))
    assert twice < 2.2 * once  # what grows with rows times keys would be four times as much
    assert spread < 1.5 * once  # of what is linear in the whole, it would be twice as much


# Decoding


@pytest.mark.parametrize("ranks", [2, 4])
def test_decoding_from_a_spread_cache(ranks, request, rng):
    world = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks])
    seed = rng.getrandbits(32)
    answers = [loaded(answer) for answer in world.run("parallel_ranks:decoded", seed, ranks)]
    alone = KVCache(3, 2, 64, 16)
    for at, (q, k, v, counts) in enumerate(cache_steps(seed)):
        alone.append(k, v, counts)
        mask = masks.KeyLengths(alone.lengths) & masks.Causal(offset=alone.lengths - q.shape[2])
        for answer in answers:
            for which, (out, lse) in enumerate(answer[0][at]):
                assert check(out, lse, q, alone.keys, alone.values, mask=mask).passed, f"step {at}"
                first = answers[0][0][at][which]
                assert torch.equal(out, first[0]) and torch.equal(lse, first[1]), "all ranks have the same bits"
    held = [torch.tensor(local) for _, local, _ in answers]
    assert sum(held).tolist() == [2, 0, 5] and all(nbytes == alone.nbytes / ranks for _, _, nbytes in answers)


def test_a_spread_cache_under_a_window(two_ranks, rng):
    seed = rng.getrandbits(32)
    parts = [loaded(answer) for answer in two_ranks.run("parallel_ranks:windowed", seed)]
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    assert torch.equal(*parts) and check(parts[0], None, q, k, v, mask=masks.Window(5, 0)).passed
