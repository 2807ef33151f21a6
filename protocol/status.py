"""What a process tells the one that started it, as JSON lines on an inherited pipe."""

from __future__ import annotations

import json
import os
import select
from typing import Any


class StatusPipe:
    """Writes `{"event": …}` lines to a file descriptor; without one, or once the reader is gone, it says nothing."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def ready(self, **details: Any) -> None:
        """The process does its work from here on."""
        self._write({"event": "ready", **details})

    def progress(self, stage: str, done: float) -> None:
        """`done` runs from 0 to 1 within a stage."""
        self._write({"event": "progress", "stage": stage, "done": done})

    def alive(self, **details: Any) -> None:
        """The main loop turns; to be called from it. Left out if the reader does not read: that must not block it."""
        if self._descriptor is None:
            return
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        if poll.poll(0):
            self._write({"event": "alive", **details})

    def drained(self) -> None:
        """The process is about to end, and is not to come back."""
        self._write({"event": "drained"})

    def error(self, message: str) -> None:
        """The process is about to end because of this."""
        self._write({"event": "error", "message": message})

    def _write(self, line: dict[str, Any]) -> None:
        if self._descriptor is None:
            return
        try:
            os.write(self._descriptor, json.dumps(line).encode() + b"\n")
        except OSError:
            self._descriptor = None
