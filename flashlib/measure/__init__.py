"""Measuring, and keeping what was measured: timing, memory, machines, and recorded results with where they came from."""

from flashlib.measure.machine import MemoryLevel, cpu_memory, matmul_flops_per_s, stream_bytes_per_s
from flashlib.measure.memory import memory_wall
from flashlib.measure.meter import TrafficMeter
from flashlib.measure.record import Record, load_record, save_record, sources_hash
from flashlib.measure.steps import naive_steps
from flashlib.measure.timing import Timing, time_call

__all__ = [
    "MemoryLevel",
    "Record",
    "Timing",
    "TrafficMeter",
    "cpu_memory",
    "load_record",
    "matmul_flops_per_s",
    "memory_wall",
    "naive_steps",
    "save_record",
    "sources_hash",
    "stream_bytes_per_s",
    "time_call",
]
