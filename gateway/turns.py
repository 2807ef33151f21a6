"""Long work on the event loop, in short pieces: what needs the interpreter lock gains nothing from another thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator

PIECE_S = 0.002
"""Seconds after which others have their turn."""


class Turns:
    """One request's long work at a time, in the order in which they came: were it several, the pause of everybody else
    would be a piece of each. What is short waits for nobody."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self, steps: Iterable[object]) -> None:
        """Takes all steps, each short; now and then the loop does between them what has come up meanwhile."""
        left = iter(steps)
        if _piece(left):
            return
        async with self._lock:
            while not _piece(left):  # noqa: ASYNC110  (nothing is waited for)
                await asyncio.sleep(0)


def _piece(steps: Iterator[object]) -> bool:
    """Takes some; whether they were the last."""
    until = time.perf_counter() + PIECE_S
    return all(time.perf_counter() < until for _ in steps)
