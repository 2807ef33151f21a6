"""Requests that wait for a place on a worker."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator
from typing import TypeAlias

from .requests import Request

_Entry: TypeAlias = tuple[bool, float, int, Request]


class WaitingQueue:
    """First come, first served within a class; a class is worth `aging_s` seconds of waiting.

    The order is that of arrival time + priority · aging_s, which never changes. So a request of priority p goes before
    everything of class 0 that arrived over p · aging_s after it, and none starves. A preempted request keeps its place.
    Requests that go first, because their worker is gone or because another life of the scheduler had begun them, go
    before all that do not.
    """

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._heap: list[_Entry] = []
        self.by_number: dict[int, _Entry] = {}
        """All that wait, by request number. Entries of the heap that are not here are dropped when they come up."""
        self.tokens = 0
        """Known tokens of all waiting requests together."""

    def __len__(self) -> int:
        return len(self.by_number)

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in self.by_number.values())

    def push(self, request: Request) -> None:
        rank = request.submitted_at + request.priority * self._aging_s
        entry = (not request.goes_first, rank, request.number, request)
        heapq.heappush(self._heap, entry)
        self.by_number[request.number] = entry
        self.tokens += request.length

    def head(self) -> Request | None:
        """The request whose turn is next; it stays in the queue."""
        while self._heap:
            entry = self._heap[0]
            if self.by_number.get(entry[2]) is entry:
                return entry[3]
            heapq.heappop(self._heap)
        return None

    def in_turn(self, most: int) -> Generator[Request]:
        """The requests whose turn is next, `most` of them, in order. They stay in the queue; the one that was yielded
        last may be removed, and then the iterator must be given up."""
        heap = self._heap
        found: list[_Entry] = []
        try:
            while heap and len(found) < most:
                entry = heapq.heappop(heap)
                if self.by_number.get(entry[2]) is entry:
                    found.append(entry)
                    yield entry[3]
        finally:
            if heap is self._heap:  # else `remove` has made a new one of all that wait
                for entry in found:
                    if self.by_number.get(entry[2]) is entry:
                        heapq.heappush(heap, entry)

    def remove(self, request: Request) -> bool:
        """Takes a request out, wherever it stands; False if it was not waiting."""
        entry = self.by_number.pop(request.number, None)
        if entry is None:
            return False
        self.tokens -= request.length
        heap = self._heap
        if heap and heap[0] is entry:
            heapq.heappop(heap)
        elif len(heap) > 2 * len(self.by_number) + 64:
            self._heap = list(self.by_number.values())
            heapq.heapify(self._heap)
        return True
