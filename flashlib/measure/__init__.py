"""Measuring, and keeping what was measured: timing, memory, machines, and recorded results with where they came from.

Everything is imported on first use: a table or a record can be shown without PyTorch.
"""

from importlib import import_module

_HOME = {
    "AttentionProfiler": "racing.profiler",
    "MemoryLevel": "racing.machine",
    "Record": "records.record",
    "Timing": "racing.timing",
    "TrafficMeter": "counting.meter",
    "autoselect": "racing.choosing",
    "cpu_memory": "racing.machine",
    "load_record": "records.record",
    "matmul_flops_per_s": "racing.machine",
    "memory_wall": "racing.memory",
    "naive_steps": "racing.steps",
    "profile": "racing.profiler",
    "save_record": "records.record",
    "sources_hash": "records.record",
    "stream_bytes_per_s": "racing.machine",
    "time_call": "racing.timing",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
