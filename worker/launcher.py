"""Starts steps in order without ever making the host thread wait.

A step with grammar rows cannot be queued whole before the CPU has filled their masks, unless the device waits for them
by itself, and a step behind it not before that one. Such steps are started by a thread of their own; all others by the
host thread itself, as soon as that thread has nothing left.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Launcher:
    """For one calling thread."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        """`on_failure` is called on the launcher's thread with what a start raised there; nothing is started after."""
        self._on_failure = on_failure
        self._starts: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._behind = 0
        """Starts that the thread has not finished."""
        self._thread: threading.Thread | None = None

    def launch(self, start: Callable[[], None], *, waits: bool) -> None:
        """Calls `start` once everything before it has been started; on another thread if that or `start` itself
        (`waits`) takes waiting. Raises what `start` raises here."""
        with self._lock:
            at_once = not waits and not self._behind
            if not at_once:
                self._behind += 1
        if at_once:
            start()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="launches", daemon=True)
            self._thread.start()
        self._starts.put(start)

    def close(self, timeout_s: float) -> None:
        """Ends the thread, or leaves it behind after `timeout_s`."""
        if self._thread is not None:
            self._starts.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (start := self._starts.get()) is not None:
                start()
                with self._lock:
                    self._behind -= 1
        except BaseException as error:  # noqa: BLE001 - told by the pipeline, which is good for nothing more
            self._on_failure(error)
