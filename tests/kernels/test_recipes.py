"""Recipes: what code makes of numbers, written down from one run of it; and launches planned by them. No GPU and no compilation."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from kernels.recorded_launches import recorded
from kernels.test_plans import CLASSES, attend, python_calls, tensors, what_is_built

from flashlib import attention, routes
from flashlib.inference import decode_attention
from flashlib.launch import packets, plans
from flashlib.launch.recipes import computed, plain, record, recording, settled
from flashlib.masks import Causal, KeyLengths, Varlen, Window

CALLS_OF_OTHER_LENGTHS = 120  # of Python functions; up to 82 when this was written, and some 700 without recipes
needs_plans = pytest.mark.skipif(packets.why_missing() is not None, reason=f"no plans here: {packets.why_missing()}")


def arithmetic(numbers):
    a, b, c = numbers
    blocks = -(-a // b)
    return (blocks * 3 + c % 5, [max(a, b), (c - 1, 2 * c)], c / 4 if c > 10 else 0, a == b, "text", None, 1.5 * c)


def test_a_recipe_computes_what_the_code_would():
    rng = random.Random(random.SystemRandom().getrandbits(40))
    drawn = [tuple(rng.randint(1, 40) for _ in range(3)) for _ in range(200)]
    recipes, answered = [record(arithmetic, numbers) for numbers in drawn[:20]], 0
    for numbers in drawn:
        for recipe in recipes:
            came = recipe(*numbers)
            if came is not None:
                assert came == arithmetic(numbers)
                answered += 1
    assert answered > len(drawn)


def test_a_recipe_is_good_for_what_answers_alike():
    recipe = record(lambda n: "few" if n[0] < 10 else n[0] * 2, [12])
    assert recipe(30) == 60 and recipe(9) is None
    assert record(lambda n: plain(n[0]) + n[1], [3, 4])(3, 9) == 12
    assert record(lambda n: plain(n[0]) + n[1], [3, 4])(4, 9) is None
    by_size = record(lambda n: settled(math.gcd, n[0], 12), [18])
    assert by_size(6) == 6 and by_size(4) is None


def test_functions_are_called_again():
    recipe = record(lambda n: computed(divmod, n[0], 7), [20])
    assert recipe(30) == (4, 2)
    assert computed(divmod, 20, 7) == settled(divmod, 20, 7) == (2, 6)
    assert not recording()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda n: [0, 1, 2][n[0]],
        lambda n: range(n[0]),
        lambda n: {n[0]: 1},
        lambda n: math.gcd(n[0], 4),
        lambda n: int(n[0]),
        lambda n: slice(0, n[0]).indices(5),
        lambda n: n[0] << 1,
        lambda n: [0] * n[0],
    ],
)
def test_code_that_needs_the_number_itself_is_not_written_down(misuse):
    with pytest.raises(TypeError):
        record(misuse, [1])
    assert not recording()


@contextmanager
def noting_packets(noted: list):
    """Notes of each packet that is started what it is made from, which is the kernel and numbers."""
    make, start, made = packets._packed, plans.Plan.start_on, {}

    def note_made(code, grid, maps, values, slots):
        packet = make(code, grid, maps, values, slots)
        made[id(packet)] = packet, (code.function, tuple(grid), [*maps], [*values], tuple(slots))
        return packet

    def note_started(plan, *arguments):
        noted.extend(made[id(packet)][1] for packet in plan.packets)
        return start(plan, *arguments)

    with mock.patch.object(packets, "_packed", note_made), mock.patch.object(plans.Plan, "start_on", note_started):
        yield


def draw(rng: random.Random) -> tuple[dict, dict]:
    """A problem, and the options of its call."""
    kv_heads, length = rng.choice((1, 2, 4)), rng.choice((1, 2, 16, rng.randint(3, 600), 128 * rng.randint(1, 8)))
    shape = {
        "batch": rng.choice((1, 2, 3)),
        "heads": (kv_heads * rng.choice((1, 2, 4)), kv_heads),
        "lengths": (length, rng.choice((length, length, rng.randint(1, 3000)))),
        "dim": rng.choice((32, 64, 64, 128, 256)),
        "rows_first": rng.random() < 0.4,
        "grad": rng.random() < 0.5,
    }
    q_len, kv_len = shape["lengths"]
    mask = rng.choice(("none", "causal", "window", "lengths", "packed", "slopes", "softcap", "lengths in a window"))
    options: dict = {"return_lse": rng.random() < 0.3}
    if mask == "causal":
        options["causal"] = True
    elif mask == "window":
        options["mask"] = Window(rng.randint(0, 200), rng.randint(0, 9))
    elif mask.startswith("lengths"):
        options["mask"] = KeyLengths(torch.full((shape["batch"],), rng.randint(0, kv_len)))
        if mask != "lengths":
            options["mask"] &= Window(rng.randint(0, 99), None)
    elif mask == "packed":
        ends = (torch.tensor([0, rng.randint(0, length), length], dtype=torch.int32) for length in (q_len, kv_len))
        options["mask"] = (packed := Varlen(*ends)) & Causal(packed)
    elif mask == "slopes":
        options["alibi_slopes"] = torch.rand(shape["heads"][0])
    elif mask == "softcap":
        options |= {"softcap": rng.uniform(5, 50), "scale": rng.uniform(0.05, 0.2)}
    return shape, options


def run(shape: dict, options: dict) -> None:
    (q_heads, kv_heads), (q_len, kv_len) = shape["heads"], shape["lengths"]

    def zeros(heads, length):
        if shape["rows_first"]:
            x = torch.zeros(shape["batch"], length, heads, shape["dim"], dtype=torch.bfloat16).transpose(1, 2)
        else:
            x = torch.zeros(shape["batch"], heads, length, shape["dim"], dtype=torch.bfloat16)
        return x.requires_grad_(shape["grad"])

    q, k, v = zeros(q_heads, q_len), zeros(kv_heads, kv_len), zeros(kv_heads, kv_len)
    result = attention(q, k, v, **options, backend="triton")
    if shape["grad"]:
        out = result[0] if options["return_lse"] else result
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    with torch.no_grad():
        decode_attention(q[:, :, :1], k, v, backend="triton")


@needs_plans
def test_launches_by_recipe_are_those_made_anew():
    rng = random.Random(random.SystemRandom().getrandbits(40))
    problems = [draw(rng) for _ in range(90)]
    launched, found, by_recipe = [], plans._by_recipe, []

    def counted(*arguments):
        by_recipe.append(found(*arguments))
        return by_recipe[-1]

    for finds in (counted, lambda *arguments: None):
        noted: list = []
        with recorded() as launches, noting_packets(noted), mock.patch.object(plans, "_by_recipe", finds):
            per_problem = []
            for problem in problems:
                run(*problem)
                assert len(noted) == len(launches)
                per_problem.append(noted[:])
                noted.clear()
                launches.clear()
            assert None not in plans._recipes.values(), "some kind of problem cannot be written down"
        launched.append(per_problem)
    for problem, ours, anew in zip(problems, *launched, strict=True):
        assert ours == anew and ours, problem
    assert sum(plan is not None for plan in by_recipe) > len(problems) // 4


@needs_plans
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("grad", [False, True])
def test_other_lengths_build_nothing_but_packets(name, grad):
    options, built = CLASSES[name], []

    def step(length: int) -> None:
        inputs = tensors(length, grad=grad)
        result = attend(*inputs, **options)
        out = result[0] if "return_lse" in options else result
        if grad:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    with recorded() as launches:
        for length in (256, 512):  # the first of its kind, and the one from which the recipe is written
            step(length)
        compiled = len(launches.compiled)
        patches = what_is_built(built)
        for patch in patches:
            patch.start()
        try:
            for length in (640, 768):
                step(length)
        finally:
            for patch in patches:
                patch.stop()
        assert not built and len(launches.compiled) == compiled
        inputs = tensors(896)
        if not grad:
            assert python_calls(lambda: attend(*inputs, **options)) <= CALLS_OF_OTHER_LENGTHS


@needs_plans
def test_relatives_are_checked_where_lengths_matter():
    q, k, v = tensors(256)
    with recorded():
        for length in (256, 512, 640):
            attend(*tensors(length))
        with pytest.raises(ValueError, match="same heads and length"):
            attend(q, k, v[:, :, :200])
        with pytest.raises(ValueError, match="batch"):
            attend(q, k[:0], v[:0])
        assert attend(q[:, :, :0], k, v).shape == (1, 8, 0, 64)
        assert not attend(q, k[:, :, :0], v[:, :, :0]).any()
        by_row = torch.rand(1, 8, 256)
        attend(q, k, v, alibi_slopes=by_row)
        with pytest.raises(ValueError, match="alibi_slopes has shape"):
            attend(*tensors(512), alibi_slopes=by_row)
        offsets = torch.zeros(1, 256, dtype=torch.int64)
        attend(q, k, v, mask=Window(4, 0, offsets))
        with pytest.raises(ValueError, match="256"):
            attend(*tensors(512), mask=Window(4, 0, offsets))
        kinds = len(routes._relatives)
        odd = [x[..., :63] for x in tensors(300)]
        attend(*odd)
        assert len(routes._relatives) == kinds
