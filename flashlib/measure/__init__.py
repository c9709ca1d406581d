"""Measuring, and keeping what was measured: timing, memory, and recorded results with where they came from."""

from flashlib.measure.memory import memory_wall
from flashlib.measure.record import Record, load_record, save_record, sources_hash
from flashlib.measure.timing import Timing, time_call

__all__ = ["Record", "Timing", "load_record", "memory_wall", "save_record", "sources_hash", "time_call"]
