"""Kernels with known traffic and known faults, under KernelWatch. For run_interpreted.py."""

import random
import warnings

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import InterpreterError

from flashlib.measure.counting.kernel_watch import (
    KernelFault,
    KernelWatch,
    OutOfBoundsLoad,
    OutOfBoundsStore,
    Race,
    faults_raised,
)


@triton.jit
def copy(p_x, p_out, first, n, shift, BLOCK: tl.constexpr):
    o = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o + shift, tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.jit
def copy_grid(p_x, p_out, BLOCK: tl.constexpr):
    i = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    o = i * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o))


@triton.jit
def write(p_out, p_values, place):
    tl.store(p_out + place, tl.load(p_values + tl.program_id(0)))


@triton.jit
def write_by_atomics(p_out, p_values, place):
    tl.atomic_max(p_out + place, tl.load(p_values + tl.program_id(0)))


@triton.jit
def read_then_write(p_x, n):
    """Each program moves its neighbor's element to its own place."""
    i = tl.program_id(0)
    tl.store(p_x + i, tl.load(p_x + (i + 1) % n))


@triton.jit
def last_one_sums(p_x, p_parts, p_count, p_out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    tl.store(p_parts + i, tl.load(p_x + i))
    if tl.atomic_add(p_count, 1) == n - 1:
        o = tl.arange(0, BLOCK)
        tl.store(p_out, tl.sum(tl.load(p_parts + o, mask=o < n, other=0.0)))


@triton.jit
def invalid(p_x):
    x = tl.load(p_x)
    tl.store(p_x, x - x)


def fault(kernel, grid, *args, **kwargs) -> KernelFault | None:
    try:
        with KernelWatch(), faults_raised():
            kernel[grid](*args, **kwargs)
    except KernelFault as found:
        return found
    return None


def traffic_is_counted(rng: random.Random) -> None:
    n, block = rng.randint(1, 300), rng.choice([1, 16, 64])
    for dtype in (torch.float16, torch.float32, torch.int64):
        x = torch.randn(n).to(dtype)
        out = torch.empty_like(x)
        programs = triton.cdiv(n, block)
        with KernelWatch(x=x) as outer, KernelWatch(x=x, out=out) as watch:
            copy[(programs,)](x, out, 0, n, 0, BLOCK=block)
            copy[(programs,)](x, out, 0, n, 0, BLOCK=block)
        assert torch.equal(x, out)
        assert watch.bytes_read == {"x": 2 * x.nbytes} and watch.bytes_written == {"out": 2 * x.nbytes}
        assert outer.bytes_read == {"x": 2 * x.nbytes} and outer.bytes_written == {"elsewhere": 2 * x.nbytes}
        assert (watch.launches, watch.programs, watch.largest_block) == ({"copy": 2}, 2 * programs, block)
        assert watch.times_read == {"x": 2.0, "out": 0.0}
        assert f"copy x 2; programs: {2 * programs}" in str(watch.report())


def bounds_are_those_of_the_allocation(rng: random.Random) -> None:
    n = rng.randint(10, 50)
    x, out = torch.randn(n), torch.zeros(n)
    before = fault(copy, (1,), x, out, -1, n, 0, BLOCK=8)
    assert type(before) is OutOfBoundsLoad and "1 element before the start of p_x" in str(before)
    after = fault(copy, (8,), x, out, 0, n + 3, 0, BLOCK=8)
    assert type(after) is OutOfBoundsLoad and "1 element past the end of p_x" in str(after)
    stored = fault(copy, (8,), x, out, 0, n, 2, BLOCK=8)
    assert type(stored) is OutOfBoundsStore and "past the end of p_out" in str(stored)
    whole = torch.randn(n + 5)
    assert fault(copy, (8,), whole[:n], torch.zeros(n + 5), 0, n + 5, 0, BLOCK=8) is None
    assert fault(copy, (8,), torch.randn(0), out, 0, 1, 0, BLOCK=8) is not None
    assert fault(copy, (8,), torch.randn(0), out, 0, 0, 0, BLOCK=8) is None


def races_are_found_whatever_the_result(rng: random.Random) -> None:
    n = rng.randint(3, 20)
    values = torch.arange(float(n))
    met = fault(write, (n,), torch.zeros(3), values, 1)
    assert type(met) is Race and "program (1, 0, 0) stores where program (0, 0, 0) has stored" in str(met)
    # All store the same number, which was there before.
    same = fault(write, (n,), torch.full((3,), 7.0), torch.full((n,), 7.0), 1)
    assert type(same) is Race and "stores where program (0, 0, 0) has stored" in str(same)
    kept = fault(read_then_write, (n,), torch.full((n,), 7.0), n)  # all store what the others have loaded
    assert type(kept) is Race and "has loaded, in p_x" in str(kept)
    largest = torch.zeros(3)
    assert fault(write_by_atomics, (n,), largest, torch.full((n,), 7.0), 1) is None  # it says that they meet
    assert largest.tolist() == [0.0, 7.0, 0.0]
    moved = fault(read_then_write, (n,), values.clone(), n)
    assert type(moved) is Race and "has loaded, in p_x" in str(moved)
    assert fault(copy, (n,), values, values, 0, n, 0, BLOCK=1) is None  # in place, each its own
    out = torch.zeros(1)
    assert (
        fault(last_one_sums, (n,), values, torch.zeros(n), torch.zeros(1, dtype=torch.int32), out, n, BLOCK=32) is None
    )
    assert out == values.sum()


def programs_are_told_apart_in_three_dimensions() -> None:
    x, out = torch.randn(2 * 3 * 4 * 8), torch.zeros(2 * 3 * 4 * 8)
    with KernelWatch() as watch:
        copy_grid[(2, 3, 4)](x, out, BLOCK=8)
    assert watch.programs == 24 and torch.equal(x, out)
    met = fault(write, (1, 2, 2), torch.zeros(1), torch.randn(1), 0)
    assert type(met) is Race and "program (0, 0, 1) stores where program (0, 0, 0) has stored" in str(met)
    overlapping = fault(copy, (2, 1, 3), x, out, 0, 16, 0, BLOCK=8)
    assert type(overlapping) is Race and "program (0, 0, 1) stores where program (0, 0, 0) has stored" in str(
        overlapping
    )


def nothing_is_left_behind() -> None:
    x = torch.full((1,), torch.inf)

    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counting.seen += 1
            return func(*args, **(kwargs or {}))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Counting(), KernelWatch():
            invalid[(1,)](x)
    assert x.isnan() and Counting.seen == 0
    out = torch.zeros(4)
    copy[(1,)](torch.ones(8), torch.zeros(8)[:4], 0, 8, 0, BLOCK=8)  # unwatched: nothing is checked any more
    try:
        with KernelWatch():
            copy[(1,)](torch.ones(8), out, 0, 8, 0, BLOCK=8)
    except InterpreterError as error:
        assert isinstance(error.__cause__, OutOfBoundsStore)
    else:
        raise AssertionError("a store outside of the tensor was not noticed")
    try:
        with faults_raised():
            raise ValueError("not a fault")
    except ValueError as error:
        assert str(error) == "not a fault"
    try:
        with KernelWatch():
            copy[(1,)](out)
    except TypeError as error:
        assert "missing" in str(error)


@triton.jit
def load_apart(p_x, p_out, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o * stride))


def sectors_are_counted() -> None:
    """32 bytes each: lanes side by side share them, lanes that lie apart do not, and each load counts by itself."""
    for itemsize, dtype in ((4, torch.float32), (2, torch.float16)):
        per_sector = 32 // itemsize
        for stride, sectors in ((1, 64 // per_sector), (2, 64 * 2 // per_sector), (per_sector, 64), (100, 64)):
            x, out = torch.zeros(64 * 100, dtype=dtype), torch.zeros(64, dtype=dtype)
            assert x.data_ptr() % 32 == 0
            with KernelWatch(x=x, out=out) as watch:
                load_apart[(1,)](x, out, stride, BLOCK=64)
            assert watch.sectors_read["x"] == sectors, (itemsize, stride, watch.sectors_read)
            assert watch.sectors_written["out"] == 64 // per_sector and not watch.sectors_written["x"]
    with KernelWatch(x=x) as watch:
        load_apart[(1,)](x, out, 0, BLOCK=64)
    assert watch.sectors_read["x"] == 1, "64 lanes at one address"


def main(rng: random.Random) -> None:
    traffic_is_counted(rng)
    sectors_are_counted()
    bounds_are_those_of_the_allocation(rng)
    races_are_found_whatever_the_result(rng)
    programs_are_told_apart_in_three_dimensions()
    nothing_is_left_behind()
