"""Requests that wait for a place on a worker, first come first served."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .requests import Request


class WaitingQueue:
    """Ordered by request number, so that a preempted request comes before everything that arrived after it."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Request]] = []
        self._waiting: dict[int, Request] = {}
        self.tokens = 0
        """Known tokens of all waiting requests together."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting.values())

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.number, request))
        self._waiting[request.number] = request
        self.tokens += len(request.known)

    def head(self) -> Request | None:
        """The request whose turn it is; it stays in the queue."""
        while self._heap:
            number, request = self._heap[0]
            if self._waiting.get(number) is request:
                return request
            heapq.heappop(self._heap)
        return None

    def remove(self, request: Request) -> bool:
        """Takes a request out, wherever it stands; False if it was not waiting."""
        if self._waiting.get(request.number) is not request:
            return False
        del self._waiting[request.number]
        self.tokens -= len(request.known)
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = [(waiting.number, waiting) for waiting in self._waiting.values()]
            heapq.heapify(self._heap)
        return True
