"""Analysis of what experts learned: routing is recorded while a model runs, measured, and shown on one page."""

from .alarms import Alarm, Thresholds
from .recorder import Recorder, TopSample, record
from .sides import SideEffect, SideEffects, what_sides_add

__all__ = ["Alarm", "Recorder", "SideEffect", "SideEffects", "Thresholds", "TopSample", "record", "what_sides_add"]
