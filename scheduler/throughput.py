"""How fast requests end, to tell a refused client when to come again."""

from __future__ import annotations

SHORTEST_S, LONGEST_S = 0.1, 60.0


class EndingRate:
    """An exponential average of the time between two endings."""

    WEIGHT = 0.1

    def __init__(self) -> None:
        self._interval_s = 1.0
        self._last: float | None = None

    def ended(self, now: float, times: int = 1) -> None:
        """So many have ended, one at least, at the same time."""
        if self._last is not None:
            self._interval_s += self.WEIGHT * (now - self._last - self._interval_s)
        self._interval_s *= (1.0 - self.WEIGHT) ** (times - 1)  # between them there is no time
        self._last = now

    def retry_after(self, now: float) -> float:
        """Seconds until the next request is likely to have ended, between SHORTEST_S and LONGEST_S."""
        since = 0.0 if self._last is None else now - self._last
        return min(LONGEST_S, max(SHORTEST_S, self._interval_s, since))
