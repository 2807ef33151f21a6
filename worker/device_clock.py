"""Events of a CUDA device on the host's clock, for the trace."""

from __future__ import annotations

import time
from typing import Final

import torch

RENEW_NS: Final = 500_000_000
"""The two clocks drift apart by some microseconds a second, and times between distant events are coarse."""
STALE_NS: Final = 10 * RENEW_NS
TRIES: Final = 5


class DeviceClock:
    """For one thread. An event on a stream of its own is passed at once, whatever the others do; when that was, the
    host knows to half the time that recording it and waiting for it took. Times are counted from such an event, and
    not from the newest: steps that are placed began before that one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._newest = self._look()
        self._anchor, self._anchor_ns = self._newest

    def place(self, event: torch.cuda.Event) -> int:
        """When an event that has been passed was, in ns of CLOCK_MONOTONIC."""
        return self._anchor_ns + int(self._anchor.elapsed_time(event) * 1e6)

    def renew(self) -> None:
        """To be called between the events of two steps."""
        age = time.monotonic_ns() - self._newest[1]
        if age > RENEW_NS:
            former, self._newest = self._newest, self._look()
            self._anchor, self._anchor_ns = former if age < STALE_NS else self._newest

    def _look(self) -> tuple[torch.cuda.Event, int]:
        """An event, and when it was passed: the surest of a few."""
        found = []
        for _ in range(TRIES):
            event = torch.cuda.Event(enable_timing=True)
            before = time.monotonic_ns()
            event.record(self._stream)
            event.synchronize()
            after = time.monotonic_ns()
            found.append((after - before, (before + after) // 2, event))
        _, at, event = min(found, key=lambda one: one[0])
        return event, at
