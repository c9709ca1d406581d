"""The traffic meter, under the course's name for it; it lives in :mod:`flashlib.measure.meter`."""

from flashlib.measure.meter import ELSEWHERE, MADE_INSIDE, MadeTensor, TrafficMeter

__all__ = ["ELSEWHERE", "MADE_INSIDE", "MadeTensor", "TrafficMeter"]
