"""What a service tells of itself: the types of `Client.stats()`."""

from ..protocol.messages import Histogram as Histogram
from ..protocol.messages import Stats as Stats
from ..protocol.messages import WorkerStats as WorkerStats

__all__ = ["Histogram", "Stats", "WorkerStats"]
