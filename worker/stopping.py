"""Being asked to end: SIGTERM and SIGINT, at any moment of a worker's life. Imports nothing heavy, so that it can be
set up first."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT)
LAST_RESORT_S = 4.0
"""A process that was asked to end and has not ended by then is ended as it stands: a device that hangs, or a download
that no exception reaches, must not outlast whoever waits for the end."""


class Stop:
    """In the inbox: the process was asked to end."""


class StopSignals:
    """Takes SIGTERM and SIGINT over for the rest of the process's life. Made in the main thread, once.

    Before `tell`, a signal calls `leave`, which does not return normally; after it, a Stop is put into the inbox. In
    any case the process ends with exit code 0 within LAST_RESORT_S, even if the main thread never runs Python again.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self.asked = False
        """A signal has come."""
        self._leave = leave
        self._inbox: queue.SimpleQueue[Any] | None = None
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writer, False)
        # Started here and not by the handler, which may interrupt the main thread while it holds threading's own lock.
        threading.Thread(target=self._end_in_time, args=(reader,), name="last-resort", daemon=True).start()
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, self._on_signal)

    def tell(self, inbox: queue.SimpleQueue[Any]) -> None:
        """From now on signals become a Stop in `inbox`, as does one that has come already."""
        self._inbox = inbox
        if self.asked:
            inbox.put(Stop())

    def _on_signal(self, *_: object) -> None:
        self.asked = True
        if self._inbox is not None:
            self._inbox.put(Stop())  # SimpleQueue.put may be interrupted by itself
        else:
            self._leave()

    def _end_in_time(self, reader: int) -> None:
        """Hears of each signal through the pipe, which the C handler writes.

        Python's own handler runs only between two bytecodes of the main thread, which may not even wake up: of several
        signals at once the kernel gives some to other threads.
        """
        while numbers := os.read(reader, 64):
            if any(number in ENDING for number in numbers):
                self.asked = True
                if self._inbox is not None:
                    self._inbox.put(Stop())
                time.sleep(LAST_RESORT_S)
                os._exit(0)
