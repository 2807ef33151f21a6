"""Which requests must have ended by when."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from .requests import Request


class Deadlines:
    """Requests by deadline, the next one first. Those that have ended are dropped when they come up, or all at once
    when they are the most."""

    def __init__(self, is_open: Callable[[Request], bool]) -> None:
        self._is_open = is_open
        self._heap: list[tuple[float, int, Request]] = []
        self._compact_at = 64

    def add(self, deadline: float, request: Request) -> None:
        heapq.heappush(self._heap, (deadline, request.number, request))
        if len(self._heap) >= self._compact_at:
            self._heap = [entry for entry in self._heap if self._is_open(entry[2])]
            heapq.heapify(self._heap)
            self._compact_at = 64 + 2 * len(self._heap)

    def next(self) -> float | None:
        """The first deadline of an open request, in the clock of `add`."""
        while self._heap and not self._is_open(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> list[Request]:
        """Takes out the open requests whose deadline is `now` or earlier, in their order."""
        late = []
        while (first := self.next()) is not None and first <= now:
            late.append(heapq.heappop(self._heap)[2])
        return late
