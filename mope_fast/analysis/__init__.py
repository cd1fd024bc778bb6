"""What the experts learned: routing recorded while a model runs, measured, and shown on one page."""

from .alarms import Alarm, Thresholds
from .recorder import Recorder, TopSample, record

__all__ = ["Alarm", "Recorder", "Thresholds", "TopSample", "record"]
