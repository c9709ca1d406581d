"""Launches without a GPU: tensors of the CPU stand for those of an H200, kernels are not compiled, and what the driver would be given is written down.

with recorded() as launches:
    attention(q, k, v)      # launches[-1].parameters are what the kernel would get
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

from flashlib import routes
from flashlib.backends import BACKENDS
from flashlib.inference.decode_problem import Problem
from flashlib.launch import counters, hopper, packets, plans
from flashlib.launch.start import Launch, TileMap

H200 = SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)


@dataclass(frozen=True)
class Recorded:
    """One launch, as the driver would be given it."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    image: bytes


class Recorder(list):
    """What ``packets.c`` writes down; ``compiled`` are the kernels that would have been compiled."""

    def __init__(self):
        super().__init__()
        self.compiled: list[str] = []

    def __getitem__(self, index) -> Recorded:
        return Recorded(*super().__getitem__(index))


@contextmanager
def recorded() -> Iterator[Recorder]:
    """A block in which launches by plan are written down."""
    launches = Recorder()

    def compile_code(launch: Launch) -> packets.Code:
        launches.compiled.append(launch.name)
        described = [launch.arguments[name] for name, _ in packets._roles(launch.kernel)]
        maps = tuple((9, 2, 3, x.block) for x in described if isinstance(x, TileMap))
        number = len(launches.compiled)
        return packets.lay_out(None, number, 128, 1024, types(launch), maps, launch)

    with ExitStack() as stack:
        for where, name, replacement in (
            (routes, "on_gpu", lambda x: True),
            (plans, "PLANNED", "cpu"),
            (plans, "_current_device", lambda: None),
            (routes, "_current_device", lambda: -1),
            (plans, "_raw_stream", lambda index: 7),
            (plans, "_capturing", lambda: False),
            (counters, "_capturing", lambda: False),
            (packets, "compile_code", compile_code),
            (packets, "_codes", {}),
            (plans, "_recipes", {}),
            (plans, "_kept", plans._Kept()),
            (routes, "_routes", {}),
            (routes, "_relatives", {}),
            (hopper, "GPU", "cpu"),
            (BACKENDS["triton"], "missing", lambda: None),
            (BACKENDS["triton"], "unsupported", lambda spec, config: None),
            (Problem, "triton_why_not", lambda problem: None),
        ):
            stack.enter_context(mock.patch.object(where, name, replacement))
        plans.plans_are_possible.cache_clear()
        packets.library().record(launches)
        try:
            yield launches
        finally:
            packets.library().record(None)
            plans.plans_are_possible.cache_clear()


def types(launch: Launch) -> dict[str, str]:
    """The signature that Triton would arrive at for such arguments."""
    found = {}
    for name, role in packets._roles(launch.kernel):
        x = launch.arguments[name]
        if role == packets.CONSTANT or x is None or (x == 1 and type(x) is int and role == packets.SPECIALIZED):
            found[name] = "constexpr"
        elif isinstance(x, TileMap):
            found[name] = f"tensordesc<bf16{list(x.block)}>"
        elif type(x) is int:
            found[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
        else:
            found[name] = "fp32" if type(x) is float else "*bf16"
    return found
