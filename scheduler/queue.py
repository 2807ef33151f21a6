"""Requests that wait for a place on a worker."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

from .requests import Request

_Entry: TypeAlias = tuple[bool, float, int, Request]

MOST_STALE = 64
"""So many entries of requests that wait no more may stand in the line, or as many as there are others."""


class WaitingQueue:
    """First come, first served within a class; a class is worth `aging_s` seconds of waiting.

    The order is that of arrival time + priority · aging_s, which never changes. So a request of priority p goes before
    everything of class 0 that arrived over p · aging_s after it, and none starves. A preempted request keeps its place.
    Requests that go first, because their worker is gone or because another life of the scheduler had begun them, go
    before all that do not.
    """

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._line: list[_Entry] = []
        """In order, from `_first` on. As a rule a request joins at the end and leaves at the beginning."""
        self._first = 0
        self.by_number: dict[int, _Entry] = {}
        """All that wait, by request number. Entries of the line that are not here are dropped when they come up."""
        self.tokens = 0
        """Known tokens of all waiting requests together."""

    def __len__(self) -> int:
        return len(self.by_number)

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in self.by_number.values())

    def push(self, request: Request) -> None:
        rank = request.submitted_at + request.priority * self._aging_s
        entry = (not request.goes_first, rank, request.number, request)
        line = self._line
        if not line or line[-1] < entry:
            line.append(entry)
        else:
            insort(line, entry, self._first)
        self.by_number[request.number] = entry
        self.tokens += request.length

    def head(self) -> Request | None:
        """The request whose turn is next; it stays in the queue."""
        line, by_number = self._line, self.by_number
        while self._first < len(line):
            entry = line[self._first]
            if by_number.get(entry[2]) is entry:
                return entry[3]
            self._first += 1
        return None

    def in_turn(self, most: int) -> Iterator[Request]:
        """The requests whose turn is next, `most` of them, in order. They stay in the queue; the one that was yielded
        last may be removed, and then the iterator must be given up."""
        line = self._line  # by index: to iterate over it would begin with all that have left it
        waiting = (line[at][3] for at in range(self._first, len(line)) if self._waits(line[at]))
        return islice(waiting, most)

    def _waits(self, entry: _Entry) -> bool:
        return self.by_number.get(entry[2]) is entry

    def remove(self, request: Request) -> bool:
        """Takes a request out, wherever it stands; False if it was not waiting."""
        entry = self.by_number.pop(request.number, None)
        if entry is None:
            return False
        self.tokens -= request.length
        if self._line[self._first] is entry:
            self._first += 1
        if len(self._line) > 2 * len(self.by_number) + MOST_STALE or not self.by_number:
            self._line, self._first = sorted(self.by_number.values()), 0
        return True
