"""What a process says of itself: JSON lines on a pipe that it inherits (`--status-fd`).

{"event": "progress", "stage": "load weights", "done": 0.4}
{"event": "ready", …}
{"event": "alive", "workers": [4711, 4712]}
{"event": "drained"}
{"event": "error", "message": "…"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_LINE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Progress:
    """`stage` is under way; `done` is its finished share, 0 to 1, or None where that is unknown."""

    stage: str
    done: float | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The process serves. `details` is whatever else it said."""

    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alive:
    """The process' main loop turns. `workers`: the scheduler's word on which worker processes are registered with it;
    None from others."""

    workers: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Drained:
    """The process ends because it was asked to leave the service for good."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The process ends because of this, which is meant for the user to read."""

    message: str


Status = Progress | Ready | Alive | Drained | Failed


class StatusLines:
    """Cuts a byte stream into statuses. Lines that are none, or longer than MAX_LINE_BYTES, are passed over: the
    status pipe informs, and must never end a process that works."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Status]:
        """The statuses that `data` completes, in order."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest = b""
        for line in lines:
            status = parse(line)
            if status is not None:
                yield status


def parse(line: bytes) -> Status | None:
    """One line's status; None if it is none."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    if not isinstance(said, dict):
        return None
    event = said.pop("event", None)
    if event == "ready":
        return Ready(said)
    if event == "alive":
        workers = said.get("workers")
        return Alive(frozenset(pid for pid in workers if type(pid) is int) if isinstance(workers, list) else None)
    if event == "drained":
        return Drained()
    if event == "error":
        return Failed(str(said.get("message", "")))
    if event == "progress":
        done = said.get("done")
        if isinstance(done, bool) or not isinstance(done, int | float):
            done = None
        return Progress(str(said.get("stage", "")), None if done is None else min(1.0, max(0.0, float(done))))
    return None
