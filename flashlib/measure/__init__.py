"""Measuring, and keeping what was measured: timing, memory, machines, and recorded results with where they came from.

Everything is imported on first use: a table or a record can be shown without PyTorch.
"""

from importlib import import_module

_HOME = {
    "AttentionProfiler": "profiler",
    "MemoryLevel": "machine",
    "Record": "record",
    "Timing": "timing",
    "TrafficMeter": "meter",
    "autoselect": "choosing",
    "cpu_memory": "machine",
    "load_record": "record",
    "matmul_flops_per_s": "machine",
    "memory_wall": "memory",
    "naive_steps": "steps",
    "profile": "profiler",
    "save_record": "record",
    "sources_hash": "record",
    "stream_bytes_per_s": "machine",
    "time_call": "timing",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
